package indextest

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"sluice/internal/index"
	"sluice/oci"
)

// comparison asks db every question, in pages of n, and the model as well.
type comparison struct {
	t  *rapid.T
	db *index.DB
	m  model
	n  int
}

func (c comparison) all(ctx context.Context) {
	c.repositories(ctx)
	for _, repo := range append(repositories(), "absent") {
		r := c.m[repo]
		if r == nil {
			r = model{}.repo(repo, late())
		}
		c.tags(ctx, r)
		c.manifests(ctx, r)
		c.blobs(ctx, r)
	}
	c.deleted(ctx)
	c.usage(ctx)
	c.dump(ctx)
}

// same fails if got isn't what the model says.
func same[T any](c comparison, what string, got T, err error, want T) {
	c.t.Helper()
	if err != nil {
		c.t.Fatalf("%s: %v", what, err)
	}
	if diff := gocmp.Diff(want, got, cmpopts.EquateEmpty(), gocmp.Transformer("known", known)); diff != "" {
		c.t.Fatalf("%s (-model +index):\n%s", what, diff)
	}
}

// found is same for one thing that may be absent.
func found[T any](c comparison, what string, got T, err error, want T, there bool) {
	c.t.Helper()
	if there {
		same(c, what, got, err, want)
	} else if !errors.Is(err, index.ErrNotFound) {
		c.t.Fatalf("%s: got %v, %v; want ErrNotFound", what, got, err)
	}
}

// paged collects the pages of a list.
func paged[T any](c comparison, next func(last T) ([]T, error)) ([]T, error) {
	var all []T
	var last T
	for {
		page, err := next(last)
		if err != nil || len(page) == 0 {
			return all, err
		}
		if len(page) > c.n {
			return all, errors.New("a page is longer than asked for")
		}
		all, last = append(all, page...), page[len(page)-1]
		if len(all) > 1000 {
			return all, errors.New("the list doesn't end")
		}
	}
}

func (c comparison) repositories(ctx context.Context) {
	var every, full []index.Repository
	for _, r := range sorted(c.m) {
		want := r.Repository
		want.Manifests, want.Tags = len(r.manifests), len(r.tags)
		every = append(every, want)
		if len(r.manifests)+len(r.blobs) > 0 {
			full = append(full, want)
		}
		got, err := c.db.Repository(ctx, r.Name)
		same(c, "Repository "+r.Name, got, err, want)
	}
	for everyone, want := range map[bool][]index.Repository{true: every, false: full} {
		got, err := paged(c, func(last index.Repository) ([]index.Repository, error) {
			return c.db.Repositories(ctx, index.RepositoryQuery{Last: last.Name, N: c.n, All: everyone})
		})
		same(c, "Repositories", got, err, want)
	}
	_, err := c.db.Repository(ctx, "absent")
	found(c, "Repository absent", index.Repository{}, err, index.Repository{}, false)
}

// inOrder sorts what is sorted by name.
func inOrder[T any](list []T, order index.Order, updated func(T) time.Time) []T {
	if order != index.ByName {
		slices.SortStableFunc(list, func(a, b T) int { return updated(a).Compare(updated(b)) })
	}
	if order == index.TimeDescending {
		slices.Reverse(list)
	}
	return list
}

func (c comparison) tags(ctx context.Context, r *repository) {
	for _, order := range []index.Order{index.ByName, index.TimeAscending, index.TimeDescending} {
		for _, digest := range append(digests(), "") {
			var want []index.Tag
			for _, t := range sorted(r.tags) {
				if digest == "" || t.Digest == digest {
					want = append(want, t)
				}
			}
			got, err := paged(c, func(last index.Tag) ([]index.Tag, error) {
				return c.db.Tags(ctx, index.TagQuery{Repo: r.Name, Last: last.Name, N: c.n, Digest: digest, Order: order})
			})
			same(c, "Tags of "+r.Name, got, err, inOrder(want, order, func(t index.Tag) time.Time { return t.Updated }))
		}
	}
	for _, name := range tags() {
		got, err := c.db.Tag(ctx, r.Name, name)
		want, there := r.tags[name]
		found(c, "Tag "+name, got, err, want, there)
	}
}

// tagged is a manifest with the tags that point at it.
func (r *repository) tagged(m index.Manifest) index.Manifest {
	for _, t := range sorted(r.tags) {
		if t.Digest == m.Digest {
			m.Tags = append(m.Tags, t.Name)
		}
	}
	return m
}

func (c comparison) manifests(ctx context.Context, r *repository) {
	var every []index.Manifest
	for _, m := range sorted(r.manifests) {
		every = append(every, r.tagged(m))
	}
	for _, order := range []index.Order{index.ByName, index.TimeAscending, index.TimeDescending} {
		got, err := paged(c, func(last index.Manifest) ([]index.Manifest, error) {
			return c.db.Manifests(ctx, index.ManifestQuery{Repo: r.Name, Last: last.Digest.String(), N: c.n, Order: order})
		})
		same(c, "Manifests of "+r.Name, got, err, inOrder(slices.Clone(every), order, func(m index.Manifest) time.Time { return m.Updated }))
	}
	for _, digest := range append(digests(), "") {
		got, err := c.db.Manifest(ctx, r.Name, digest)
		want, there := r.manifests[digest]
		found(c, "Manifest", got, err, r.tagged(want), there)
		for _, artifactType := range types() {
			var want []index.Manifest
			for _, m := range every {
				if digest != "" && m.Subject == digest && (artifactType == "" || artifactType == m.ArtifactType) {
					want = append(want, m)
				}
			}
			got, err := paged(c, func(last index.Manifest) ([]index.Manifest, error) {
				return c.db.Referrers(ctx, r.Name, digest, artifactType, last.Digest, c.n)
			})
			same(c, "Referrers of "+r.Name, got, err, want)
		}
	}
}

