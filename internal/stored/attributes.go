package stored

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"sluice/internal/index"
	"sluice/oci"
)

// The paths under which the management API unlocks things.
func repositoryTarget(repo string) string { return "/acr/v1/" + repo }
func manifestTarget(repo string, d oci.Digest) string {
	return "/acr/v1/" + repo + "/_manifests/" + d.String()
}
func tagTarget(repo, tag string) string { return "/acr/v1/" + repo + "/_tags/" + tag }

// locked is the error for what an attribute forbids. kind is what target is.
func locked(kind, target, what, attribute string) error {
	return oci.ErrDenied.Withf("%s %s is locked against %s (%s is false): to unlock it, set %s to true with PATCH %s",
		kind, target[len("/acr/v1/"):], what, attribute, attribute, target)
}

func readable(a index.Attributes, kind, target string) error {
	if a.ReadEnabled {
		return nil
	}
	return locked(kind, target, "pulls", "readEnabled")
}

func writable(a index.Attributes, kind, target string) error {
	if a.WriteEnabled {
		return nil
	}
	return locked(kind, target, "pushes", "writeEnabled")
}

func deletable(a index.Attributes, kind, target string) error {
	if a.DeleteEnabled {
		return nil
	}
	return locked(kind, target, "deletion", "deleteEnabled")
}

// SetRepositoryAttributes changes the attributes of a repository with set, and
// returns what it is then. What set refuses is not changed. Pushes and deletions
// heed it from then on, pulls of blobs by other replicas within a second.
//
// Errors: ErrNameUnknown, those of set.
func (r *Registry) SetRepositoryAttributes(ctx context.Context, repo string, set func(*index.Attributes) error) (index.Repository, error) {
	if err := check(ctx, repo); err != nil {
		return index.Repository{}, err
	}
	unlock, err := r.exclude(ctx, repo)
	if err != nil {
		return index.Repository{}, err
	}
	defer unlock()
	row, err := r.Repository(ctx, repo)
	if err != nil {
		return row, err
	}
	if err := set(&row.Attributes); err != nil {
		return row, err
	}
	row.Updated = now()
	err = r.change(ctx, repo,
		func(ctx context.Context) error { return r.put(ctx, repositoryKey(repo), recordOfRepository(row)) },
		func(tx *index.Tx) error { tx.PutRepository(row); return nil })
	r.known.forget(repo)
	if err != nil {
		return row, fmt.Errorf("set attributes of %s: %w", repo, err)
	}
	return row, nil
}

// SetManifestAttributes is SetRepositoryAttributes for a manifest.
//
// Errors: ErrNameUnknown, ErrManifestUnknown, those of set.
func (r *Registry) SetManifestAttributes(ctx context.Context, repo string, digest oci.Digest, set func(*index.Attributes) error) (index.Manifest, error) {
	if err := check(ctx, repo, digest); err != nil {
		return index.Manifest{}, err
	}
	unlock, err := r.exclude(ctx, repo)
	if err != nil {
		return index.Manifest{}, err
	}
	defer unlock()
	row, err := r.Manifest(ctx, repo, digest)
	if err != nil {
		return row, err
	}
	if err := set(&row.Attributes); err != nil {
		return row, err
	}
	row.Updated = now()
	err = r.change(ctx, repo,
		func(ctx context.Context) error { return r.put(ctx, attributesKey(repo, digest), recordOfManifest(row)) },
		func(tx *index.Tx) error { tx.PutManifest(row); return nil })
	if err != nil {
		return row, fmt.Errorf("set attributes of manifest %s of %s: %w", digest, repo, err)
	}
	return row, nil
}

// SetTagAttributes is SetRepositoryAttributes for a tag.
//
// Errors: ErrNameUnknown, ErrManifestUnknown, those of set.
func (r *Registry) SetTagAttributes(ctx context.Context, repo, tag string, set func(*index.Attributes) error) (index.Tag, error) {
	if err := check(ctx, repo); err != nil {
		return index.Tag{}, err
	}
	unlock, err := r.exclude(ctx, repo)
	if err != nil {
		return index.Tag{}, err
	}
	defer unlock()
	row, err := r.Tag(ctx, repo, tag)
	if err != nil {
		return row, err
	}
	if err := set(&row.Attributes); err != nil {
		return row, err
	}
	row.Updated = now()
	err = r.change(ctx, repo,
		func(ctx context.Context) error { return r.put(ctx, tagKey(repo, tag), recordOfTag(row)) },
		func(tx *index.Tx) error { tx.PutTag(row); return nil })
	if err != nil {
		return row, fmt.Errorf("set attributes of tag %s of %s: %w", tag, repo, err)
	}
	return row, nil
}

// attributes returns those of a repository, as they were at most attributesAge
// ago. One that isn't in the index has the defaults.
func (r *Registry) attributes(ctx context.Context, repo string) (index.Attributes, error) {
	if a, ok := r.known.get(repo); ok {
		return a, nil
	}
	asked := time.Now()
	row, err := r.db.Repository(ctx, repo)
	if errors.Is(err, index.ErrNotFound) {
		return index.DefaultAttributes(), nil
	}
	if err == nil {
		r.known.put(repo, row.Attributes, asked)
	}
	return row.Attributes, err
}

// attributesCache remembers the attributes of repositories for the pulls of
// blobs, which otherwise need nothing of the index.
type attributesCache struct {
	mu    sync.Mutex
	known map[string]knownAttributes // guarded by mu
}

type knownAttributes struct {
	index.Attributes
	until time.Time
}

const (
	attributesAge   = time.Second // how late a change by another replica may be seen
	attributesCount = 10_000      // how many are remembered
)

func newAttributesCache() *attributesCache {
	return &attributesCache{known: map[string]knownAttributes{}}
}

func (c *attributesCache) get(repo string) (index.Attributes, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k, ok := c.known[repo]
	return k.Attributes, ok && time.Now().Before(k.until)
}

func (c *attributesCache) put(repo string, a index.Attributes, asked time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.known) >= attributesCount {
		clear(c.known)
	}
	c.known[repo] = knownAttributes{a, asked.Add(attributesAge)}
}

func (c *attributesCache) forget(repo string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.known, repo)
}
