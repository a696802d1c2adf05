package stored

import (
	"container/heap"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"strings"

	"sluice/internal/storage"
	"sluice/oci"
)

// Repositories implements oci.Lister. It looks at the directories of the
// repositories only, never at what is inside _layers or _manifests.
//
// Names are visited in their order by a heap: what lies inside a name sorts
// after it, but not directly, as "a-b" is between "a" and "a/b".
func (r *Registry) Repositories(ctx context.Context, last string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		var todo names
		visit := func(dir string) (isRepo bool, err error) {
			for name, err := range r.store.List(ctx, root+dir, "") {
				if err != nil {
					return false, err
				}
				name = strings.TrimPrefix(name, root+dir)
				if strings.HasPrefix(name, "_") {
					isRepo = isRepo || name == layersPart || name == manifestsPart
				} else if child := dir + name; strings.HasSuffix(name, "/") && !(child < last && !strings.HasPrefix(last, child)) {
					heap.Push(&todo, strings.TrimSuffix(child, "/"))
				}
			}
			return isRepo, ctx.Err()
		}
		if _, err := visit(""); err != nil {
			yield("", err)
			return
		}
		for len(todo) > 0 {
			name := heap.Pop(&todo).(string)
			isRepo, err := visit(name + "/")
			if err != nil {
				yield("", err)
				return
			}
			if isRepo && name > last && oci.CheckRepository(name) == nil && !yield(name, nil) {
				return
			}
		}
	}
}

// names is a heap of strings: see container/heap.
type names []string

func (n names) Len() int           { return len(n) }
func (n names) Less(i, j int) bool { return n[i] < n[j] }
func (n names) Swap(i, j int)      { n[i], n[j] = n[j], n[i] }
func (n *names) Push(x any)        { *n = append(*n, x.(string)) }
func (n *names) Pop() any {
	x := (*n)[len(*n)-1]
	*n = (*n)[:len(*n)-1]
	return x
}

// Tags implements oci.Lister.
func (r *Registry) Tags(ctx context.Context, repo, last string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		if err := check(ctx, repo); err != nil {
			yield("", err)
			return
		}
		some, err := r.exists(ctx, repo)
		if err == nil && !some {
			err = oci.ErrNameUnknown.Withf("repository %s is unknown", repo)
		}
		if err != nil {
			yield("", err)
			return
		}
		dir := tagKey(repo, "")
		for name, err := range r.store.List(ctx, dir, dir+last) {
			if !yield(strings.TrimPrefix(name, dir), err) || err != nil {
				return
			}
		}
	}
}

// Referrers implements oci.Lister.
func (r *Registry) Referrers(ctx context.Context, repo string, subject oci.Digest, artifactType string) iter.Seq2[oci.Descriptor, error] {
	return func(yield func(oci.Descriptor, error) bool) {
		if err := check(ctx, repo, subject); err != nil {
			yield(oci.Descriptor{}, err)
			return
		}
		for key, err := range r.store.List(ctx, referrersKey(repo, subject), "") {
			var desc oci.Descriptor
			if err == nil {
				desc, err = r.referrer(ctx, repo, key)
			}
			if errors.Is(err, storage.ErrNotFound) {
				continue // deleted meanwhile, or a push that never finished
			}
			if err == nil && artifactType != "" && desc.ArtifactType != artifactType {
				continue
			}
			if !yield(desc, err) || err != nil {
				return
			}
		}
	}
}

// referrer reads a referrer link, or returns storage.ErrNotFound.
func (r *Registry) referrer(ctx context.Context, repo, key string) (oci.Descriptor, error) {
	link, err := storage.ReadAll(ctx, r.store, key, storage.MaxPut)
	if err != nil {
		return oci.Descriptor{}, err
	}
	var desc oci.Descriptor
	if err := json.Unmarshal(link, &desc); err != nil || !strings.HasSuffix(key, "/"+desc.Digest.String()) {
		return oci.Descriptor{}, fmt.Errorf("stored referrer link %s is damaged: push its manifest again", key)
	}
	_, err = r.store.Stat(ctx, manifestKey(repo, desc.Digest))
	return desc, err
}
