package streaming

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"sluice/internal/artifact"
	"sluice/internal/convert"
	"sluice/internal/storage"
	"sluice/oci"
)

// A layer that was converted is two objects: its tree and chunks, as
// artifact.WriteLayer writes them, and then its record, which says where they
// came from and which blobs belong to it. The number is that of the form.
const layersPrefix = "registry/layers/1/"

func layerDir(diffID oci.Digest) string   { return layersPrefix + diffID.String() + "/" }
func recordKey(diffID oci.Digest) string  { return layerDir(diffID) + "record" }
func contentKey(diffID oci.Digest) string { return layerDir(diffID) + "content" }
func layerLock(diffID oci.Digest) string  { return "layer/" + diffID.String() }
func blobsOf(l *artifact.Layer) (d []oci.Descriptor) {
	d = append(d, l.Tar.Blob)
	if l.Sparse != nil {
		d = append(d, l.Sparse.Blob)
	}
	return d
}

const (
	maxRecord  = 64 << 10
	maxSources = 256 // of one record
)

// layerRecord is a converted layer's record.
type layerRecord struct {
	Blobs   []oci.Descriptor `json:"blobs"`
	Sources []oci.Digest     `json:"sources"` // blobs that have been seen to decode to the diff ID
}

// layer is the convert.Reuse of every conversion. One layer is converted by one
// worker at a time, whichever images it is for; others wait for it. They look
// again from time to time instead of waiting for the lock, since who has it
// needs other locks.
func (s *Service) layer(ctx context.Context, src convert.LayerSource) (*artifact.Layer, error) {
	unlock, err := s.db.PollExclude(ctx, layerLock(src.DiffID), s.pause)
	if err != nil {
		return nil, err
	}
	defer unlock()
	l, err := s.known(ctx, src)
	if err != nil {
		return nil, err
	}
	if l != nil {
		s.reused.Add(1)
		return l, nil
	}
	if l, err = src.Convert(ctx); err != nil {
		return nil, err
	}
	s.converted.Add(1)
	if err := s.keep(ctx, src, l); err != nil && ctx.Err() == nil {
		s.opts.Log.Warn("a converted layer can't be written down; it may be converted again", "layer", src.DiffID, "error", err)
	}
	return l, nil
}

// known returns a layer that was converted before, with its blobs in the source's
// repository, or nil.
func (s *Service) known(ctx context.Context, src convert.LayerSource) (*artifact.Layer, error) {
	record, err := s.record(ctx, src.DiffID)
	if errors.Is(err, storage.ErrNotFound) {
		return nil, nil
	}
	var l *artifact.Layer
	if err == nil {
		l, err = s.content(ctx, src.DiffID, record)
	}
	if err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		s.opts.Log.Warn("what was written down of a converted layer can't be used; it is converted again", "layer", src.DiffID, "error", err)
		return nil, s.forget(ctx, src.DiffID)
	}
	// A manifest may name blobs that its repository doesn't have.
	if _, err := s.generator.ResolveBlob(ctx, src.Repo, src.Blob.Digest); err != nil {
		return nil, err
	}
	for _, b := range record.Blobs {
		if ok, err := s.bring(ctx, src.Repo, b); err != nil || !ok {
			return nil, err
		}
	}
	if src.Blob.Digest != src.DiffID && !slices.Contains(record.Sources, src.Blob.Digest) {
		if err := src.Prove(ctx); err != nil {
			return nil, err
		}
		record.Sources = append(record.Sources, src.Blob.Digest)
		err = s.putRecord(ctx, src.DiffID, record)
	}
	return l, err
}

// content reads a layer that has a record.
func (s *Service) content(ctx context.Context, diffID oci.Digest, record layerRecord) (*artifact.Layer, error) {
	o, err := s.opts.Store.Open(ctx, contentKey(diffID), 0, -1)
	if err != nil {
		return nil, err
	}
	defer o.Close()
	l, err := artifact.ReadLayer(o)
	if err != nil {
		return nil, err
	}
	same := func(a, b oci.Descriptor) bool { return a.Digest == b.Digest && a.Size == b.Size }
	if l.DiffID != diffID || !slices.EqualFunc(blobsOf(l), record.Blobs, same) {
		return nil, fmt.Errorf("%s isn't that of its record", contentKey(diffID))
	}
	return l, nil
}