// needed tells who needs a digest, by asking everybody.
func (r *repository) needed(digest oci.Digest) bool {
	for _, d := range r.deleted {
		if needs(digest, d.Blobs, d.Children) {
			return true
		}
	}
	return len(r.neededBy(digest)) > 0
}

// neededBy returns the manifests that need the digest, in order.
func (r *repository) neededBy(digest oci.Digest) (owners []oci.Digest) {
	for _, m := range r.manifests {
		if needs(digest, m.Blobs, m.Children) {
			owners = append(owners, m.Digest)
		}
	}
	slices.Sort(owners)
	return owners
}

func needs(digest oci.Digest, blobs []oci.Descriptor, children []oci.Digest) bool {
	return slices.Contains(children, digest) ||
		slices.ContainsFunc(blobs, func(b oci.Descriptor) bool { return b.Digest == digest })
}

func (c comparison) blobs(ctx context.Context, r *repository) {
	for _, digest := range digests() {
		got, err := c.db.Needed(ctx, r.Name, digest)
		same(c, "Needed", got, err, r.needed(digest))
		owners, err := c.db.NeededBy(ctx, r.Name, digest)
		slices.Sort(owners)
		same(c, "NeededBy", owners, err, r.neededBy(digest))

		repo, size, err := c.db.FindBlob(ctx, digest)
		want, there := "", false
		for _, r := range sorted(c.m) {
			if _, has := r.blobs[digest]; has && !there {
				want, there = r.Name, true
			}
		}
		found(c, "FindBlob", index.Blob{Repo: repo, Size: size}, err, index.Blob{Repo: want, Size: sizeOf(digest)}, there)
	}
	for _, before := range []time.Time{early(0), early(2), late()} {
		var want []index.Blob
		for _, b := range sorted(r.blobs) {
			if !r.needed(b.Digest) && (b.Touched.Before(before) || before.Equal(late())) {
				want = append(want, b)
			}
		}
		got, err := paged(c, func(last index.Blob) ([]index.Blob, error) {
			return c.db.Garbage(ctx, r.Name, before, last.Digest, c.n)
		})
		same(c, "Garbage of "+r.Name, got, err, want)
	}
}

func (c comparison) deleted(ctx context.Context) {
	for _, repo := range append(repositories(), "") {
		for _, before := range []time.Time{{}, early(2)} {
			var want []index.Deleted
			for _, r := range sorted(c.m) {
				for _, d := range sorted(r.deleted) {
					if (repo == "" || repo == r.Name) && (before.IsZero() || d.Deleted.Before(before)) {
						want = append(want, d)
					}
				}
			}
			got, err := paged(c, func(last index.Deleted) ([]index.Deleted, error) {
				token := last.Digest.String()
				if repo == "" && token != "" {
					token = last.Repo + "@" + token
				}
				return c.db.DeletedManifests(ctx, repo, before, token, c.n)
			})
			same(c, "DeletedManifests of "+repo, got, err, want)
		}
	}
}

func (c comparison) usage(ctx context.Context) {
	holders, manifests := map[oci.Digest]int{}, map[oci.Digest]bool{}
	for _, r := range c.m {
		for d := range r.blobs {
			holders[d]++
		}
		for d := range r.manifests {
			manifests[d] = true
		}
	}
	total := index.Usage{Manifests: len(manifests), Blobs: len(holders)}
	for d := range manifests {
		total.Size += sizeOf(d)
	}
	for d, n := range holders {
		total.Size += sizeOf(d)
		if n > 1 {
			total.Shared += sizeOf(d)
		}
	}
	got, err := c.db.TotalUsage(ctx)
	same(c, "TotalUsage", got, err, total)
	for _, r := range c.m {
		want := index.Usage{Manifests: len(r.manifests), Blobs: len(r.blobs)}
		for d := range r.manifests {
			want.Size += sizeOf(d)
		}
		for d := range r.blobs {
			want.Size += sizeOf(d)
			if holders[d] > 1 {
				want.Shared += sizeOf(d)
			}
		}
		got, err := c.db.Usage(ctx, r.Name)
		same(c, "Usage of "+r.Name, got, err, want)
	}
}

func (c comparison) dump(ctx context.Context) {
	var want, got []index.RepositoryContent
	for _, r := range sorted(c.m) {
		content := index.RepositoryContent{Repository: r.Repository, Tags: sorted(r.tags), Blobs: sorted(r.blobs), Deleted: sorted(r.deleted)}
		content.Updated = time.Time{}
		content.Repository.Manifests, content.Repository.Tags = len(r.manifests), len(r.tags)
		for _, m := range sorted(r.manifests) {
			content.Manifests = append(content.Manifests, r.tagged(m))
		}
		for i := range content.Blobs {
			content.Blobs[i].Touched = time.Time{}
		}
		want = append(want, content)
	}
	for content, err := range c.db.Dump(ctx) {
		if err != nil {
			c.t.Fatalf("Dump: %v", err)
		}
		got = append(got, content)
	}
	slices.SortFunc(want, func(a, b index.RepositoryContent) int { return cmp.Compare(a.Name, b.Name) })
	same(c, "Dump", got, nil, want)
}
