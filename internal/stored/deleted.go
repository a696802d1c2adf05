package stored

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"sluice/internal/index"
	"sluice/internal/storage"
	"sluice/oci"
)

// maxDeleted bounds the content of what one record of a soft deletion holds, in
// bytes: in base64 it must be Put at once.
const maxDeleted = 10 << 20

// defaultRetention is how long what was soft-deleted is kept when soft deletion
// has been switched off since.
const defaultRetention = 7 * 24 * time.Hour

// deletedRecord returns the record of a manifest that is being deleted with its
// artifacts, and whether it is to be kept: a manifest that a bad disk has lost
// is not.
func (r *Registry) deletedRecord(ctx context.Context, doomed []taggedManifest, at time.Time) (deletedRecord, bool, error) {
	if r.opts.SoftDelete <= 0 {
		return deletedRecord{}, false, nil
	}
	record := deletedRecord{DeletedAt: at, By: actorName(ctx)}
	size := 0
	for i, m := range doomed {
		content, err := r.readManifest(ctx, m.Repo, m.Digest)
		if err == nil && i > 0 && size+len(content) > maxDeleted {
			err = damaged{errors.New("there are too many")} // more than a few are made by nobody but a tester
		}
		var d damaged
		if errors.Is(err, storage.ErrNotFound) || errors.As(err, &d) {
			r.opts.Log.Warn("manifest is deleted for good: it can't be kept for restoring", "repository", m.Repo, "digest", m.Digest, "error", err)
			if i == 0 {
				return deletedRecord{}, false, nil
			}
			continue
		}
		if err != nil {
			return deletedRecord{}, false, err
		}
		size += len(content)
		kept := deletedManifest{
			Digest: m.Digest, Tags: []string{}, MediaType: m.MediaType, Pushed: m.Pushed, PushedBy: m.By,
			OS: m.OS, Architecture: m.Architecture, Attributes: m.Attributes, Content: content,
		}
		for _, t := range m.tags {
			kept.Tags = append(kept.Tags, t.Name)
		}
		if i == 0 {
			record.deletedManifest = kept
		} else {
			record.Artifacts = append(record.Artifacts, kept)
		}
	}
	return record, true, nil
}

// readDeleted returns the record of a soft deletion. Errors: storage.ErrNotFound,
// damaged.
func (r *Registry) readDeleted(ctx context.Context, repo string, digest oci.Digest) (deletedRecord, error) {
	record := deletedRecord{deletedManifest: deletedManifest{Attributes: index.DefaultAttributes()}}
	key := deletedKey(repo, digest)
	if err := r.readRecord(ctx, key, storage.MaxPut, &record); err != nil {
		return record, err
	}
	for i, m := range record.all() {
		if _, err := oci.ParseDigest(m.Digest.String()); err != nil || i == 0 && m.Digest != digest || m.Digest.Algorithm().FromBytes(m.Content) != m.Digest {
			return record, damaged{fmt.Errorf("stored object %s is damaged: %q is not what it should hold", key, m.Digest)}
		}
	}
	return record, nil
}

// all returns the manifest, and then the artifacts.
func (d deletedRecord) all() []deletedManifest {
	return append([]deletedManifest{d.deletedManifest}, d.Artifacts...)
}

// row is what the index keeps of a soft deletion.
func (d deletedRecord) row(repo string) (index.Deleted, error) {
	row := index.Deleted{Repo: repo, Digest: d.Digest, MediaType: d.MediaType, Tags: d.Tags, Deleted: micro(d.DeletedAt), By: d.By}
	for i, kept := range d.all() {
		m, err := kept.manifest(repo)
		if err != nil {
			return row, err
		}
		if i == 0 {
			row.Children, row.Size, row.ImageSize = m.Children, m.Size, m.ImageSize
		}
		for _, b := range m.Blobs {
			if !slices.ContainsFunc(row.Blobs, func(o oci.Descriptor) bool { return o.Digest == b.Digest }) {
				row.Blobs = append(row.Blobs, b)
			}
		}
	}
	return row, nil
}

// manifest is the manifest as it was, but for Updated.
func (d deletedManifest) manifest(repo string) (index.Manifest, error) {
	m, _, err := describeManifest(repo, d.Digest, d.MediaType, d.Content)
	m.Pushed, m.By, m.OS, m.Architecture, m.Attributes = micro(d.Pushed), d.PushedBy, d.OS, d.Architecture, d.Attributes
	return m, err
}

