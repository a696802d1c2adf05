package stored

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path"
	"strings"
	"time"

	"sluice/internal/index"
	"sluice/internal/storage"
	"sluice/oci"
)

// Registry is an oci.Registry on a storage.Store and an index.DB: see the
// package's documentation. Any number of processes may have a Registry on one
// object store if they share the index.
type Registry struct {
	store storage.Store
	db    *index.DB
	opts  Options
	known *attributesCache
}

var _ oci.Registry = (*Registry)(nil)

// Options says how a Registry works. The zero value follows the contract of
// oci.Registry to the letter, but for the reserved artifact type.
type Options struct {
	// AllowSparse accepts manifests whose blobs or manifests are not in the
	// repository, such as an index of which some platforms were left out when
	// it was copied.
	AllowSparse bool

	// AllowStreamingPush lets everybody push manifests of type
	// oci.ArtifactTypeStreaming, for replication and restores. Otherwise only
	// the view of Generator can.
	AllowStreamingPush bool

	// SoftDelete is how long deleted manifests can be restored. 0: not at all.
	SoftDelete time.Duration

	// MaxBlob bounds a blob, RepositoryQuota what a repository takes
	// (index.Usage.Size), in bytes. 0: no bound. Pushes that run at the same
	// time may exceed the quota together.
	MaxBlob, RepositoryQuota int64

	// Events puts an Event into the index's EventQueue with each change.
	Events bool

	// Convert puts images that are pushed to repositories with the attribute
	// StreamingEnabled, or restored there, into the repository's ConvertQueue.
	Convert bool

	// Expand puts images that are pushed to repositories with the attribute
	// TeleportEnabled, or restored there, into the repository's ExpandQueue, and
	// what is to follow their deletion. ExpandAll does so with images pushed to
	// all repositories: who expands them decides.
	Expand, ExpandAll bool

	// Log gets what happens without anybody asking. Nil discards it.
	Log *slog.Logger
}

// New returns the registry in store, whose index is db.
func New(store storage.Store, db *index.DB, opts Options) *Registry {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	return &Registry{store: store, db: db, opts: opts, known: newAttributesCache()}
}

// Generator returns the registry as the maker of streaming artifacts uses it:
// it may push manifests of type oci.ArtifactTypeStreaming, but only of images that
// are there; otherwise PushManifest's error is oci.ErrManifestUnknown.
func (r *Registry) Generator() oci.Registry { return generator{r} }

type generator struct{ *Registry }

// PushManifest implements oci.Writer.
func (g generator) PushManifest(ctx context.Context, repo, reference, mediaType string, content []byte) (oci.Descriptor, error) {
	return g.pushManifest(ctx, repo, reference, mediaType, content, pushRights{streaming: true, generated: true})
}

// BlobIdentity tells stores which objects have the same content: blobs of one
// digest, whichever repository they are in.
func BlobIdentity(key string) string {
	dir, name := path.Split(key)
	digest, err := oci.ParseDigest(name)
	if err != nil || !strings.HasSuffix(dir, "/_layers/") {
		return ""
	}
	return fmt.Sprintf("%s/%s/%s", digest.Algorithm(), digest.Encoded()[:2], digest.Encoded())
}

// changeTimeout bounds how long a change that has begun may take, whatever
// becomes of the request it is for.
const changeTimeout = 2 * time.Minute

// change changes a repository's tree and index together, and is durable when it
// returns nil. Its caller has the repository's lock. What tree has done when it
// fails is found by the next one to have the repository alone.
func (r *Registry) change(ctx context.Context, repo string, tree func(context.Context) error, rows func(*index.Tx) error, events ...Event) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), changeTimeout)
	defer cancel()
	intent, err := r.db.Intend(ctx, repo)
	if err != nil {
		return err
	}
	if err := tree(ctx); err != nil {
		return err
	}
	return intent.Commit(ctx, func(tx *index.Tx) error {
		if err := rows(tx); err != nil {
			return err
		}
		return r.enqueue(tx, events)
	})
}

func (r *Registry) enqueue(tx *index.Tx, events []Event) error {
	if !r.opts.Events {
		return nil
	}
	for _, e := range events {
		payload, err := json.Marshal(e)
		if err != nil {
			return err
		}
		tx.Enqueue(EventQueue, e.Repository, payload)
	}
	return nil
}

func repositoryLock(repo string) string { return "repository/" + repo }

// share takes part in a repository, with others who do.
func (r *Registry) share(ctx context.Context, repo string) (unlock func(), err error) {
	return r.db.Share(ctx, repositoryLock(repo))
}