// bring sees to it that a blob is in a repository, and reports whether it is: from
// now on for as long as garbage collection's grace lasts.
func (s *Service) bring(ctx context.Context, repo string, b oci.Descriptor) (bool, error) {
	there := func(d oci.Descriptor, err error) (bool, error) {
		if errors.Is(err, oci.ErrBlobUnknown) || errors.Is(err, oci.ErrNameUnknown) {
			return false, nil
		}
		return err == nil && d.Size == b.Size, err
	}
	if ok, err := there(s.generator.ResolveBlob(ctx, repo, b.Digest)); ok || err != nil {
		return ok, err
	}
	from, err := s.registry.FindBlob(ctx, b.Digest)
	if err != nil || from == "" {
		return false, err
	}
	return there(s.generator.MountBlob(ctx, from, repo, b.Digest))
}

// keep writes a converted layer down, its record last.
func (s *Service) keep(ctx context.Context, src convert.LayerSource, l *artifact.Layer) error {
	u, err := s.opts.Store.StartUpload(ctx)
	if err != nil {
		return err
	}
	defer u.Close()
	if err = artifact.WriteLayer(u, l); err == nil {
		err = u.Commit(ctx, contentKey(src.DiffID))
	}
	if err != nil && !errors.Is(err, storage.ErrExists) { // which has the same: it depends on the layer alone
		_ = s.opts.Store.CancelUpload(context.WithoutCancel(ctx), u.ID()) // or it is swept
		return err
	}
	return s.putRecord(ctx, src.DiffID, layerRecord{Blobs: blobsOf(l), Sources: []oci.Digest{src.Blob.Digest}})
}

func (s *Service) record(ctx context.Context, diffID oci.Digest) (r layerRecord, err error) {
	doc, err := storage.ReadAll(ctx, s.opts.Store, recordKey(diffID), maxRecord)
	if err == nil {
		err = json.Unmarshal(doc, &r)
	}
	return r, err
}

func (s *Service) putRecord(ctx context.Context, diffID oci.Digest, r layerRecord) error {
	r.Sources = r.Sources[max(0, len(r.Sources)-maxSources):]
	doc, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return s.opts.Store.Put(ctx, recordKey(diffID), doc)
}

// forget removes what is written down of a layer.
func (s *Service) forget(ctx context.Context, diffID oci.Digest) error {
	for _, key := range []string{recordKey(diffID), contentKey(diffID)} {
		if err := s.opts.Store.Delete(ctx, key); err != nil && !errors.Is(err, storage.ErrNotFound) {
			return err
		}
	}
	return nil
}

// Tidy forgets the converted layers whose blobs no repository has any more, and
// returns how many. To be called now and then, after garbage was collected.
func (s *Service) Tidy(ctx context.Context) (int, error) {
	n := 0
	if s.opts.Store == nil {
		return 0, nil
	}
	for dir, err := range s.opts.Store.List(ctx, layersPrefix, "") {
		if err != nil {
			return n, err
		}
		diffID, err := oci.ParseDigest(strings.TrimSuffix(strings.TrimPrefix(dir, layersPrefix), "/"))
		if err != nil {
			continue // none of ours
		}
		gone, err := s.tidy(ctx, diffID)
		if err != nil {
			return n, fmt.Errorf("converted layer %s: %w", diffID, err)
		}
		if gone {
			n++
		}
	}
	return n, nil
}

// tidy forgets a layer if its blobs are gone, unless somebody is at it.
func (s *Service) tidy(ctx context.Context, diffID oci.Digest) (bool, error) {
	unlock, ok, err := s.db.TryExclude(ctx, layerLock(diffID))
	if err != nil || !ok {
		return false, err
	}
	defer unlock()
	record, err := s.record(ctx, diffID)
	if err != nil && !errors.Is(err, storage.ErrNotFound) {
		return false, err
	}
	for _, b := range record.Blobs {
		repo, err := s.registry.FindBlob(ctx, b.Digest)
		if err != nil {
			return false, err
		}
		if repo == "" {
			return true, s.forget(ctx, diffID)
		}
	}
	if err != nil { // a crash came between content and record
		return true, s.forget(ctx, diffID)
	}
	return false, nil
}
