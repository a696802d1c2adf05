package ocimem

import (
	"context"
	"iter"
	"maps"
	"slices"

	"sluice/oci"
)

// Repositories implements oci.Lister.
func (r *Registry) Repositories(ctx context.Context, last string) iter.Seq2[string, error] {
	return list(ctx, func() ([]string, error) {
		r.mu.RLock()
		defer r.mu.RUnlock()
		return after(last, slices.Sorted(maps.Keys(r.repos))), nil
	})
}

// Tags implements oci.Lister.
func (r *Registry) Tags(ctx context.Context, repo, last string) iter.Seq2[string, error] {
	return list(ctx, func() ([]string, error) {
		r.mu.RLock()
		defer r.mu.RUnlock()
		repo, err := r.repo(repo)
		if err != nil {
			return nil, err
		}
		return after(last, slices.Sorted(maps.Keys(repo.tags))), nil
	})
}

// Referrers implements oci.Lister.
func (r *Registry) Referrers(ctx context.Context, repo string, subject oci.Digest, artifactType string) iter.Seq2[oci.Descriptor, error] {
	return list(ctx, func() ([]oci.Descriptor, error) {
		if err := oci.CheckRepository(repo); err != nil {
			return nil, err
		}
		if _, err := oci.ParseDigest(subject.String()); err != nil {
			return nil, err
		}
		r.mu.RLock()
		defer r.mu.RUnlock()
		repo, ok := r.repos[repo]
		if !ok {
			return nil, nil
		}
		var found []oci.Descriptor
		for _, digest := range slices.Sorted(maps.Keys(repo.referrers[subject])) {
			desc := repo.referrers[subject][digest]
			if artifactType == "" || desc.ArtifactType == artifactType {
				desc.Annotations = maps.Clone(desc.Annotations)
				found = append(found, desc)
			}
		}
		return found, nil
	})
}

// list yields what collect, called anew for every iteration, returns.
func list[T any](ctx context.Context, collect func() ([]T, error)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var none T
		if err := ctx.Err(); err != nil {
			yield(none, err)
			return
		}
		all, err := collect()
		if err != nil {
			yield(none, err)
			return
		}
		for _, item := range all {
			if !yield(item, nil) {
				return
			}
			if err := ctx.Err(); err != nil {
				yield(none, err)
				return
			}
		}
	}
}

// after returns what follows last in sorted names.
func after(last string, names []string) []string {
	i, found := slices.BinarySearch(names, last)
	if found {
		i++
	}
	return names[i:]
}
