package stored

import (
	"context"
	"slices"
	"strings"

	"sluice/oci"
)

// walk yields the repositories that are in the tree. It looks at the directories
// of repositories only, never at what is inside their parts.
func (r *Registry) walk(ctx context.Context) func(yield func(string, error) bool) {
	return func(yield func(string, error) bool) {
		todo := []string{""}
		for len(todo) > 0 {
			dir := todo[len(todo)-1]
			todo = todo[:len(todo)-1]
			var inside []string
			isRepo := false
			for name, err := range r.store.List(ctx, root+dir, "") {
				if err != nil {
					yield("", err)
					return
				}
				name, isDir := strings.CutSuffix(strings.TrimPrefix(name, root+dir), "/")
				switch {
				case !isDir:
				case strings.HasPrefix(name, "_"):
					isRepo = true
				default:
					inside = append(inside, dir+name+"/")
				}
			}
			slices.Reverse(inside)
			todo = append(todo, inside...)
			name := strings.TrimSuffix(dir, "/")
			if isRepo && oci.CheckRepository(name) == nil && !yield(name, nil) {
				return
			}
		}
	}
}