// Restore brings a soft-deleted manifest back, with its streaming artifacts and
// with tag or, if that is empty, with those of its former tags that are free. An
// artifact whose blobs are gone stays away: it can be made again.
//
// Errors: ErrManifestUnknown if it isn't deleted, or not restorable any more;
// ErrManifestBlobUnknown if what it needs is gone; ErrDenied if the repository
// is locked, or tag points at another manifest.
func (r *Registry) Restore(ctx context.Context, repo string, digest oci.Digest, tag string) (oci.Descriptor, error) {
	if err := check(ctx, repo, digest); err != nil {
		return oci.Descriptor{}, err
	}
	if tag != "" {
		if err := oci.CheckTag(tag); err != nil {
			return oci.Descriptor{}, err
		}
	}
	unlock, err := r.exclude(ctx, repo)
	if err != nil {
		return oci.Descriptor{}, err
	}
	defer unlock()
	record, err := r.readDeleted(ctx, repo, digest)
	if errors.Is(err, storage.ErrNotFound) {
		return oci.Descriptor{}, oci.ErrManifestUnknown.Withf("manifest %s is not among the deleted ones of repository %s", digest, repo)
	}
	var back revival
	if err == nil {
		if tag != "" {
			record.Tags = []string{tag}
		}
		back, err = r.revive(ctx, repo, record)
	}
	if err == nil {
		err = r.checkRestorable(ctx, repo, tag, back)
	}
	var follow func(*index.Tx) error
	if err == nil {
		follow, err = r.followUps(ctx, back.manifests[0].Manifest)
	}
	if err == nil {
		err = r.change(ctx, repo,
			func(ctx context.Context) error { return r.putRevival(ctx, repo, digest, back) },
			func(tx *index.Tx) error { back.rows(tx); tx.RemoveDeleted(repo, digest); return follow(tx) },
			back.events(repo, oci.ActorOf(ctx))...)
	}
	if err != nil {
		return oci.Descriptor{}, fmt.Errorf("restore manifest %s of %s: %w", digest, repo, err)
	}
	return manifestDescriptor(back.manifests[0].Manifest), nil
}

// revival is what a restored manifest becomes.
type revival struct {
	manifests []revivedManifest // the manifest itself is the first
	missing   []oci.Digest      // what it needs and isn't there
}

type revivedManifest struct {
	taggedManifest // with the tags it gets back
	content        []byte
}

// revive returns what a record brings back to a repository that the caller has
// alone: all but artifacts that aren't complete, and tags that are taken.
func (r *Registry) revive(ctx context.Context, repo string, record deletedRecord) (revival, error) {
	var back revival
	at := now()
	for i, kept := range record.all() {
		m, err := kept.manifest(repo)
		if err != nil {
			return back, err
		}
		m.Updated = at
		missing, err := r.missingReferences(ctx, m)
		if err != nil {
			return back, err
		}
		if i == 0 {
			back.missing = missing
		} else if len(missing) > 0 {
			r.opts.Log.Warn("streaming artifact is not restored: its blobs are gone", "repository", repo, "digest", m.Digest, "missing", missing)
			continue
		}
		revived := revivedManifest{taggedManifest{Manifest: m}, kept.Content}
		for _, name := range kept.Tags {
			if oci.CheckTag(name) != nil {
				continue
			}
			if _, err := r.store.Stat(ctx, tagKey(repo, name)); err == nil {
				continue
			} else if !errors.Is(err, storage.ErrNotFound) {
				return back, err
			}
			revived.tags = append(revived.tags, index.Tag{
				Repo: repo, Name: name, Digest: m.Digest, Created: at, Updated: at, Attributes: index.DefaultAttributes(),
			})
		}
		back.manifests = append(back.manifests, revived)
	}
	return back, nil
}

func (r *Registry) missingReferences(ctx context.Context, m index.Manifest) (missing []oci.Digest, err error) {
	var keys []string
	var digests []oci.Digest
	for _, b := range m.Blobs {
		keys, digests = append(keys, layerKey(m.Repo, b.Digest)), append(digests, b.Digest)
	}
	for _, c := range m.Children {
		keys, digests = append(keys, manifestKey(m.Repo, c)), append(digests, c)
	}
	for i, key := range keys {
		_, err := r.store.Stat(ctx, key)
		if errors.Is(err, storage.ErrNotFound) {
			missing = append(missing, digests[i])
		} else if err != nil {
			return nil, err
		}
	}
	return missing, nil
}

