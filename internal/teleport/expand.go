package teleport

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"syscall"

	"sluice/internal/blob"
	"sluice/internal/convert"
	"sluice/internal/layer"
	"sluice/internal/operation"
	"sluice/internal/stored"
	"sluice/oci"
)

// do does a job: it expands an image or index, or sweeps a repository.
func (s *Service) do(ctx context.Context, w *operation.Work) (message string, err error) {
	var payload stored.Expansion
	if err := json.Unmarshal(w.Job.Payload, &payload); err != nil {
		return "", oci.ErrUnsupported.Withf("the job was queued by another version of the registry: push the image again")
	}
	ctx = oci.WithActor(ctx, payload.Actor)
	if w.Job.Key == "" {
		return "", s.sweep(ctx, w.Repo)
	}
	if ok, why, err := s.takesPart(ctx, w.Repo); err != nil || !ok {
		return why, err
	}
	images, err := convert.Images(ctx, s.registry, w.Repo, w.Job.Key, convert.Options{
		Log: s.opts.Log, Progress: s.meter(w),
	})
	if err != nil {
		return "", err
	}
	made := 0
	for _, img := range images {
		n, err := s.expand(ctx, w.Repo, img)
		made += n
		if err != nil {
			return "", fmt.Errorf("for %s: %w", img.Platform.Architecture, s.explain(err))
		}
	}
	if made == 0 {
		message = "its layers were expanded before"
	}
	return message, nil
}

// explain says what to do about an error of the share, if it is a common one.
func (s *Service) explain(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: the share is full: make room in %s (teleport.directory), or give it a larger file system", err, s.share.dir)
	}
	return err
}

// meter returns the Progress of an expansion.
func (s *Service) meter(w *operation.Work) func(convert.Progress) {
	var mu sync.Mutex
	done, size := make(map[string]int64), make(map[string]int64)
	return func(p convert.Progress) {
		mu.Lock()
		defer mu.Unlock()
		platform := fmt.Sprint(p.Platform)
		done[fmt.Sprint(platform, p.Layer)], size[platform] = p.Done, p.Size
		var d, n int64
		for _, v := range done {
			d += v
		}
		for _, v := range size {
			n += v
		}
		w.Advance(d, n)
	}
}

// permanent returns the code of an error that will be the same the next time, or
// nothing.
func permanent(err error) string {
	var coded *oci.Error
	switch {
	case errors.Is(err, ErrTooLarge), errors.Is(err, ErrLayer):
		if errors.As(err, &coded) {
			return coded.Code
		}
	case errors.Is(err, oci.ErrBlobUnknown):
		return convert.ErrResourceNotFound.Code // a layer that was never pushed
	case errors.Is(err, convert.ErrContent):
		return convert.ErrImageNotRunnable.Code
	case !errors.As(err, &coded):
	case blob.Final(err), errors.Is(err, oci.ErrManifestInvalid), convert.Ineligible(err):
		return coded.Code
	}
	return ""
}

// expansion is the expansion of one image.
type expansion struct {
	s     *Service
	repo  string
	image convert.Image
	trees []*layer.Tree // of the layers that have been read; nil for others
}

// expand makes the disks that an image lacks in a repository, and returns how many.
func (s *Service) expand(ctx context.Context, repo string, img convert.Image) (made int, err error) {
	e := &expansion{s: s, repo: repo, image: img, trees: make([]*layer.Tree, len(img.Layers))}
	left := s.opts.MaxImage
	for i := range img.Layers {
		d, isNew, err := e.layer(ctx, i, left)
		if errors.Is(err, ErrTooLarge) {
			return made, ErrTooLarge.Withf("with layer %d expanded it goes beyond teleport.max_layer (%d bytes) or teleport.max_image (%d bytes): it can be pulled the ordinary way",
				i, s.opts.MaxLayer, s.opts.MaxImage)
		}
		if err != nil {
			return made, err
		}
		if isNew {
			made++
		}
		left -= d.Size
	}
	if all, err := s.disks(repo, img); err != nil || len(all) == 0 {
		return made, errors.Join(err, errors.New("somebody has removed disks while others were made"))
	}
	// If it was deleted while the last of them was made, what was removed then didn't
	// include that one.
	if _, err := s.registry.Manifest(ctx, repo, img.Manifest.Digest); err != nil {
		return made, err
	}
	return made, nil
}

// layer sees to it that the repository has the disk of layer i, of at most limit
// bytes.
func (e *expansion) layer(ctx context.Context, i int, limit int64) (d Disk, isNew bool, err error) {
	src := e.image.Layers[i]
	limit = min(limit, e.s.opts.MaxLayer)
	unlock, err := e.s.db.PollExclude(ctx, layerLock(src.Blob.Digest), e.s.pause)
	if err != nil {
		return Disk{}, false, err
	}
	defer unlock()
	// If it was deleted, what is made from here on may be made after everything was
	// removed that nothing needs.
	if _, err := e.s.registry.Manifest(ctx, e.repo, e.image.Manifest.Digest); err != nil {
		return Disk{}, false, err
	}
	// A manifest may name blobs that its repository doesn't have.
	if _, err := e.s.registry.ResolveBlob(ctx, e.repo, src.Blob.Digest); err != nil {
		return Disk{}, false, err
	}
	d, ok, err := findLayer(e.s.share.layers(e.repo), e.image, i)
	if err != nil {
		return d, false, err
	}
	if !ok {
		if d, ok, err = findLayer(e.s.share.pool(), e.image, i); err != nil {
			return d, false, err
		}
		if isNew = !ok; isNew {
			d, err = e.make(ctx, i, limit)
		}
		if err == nil && d.Size <= limit {
			err = e.s.share.give(d.Name, e.repo)
		}
	}
	if err == nil && d.Size > limit {
		err = ErrTooLarge
	}
	e.s.count(isNew, err)
	return d, isNew, err
}

// findLayer returns the disk of an image's layer in a directory. It is that of the
// layer alone, if there is one: then the layers below it don't matter.
func findLayer(dir string, img convert.Image, i int) (Disk, bool, error) {
	for _, below := range []string{"", below(img, i)} {
		d, ok, err := find(dir, diskName(img.Layers[i].Blob.Digest, below))
		if err != nil || ok && d.DiffID == img.Layers[i].DiffID {
			return d, err == nil, err
		}
	}
	return Disk{}, false, nil
}

// below returns what stands for the layers below layer i of an image.
func below(img convert.Image, i int) string {
	h := sha256.New()
	for _, src := range img.Layers[:i] {
		fmt.Fprintln(h, src.DiffID)
	}
	return fmt.Sprintf("%x", h.Sum(nil)[:8])
}

// make makes the disk of layer i in the pool.
func (e *expansion) make(ctx context.Context, i int, limit int64) (Disk, error) {
	src := e.image.Layers[i]
	p, err := e.s.read(ctx, src, limit)
	if err != nil {
		return Disk{}, err
	}
	defer p.discard()
	e.trees[i] = p.tree
	trees, name := e.trees[i:i+1], diskName(src.Blob.Digest, "")
	if !p.tree.SelfContained() {
		for j := range i {
			if e.trees[j] != nil {
				continue
			}
			if e.trees[j], err = treeOf(ctx, e.image.Layers[j]); err != nil {
				return Disk{}, err
			}
		}
		trees, name = e.trees[:i+1], diskName(src.Blob.Digest, below(e.image, i))
	}
	return e.s.write(src, p, trees, name)
}

func layerLock(layer oci.Digest) string { return "disk/" + layer.String() }
