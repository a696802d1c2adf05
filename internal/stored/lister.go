package stored

import (
	"context"
	"errors"
	"iter"
	"time"

	"sluice/internal/index"
	"sluice/oci"
)

// pageSize is how many rows are asked of the index at a time.
const pageSize = 500

// Repositories implements oci.Lister.
func (r *Registry) Repositories(ctx context.Context, last string) iter.Seq2[string, error] {
	return names(last, func(last string) ([]index.Repository, error) {
		return r.RepositoriesPage(ctx, index.RepositoryQuery{Last: last, N: pageSize})
	}, func(row index.Repository) string { return row.Name })
}

// Tags implements oci.Lister.
func (r *Registry) Tags(ctx context.Context, repo, last string) iter.Seq2[string, error] {
	return names(last, func(last string) ([]index.Tag, error) {
		return r.TagsPage(ctx, index.TagQuery{Repo: repo, Last: last, N: pageSize})
	}, func(row index.Tag) string { return row.Name })
}

// Referrers implements oci.Lister.
func (r *Registry) Referrers(ctx context.Context, repo string, subject oci.Digest, artifactType string) iter.Seq2[oci.Descriptor, error] {
	return func(yield func(oci.Descriptor, error) bool) {
		if err := check(ctx, repo, subject); err != nil {
			yield(oci.Descriptor{}, err)
			return
		}
		for row, err := range r.referrers(ctx, repo, subject, artifactType) {
			if err == nil && !row.ListEnabled {
				continue
			}
			desc := manifestDescriptor(row)
			desc.ArtifactType, desc.Annotations = row.ArtifactType, row.Annotations
			if !yield(desc, err) || err != nil {
				return
			}
		}
	}
}

// referrers yields the rows of all referrers, those that aren't listed too.
func (r *Registry) referrers(ctx context.Context, repo string, subject oci.Digest, artifactType string) iter.Seq2[index.Manifest, error] {
	return pages("", func(last string) ([]index.Manifest, error) {
		return r.db.Referrers(ctx, repo, subject, artifactType, oci.Digest(last), pageSize)
	}, func(row index.Manifest) string { return row.Digest.String() })
}

// RepositoriesPage returns the listed repositories that hold something, as
// index.DB.Repositories does.
func (r *Registry) RepositoriesPage(ctx context.Context, q index.RepositoryQuery) ([]index.Repository, error) {
	return listed(q.Last, q.N, func(last string, n int) ([]index.Repository, error) {
		q.Last, q.N = last, n
		return r.db.Repositories(ctx, q)
	}, func(row index.Repository) string {
		return row.Name
	}, func(row index.Repository) (bool, error) {
		if !row.ListEnabled {
			return false, nil
		}
		return r.notDeleted(ctx, row)
	})
}

// ManifestsPage returns the listed manifests of a repository, as
// index.DB.Manifests does. Errors: ErrNameUnknown.
func (r *Registry) ManifestsPage(ctx context.Context, q index.ManifestQuery) ([]index.Manifest, error) {
	if err := r.checkExists(ctx, q.Repo); err != nil {
		return nil, err
	}
	return listed(q.Last, q.N, func(last string, n int) ([]index.Manifest, error) {
		q.Last, q.N = last, n
		return r.db.Manifests(ctx, q)
	}, func(row index.Manifest) string {
		return row.Digest.String()
	}, func(row index.Manifest) (bool, error) { return row.ListEnabled, nil })
}

// TagsPage returns the listed tags of a repository, as index.DB.Tags does.
// Errors: ErrNameUnknown.
func (r *Registry) TagsPage(ctx context.Context, q index.TagQuery) ([]index.Tag, error) {
	if err := r.checkExists(ctx, q.Repo); err != nil {
		return nil, err
	}
	return listed(q.Last, q.N, func(last string, n int) ([]index.Tag, error) {
		q.Last, q.N = last, n
		return r.db.Tags(ctx, q)
	}, func(row index.Tag) string {
		return row.Name
	}, func(row index.Tag) (bool, error) { return row.ListEnabled, nil })
}

// Repository returns what the index has of a repository. Errors: ErrNameUnknown.
func (r *Registry) Repository(ctx context.Context, repo string) (index.Repository, error) {
	if err := r.checkExists(ctx, repo); err != nil {
		return index.Repository{}, err
	}
	return r.db.Repository(ctx, repo)
}

