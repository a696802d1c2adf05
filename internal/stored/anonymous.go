package stored

import "context"

// AnonymousPull reports whether everybody may read a repository, by its
// attribute AnonymousPullEnabled. Another replica's change of that is heeded
// within a second. A repository that can't be looked up is nobody's.
func (r *Registry) AnonymousPull(ctx context.Context, repo string) bool {
	a, err := r.attributes(ctx, repo)
	return err == nil && a.AnonymousPullEnabled
}