// exclude has a repository alone. If a crash left its tree and index different,
// they are the same when exclude returns.
func (r *Registry) exclude(ctx context.Context, repo string) (unlock func(), err error) {
	unlock, err = r.db.Exclude(ctx, repositoryLock(repo))
	if err != nil {
		return nil, err
	}
	if err := r.settle(ctx, repo); err != nil {
		unlock()
		return nil, err
	}
	return unlock, nil
}

// write shares a repository that may be written to, and makes it if it isn't
// there.
func (r *Registry) write(ctx context.Context, repo string) (unlock func(), err error) {
	for {
		unlock, err := r.share(ctx, repo)
		if err != nil {
			return nil, err
		}
		row, err := r.db.Repository(ctx, repo)
		if err == nil {
			err = writable(row.Attributes, "repository", repositoryTarget(repo))
		}
		if err == nil {
			return unlock, nil
		}
		unlock()
		if errors.Is(err, index.ErrNotFound) {
			err = r.create(ctx, repo)
		}
		if err != nil {
			return nil, err
		}
	}
}

// create makes a repository, unless somebody else just did.
func (r *Registry) create(ctx context.Context, repo string) error {
	unlock, err := r.exclude(ctx, repo)
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := r.db.Repository(ctx, repo); !errors.Is(err, index.ErrNotFound) {
		return err
	}
	var row index.Repository
	return r.change(ctx, repo,
		func(ctx context.Context) (err error) { row, err = r.describeRepository(ctx, repo); return err },
		func(tx *index.Tx) error { tx.PutRepository(row); return nil })
}

// check validates what nearly every method gets.
func check(ctx context.Context, repo string, digests ...oci.Digest) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := oci.CheckRepository(repo); err != nil {
		return err
	}
	for _, d := range digests {
		if _, err := oci.ParseDigest(d.String()); err != nil {
			return err
		}
	}
	return nil
}

// missing turns "not found" into what the contract says: unknown, or
// ErrNameUnknown if there isn't even the repository.
func (r *Registry) missing(ctx context.Context, repo string, err error, unknown *oci.Error) error {
	if !errors.Is(err, storage.ErrNotFound) && !errors.Is(err, index.ErrNotFound) {
		return err
	}
	if err := r.exists(ctx, repo); err != nil {
		return err
	}
	return unknown
}

// exists returns ErrNameUnknown unless a repository has a manifest or a blob. One
// whose manifests were all soft-deleted doesn't exist.
func (r *Registry) exists(ctx context.Context, repo string) error {
	row, err := r.db.Repository(ctx, repo)
	if err == nil && row.Manifests > 0 {
		return nil
	}
	some := false
	if err == nil {
		some, err = r.notDeleted(ctx, row)
	}
	if err == nil && some {
		var usage index.Usage
		usage, err = r.db.Usage(ctx, repo)
		some = usage.Blobs > 0
	}
	if err != nil && !errors.Is(err, index.ErrNotFound) {
		return err
	}
	if !some {
		return oci.ErrNameUnknown.Withf("repository %s is unknown", repo)
	}
	return nil
}

// notDeleted reports whether a repository is more than soft-deleted manifests
// and their blobs.
func (r *Registry) notDeleted(ctx context.Context, row index.Repository) (bool, error) {
	if row.Manifests > 0 {
		return true, nil
	}
	deleted, err := r.db.DeletedManifests(ctx, row.Name, time.Time{}, "", 1)
	return len(deleted) == 0, err
}

// splitReference splits what PushManifest takes: a tag, a digest, or TAG@DIGEST.
func splitReference(reference string) (tag string, digest oci.Digest, err error) {
	tag, rest, both := strings.Cut(reference, "@")
	if !both {
		if !strings.Contains(reference, ":") {
			return reference, "", oci.CheckTag(reference)
		}
		tag, rest = "", reference
	} else if err := oci.CheckTag(tag); err != nil {
		return "", "", err
	}
	digest, err = oci.ParseDigest(rest)
	return tag, digest, err
}

// now is the time as the index keeps it.
func now() time.Time { return time.Now().UTC().Truncate(time.Microsecond) }

func blobUnknown(repo string, digest oci.Digest) *oci.Error {
	return oci.ErrBlobUnknown.Withf("blob %s is not in repository %s", digest, repo)
}

func manifestUnknown(repo, reference string) *oci.Error {
	return oci.ErrManifestUnknown.Withf("manifest %s is not in repository %s", reference, repo)
}
