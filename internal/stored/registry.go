// Package stored is the registry itself: an oci.Registry whose manifests, blobs
// and tags are objects of a storage.Store. Package registry speaks HTTP for it.
package stored

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"

	"sluice/internal/storage"
	"sluice/oci"
)

// Registry is an oci.Registry on a storage.Store. The tree of objects is all
// there is: nothing is remembered besides, so that it is right from the start
// after a crash, and any other process may read it.
//
//	repositories/REPO/_manifests/DIGEST           manifests, byte for byte
//	repositories/REPO/_layers/DIGEST              blobs
//	repositories/REPO/_tags/TAG                   the digest that the tag points at
//	repositories/REPO/_referrers/SUBJECT/DIGEST   descriptor of a manifest with that subject
//
// Components of a repository name never begin with "_", so these can't collide
// with repositories inside REPO.
//
// A manifest's object is what makes it exist. What points at it is written in
// an order that lets no crash contradict that: the referrer link before the
// manifest (a link without manifest is passed over), the tag after it; on
// deletion the tags first, the link last.
type Registry struct {
	store  storage.Store
	sparse bool
	locks  repoLocks
}

var _ oci.Registry = (*Registry)(nil)

// Options says how a Registry works. The zero value follows the contract
// of oci.Registry to the letter.
type Options struct {
	// AllowSparse accepts manifests whose blobs or manifests are not in the
	// repository, such as an index of which some platforms were left out when
	// it was copied.
	AllowSparse bool
}

// New returns the registry in store. At most one process may change a
// store at a time.
func New(store storage.Store, opts Options) *Registry {
	return &Registry{store: store, sparse: opts.AllowSparse}
}

// BlobIdentity tells storage.Local which objects have the same content: blobs of
// one digest, whichever repository they are in.
func BlobIdentity(key string) string {
	dir, name := path.Split(key)
	digest, err := oci.ParseDigest(name)
	if err != nil || !strings.HasSuffix(dir, "/_layers/") {
		return ""
	}
	return fmt.Sprintf("%s/%s/%s", digest.Algorithm(), digest.Encoded()[:2], digest.Encoded())
}

const root = "repositories/"

// The parts of a repository.
const (
	manifestsPart = "_manifests/"
	layersPart    = "_layers/"
	tagsPart      = "_tags/"
	referrersPart = "_referrers/"
)

func partKey(repo, part string) string             { return root + repo + "/" + part }
func manifestKey(repo string, d oci.Digest) string { return partKey(repo, manifestsPart) + d.String() }
func layerKey(repo string, d oci.Digest) string    { return partKey(repo, layersPart) + d.String() }
func tagKey(repo, tag string) string               { return partKey(repo, tagsPart) + tag }
func referrersKey(repo string, s oci.Digest) string {
	return partKey(repo, referrersPart) + s.String() + "/"
}
func referrerKey(repo string, s, d oci.Digest) string { return referrersKey(repo, s) + d.String() }

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

// exists reports whether a repository holds a manifest or a blob.
func (r *Registry) exists(ctx context.Context, repo string) (bool, error) {
	for part, err := range r.parts(ctx, repo) {
		if err != nil || part == layersPart || part == manifestsPart {
			return err == nil, err
		}
	}
	return false, nil
}

// parts yields the parts of a repository that aren't empty.
func (r *Registry) parts(ctx context.Context, repo string) func(yield func(string, error) bool) {
	return func(yield func(string, error) bool) {
		dir := partKey(repo, "")
		for name, err := range r.store.List(ctx, dir, dir+"_") {
			part := strings.TrimPrefix(name, dir)
			if err == nil && !strings.HasPrefix(part, "_") {
				return // repositories inside this one
			}
			if !yield(part, err) {
				return
			}
		}
	}
}

// missing turns storage's "not found" into what the contract says: unknown, or
// ErrNameUnknown if there isn't even the repository.
func (r *Registry) missing(ctx context.Context, repo string, err error, unknown *oci.Error) error {
	if !errors.Is(err, storage.ErrNotFound) {
		return err
	}
	some, err := r.exists(ctx, repo)
	if err != nil {
		return err
	}
	if !some {
		return oci.ErrNameUnknown.Withf("repository %s is unknown", repo)
	}
	return unknown
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