// checkRestorable returns an error for what Restore is not to bring back.
func (r *Registry) checkRestorable(ctx context.Context, repo, tag string, back revival) error {
	row, err := r.db.Repository(ctx, repo)
	if err != nil {
		return err
	}
	if err := writable(row.Attributes, "repository", repositoryTarget(repo)); err != nil {
		return err
	}
	if len(back.missing) > 0 && !r.opts.AllowSparse {
		all := make([]string, len(back.missing))
		for i, d := range back.missing {
			all[i] = d.String()
		}
		return oci.ErrManifestBlobUnknown.Withf("what it needs is gone: %s: push that again, or restore it first", strings.Join(all, ", "))
	}
	if tag != "" && len(back.manifests[0].tags) == 0 {
		return oci.ErrDenied.Withf("tag %s is taken: delete it first, or restore under another one", tag)
	}
	return nil
}

// putRevival writes the objects of a revival: artifacts before what they belong
// to, tags last. The record goes when everything is there, so that whoever finds
// both goes on.
func (r *Registry) putRevival(ctx context.Context, repo string, digest oci.Digest, back revival) error {
	for _, m := range slices.Backward(back.manifests) {
		if err := r.putManifestObjects(ctx, m.Manifest, m.content); err != nil {
			return err
		}
	}
	for _, m := range back.manifests {
		for _, t := range m.tags {
			if err := r.put(ctx, tagKey(repo, t.Name), recordOfTag(t)); err != nil {
				return err
			}
		}
	}
	return r.remove(ctx, deletedKey(repo, digest))
}

func (v revival) rows(tx *index.Tx) {
	for _, m := range v.manifests {
		tx.PutManifest(m.Manifest)
		for _, t := range m.tags {
			tx.PutTag(t)
		}
	}
}

func (v revival) events(repo string, by oci.Actor) []Event {
	var events []Event
	for _, m := range v.manifests {
		tags := []string{""}
		if len(m.tags) > 0 {
			tags = nil
		}
		for _, t := range m.tags {
			tags = append(tags, t.Name)
		}
		for _, tag := range tags {
			events = append(events, newEvent(pushAction(m.Manifest), repo, tag, manifestDescriptor(m.Manifest), m.Updated, by))
		}
	}
	return events
}

// Purge removes soft-deleted manifests that are older than Options.SoftDelete,
// and returns how many. Their blobs are for Collect.
func (r *Registry) Purge(ctx context.Context) (int, error) {
	retention := r.opts.SoftDelete
	if retention <= 0 {
		retention = defaultRetention
	}
	before, n, last := now().Add(-retention), 0, ""
	for {
		old, err := r.db.DeletedManifests(ctx, "", before, last, pageSize)
		if err != nil {
			return n, err
		}
		for _, d := range old {
			purged, err := r.purge(ctx, d, before)
			if err != nil {
				return n, fmt.Errorf("purge manifest %s of %s: %w", d.Digest, d.Repo, err)
			}
			if purged {
				n++
			}
			last = d.Repo + "@" + d.Digest.String()
		}
		if len(old) < pageSize {
			return n, nil
		}
	}
}

// purge removes a record, unless the manifest was restored and deleted again.
func (r *Registry) purge(ctx context.Context, d index.Deleted, before time.Time) (bool, error) {
	unlock, err := r.exclude(ctx, d.Repo)
	if err != nil {
		return false, err
	}
	defer unlock()
	var damage damaged
	record, err := r.readDeleted(ctx, d.Repo, d.Digest)
	if err == nil && !record.DeletedAt.Before(before) {
		return false, nil
	}
	if err != nil && !errors.Is(err, storage.ErrNotFound) && !errors.As(err, &damage) {
		return false, err
	}
	return err == nil, r.change(ctx, d.Repo,
		func(ctx context.Context) error { return r.remove(ctx, deletedKey(d.Repo, d.Digest)) },
		func(tx *index.Tx) error { tx.RemoveDeleted(d.Repo, d.Digest); return nil })
}
