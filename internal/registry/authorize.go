package registry

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"

	"sluice/internal/auth"
	"sluice/oci"
)

// Authorizer tells who calls. An *auth.Authority is one.
type Authorizer interface {
	// Authenticate returns who sent a request: the anonymous Caller if it has
	// no credentials. Errors are oci.ErrUnauthorized for credentials that are
	// not good, and oci.ErrTooManyRequests when there were too many of those.
	Authenticate(r *http.Request) (auth.Caller, error)

	// Challenge returns a WWW-Authenticate header that tells the client which
	// access to ask for, and where.
	Challenge(r *http.Request, need ...auth.Access) string
}

// CallerOf returns who sent the request that a context belongs to. Without a
// front, or when the credentials were not good, that is nobody: Authorize
// tells the difference.
func CallerOf(ctx context.Context) auth.Caller {
	if c := conversationOf(ctx); c != nil {
		return c.caller
	}
	return auth.Caller{}
}

// Authorize returns nil if the caller of a request has all the access needed,
// and otherwise the error to answer: 401 with a challenge where other
// credentials could help (none were sent, wrong ones, or a token without that
// access), 403 to an account that simply may not. Without needs, every caller
// with good credentials will do. A nil authorizer allows everything.
//
// The answer doesn't depend on whether what is asked for exists, and must be
// given before that is looked up. The request must have come through Wrap with
// the same authorizer.
func Authorize(r *http.Request, authorizer Authorizer, need ...auth.Access) error {
	return authorize(r, authorizer, need, need)
}

// authorize is Authorize with a challenge for more than is needed.
func authorize(r *http.Request, authorizer Authorizer, need, ask []auth.Access) error {
	if authorizer == nil {
		return nil
	}
	if c := conversationOf(r.Context()); c != nil && c.authErr != nil {
		if errors.Is(c.authErr, oci.ErrUnauthorized) {
			return unauthorized(r, authorizer, c.authErr, ask)
		}
		return c.authErr
	}
	caller := CallerOf(r.Context())
	lacks := slices.IndexFunc(need, func(a auth.Access) bool { return !caller.Allows(r.Context(), a) })
	switch {
	case lacks < 0 && (len(need) > 0 || caller.Presented):
		return nil
	case !caller.Presented:
		return unauthorized(r, authorizer, oci.ErrUnauthorized, ask)
	case scheme(r) == "bearer":
		return unauthorized(r, authorizer, oci.ErrUnauthorized.Withf("the token is not good for %v", need[lacks]), ask)
	}
	return oci.ErrDenied.Withf("%s has no access %v", caller.Name, need[lacks])
}

// unauthorized is the answer to a caller who should come again with other
// credentials.
func unauthorized(r *http.Request, authorizer Authorizer, reason error, ask []auth.Access) error {
	var answer *oci.Error
	if !errors.As(reason, &answer) {
		answer = oci.ErrUnauthorized
	}
	return &StatusError{
		Status: http.StatusUnauthorized,
		Header: http.Header{"Www-Authenticate": {authorizer.Challenge(r, ask...)}},
		Err:    answer,
	}
}

// scheme returns the lower-case authentication scheme of a request, "" if it
// has none.
func scheme(r *http.Request) string {
	s, _, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	return strings.ToLower(s)
}

// authorize checks that a request's caller may do what it asks for.
func (h *Handler) authorize(r *http.Request, req Request, action string) error {
	if h.opts.Authorizer == nil {
		return nil
	}
	switch {
	case req.Kind == kindPing:
		return Authorize(r, h.opts.Authorizer)
	case req.Kind == kindCatalog:
		return Authorize(r, h.opts.Authorizer, auth.Catalog())
	case action != auth.ActionPush:
		return Authorize(r, h.opts.Authorizer, auth.ToRepository(req.Repository, action))
	}
	// A client that pushes also looks at what is there, and has one token.
	ask := []auth.Access{auth.ToRepository(req.Repository, auth.ActionPull, auth.ActionPush)}
	if from := req.Query.Get("from"); req.Kind == kindUploadStart && from != "" && oci.CheckRepository(from) == nil {
		ask = append(ask, auth.ToRepository(from, auth.ActionPull))
	}
	return authorize(r, h.opts.Authorizer, []auth.Access{auth.ToRepository(req.Repository, action)}, ask)
}

// mayPull reports whether a caller may read a repository besides the one that
// the request is about.
func (h *Handler) mayPull(ctx context.Context, repo string) bool {
	return h.opts.Authorizer == nil || CallerOf(ctx).Allows(ctx, auth.ToRepository(repo, auth.ActionPull))
}