// Manifest returns what the index has of a manifest. Errors: ErrNameUnknown,
// ErrManifestUnknown.
func (r *Registry) Manifest(ctx context.Context, repo string, digest oci.Digest) (index.Manifest, error) {
	if err := check(ctx, repo, digest); err != nil {
		return index.Manifest{}, err
	}
	row, err := r.db.Manifest(ctx, repo, digest)
	return row, r.missing(ctx, repo, err, manifestUnknown(repo, digest.String()))
}

// Tag returns what the index has of a tag. Errors: ErrNameUnknown,
// ErrManifestUnknown.
func (r *Registry) Tag(ctx context.Context, repo, tag string) (index.Tag, error) {
	if err := errors.Join(check(ctx, repo), oci.CheckTag(tag)); err != nil {
		return index.Tag{}, err
	}
	row, err := r.db.Tag(ctx, repo, tag)
	return row, r.missing(ctx, repo, err, tagUnknown(repo, tag))
}

// DeletedManifests returns the manifests that can be restored: see
// index.DB.DeletedManifests.
func (r *Registry) DeletedManifests(ctx context.Context, repo string, before time.Time, last string, n int) ([]index.Deleted, error) {
	if repo != "" {
		if err := check(ctx, repo); err != nil {
			return nil, err
		}
	}
	return r.db.DeletedManifests(ctx, repo, before, last, n)
}

// Usage returns the space that a repository takes. Errors: ErrNameUnknown.
func (r *Registry) Usage(ctx context.Context, repo string) (index.Usage, error) {
	if err := r.checkExists(ctx, repo); err != nil {
		return index.Usage{}, err
	}
	return r.db.Usage(ctx, repo)
}

// TotalUsage returns the space that all repositories take together.
func (r *Registry) TotalUsage(ctx context.Context) (index.Usage, error) {
	return r.db.TotalUsage(ctx)
}

func (r *Registry) checkExists(ctx context.Context, repo string) error {
	if err := check(ctx, repo); err != nil {
		return err
	}
	return r.exists(ctx, repo)
}

// listed returns n rows after last of a query from which some are hidden.
func listed[T any](last string, n int, query func(last string, n int) ([]T, error), name func(T) string, visible func(T) (bool, error)) ([]T, error) {
	var all []T
	for len(all) < n {
		page, err := query(last, n)
		if err != nil {
			return nil, err
		}
		for _, row := range page {
			ok, err := visible(row)
			if err != nil {
				return nil, err
			}
			if last = name(row); ok && len(all) < n {
				all = append(all, row)
			}
		}
		if len(page) < n {
			break
		}
	}
	return all, nil
}

// pages yields what comes after last, page by page.
func pages[T any](last string, page func(last string) ([]T, error), name func(T) string) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for {
			rows, err := page(last)
			if err != nil {
				var none T
				yield(none, err)
				return
			}
			for _, row := range rows {
				if !yield(row, nil) {
					return
				}
				last = name(row)
			}
			if len(rows) < pageSize {
				return
			}
		}
	}
}

// names is pages of which only the names matter.
func names[T any](last string, page func(last string) ([]T, error), name func(T) string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		for row, err := range pages(last, page, name) {
			if err != nil {
				yield("", err)
				return
			}
			if !yield(name(row), nil) {
				return
			}
		}
	}
}

// manifests yields the rows of all manifests of a repository.
func (r *Registry) manifests(ctx context.Context, repo string) iter.Seq2[index.Manifest, error] {
	return pages("", func(last string) ([]index.Manifest, error) {
		return r.db.Manifests(ctx, index.ManifestQuery{Repo: repo, Last: last, N: pageSize})
	}, func(row index.Manifest) string { return row.Digest.String() })
}

// tags yields the rows of all tags of a repository, or of those that point at a
// manifest.
func (r *Registry) tags(ctx context.Context, repo string, digest oci.Digest) iter.Seq2[index.Tag, error] {
	return pages("", func(last string) ([]index.Tag, error) {
		return r.db.Tags(ctx, index.TagQuery{Repo: repo, Last: last, N: pageSize, Digest: digest})
	}, func(row index.Tag) string { return row.Name })
}
