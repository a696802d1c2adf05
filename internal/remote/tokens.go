package remote

import (
	"context"
	"sync"
	"time"

	"oras.land/oras-go/v2/errdef"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// tokens is what a Registry says in its Authorization headers: the auth client's
// cache. Unlike the library's own, it fetches a token once for all who wait for
// it, also when the first of them gives up; doesn't fetch another one for those
// who were refused with the token before it; and can forget.
type tokens struct {
	patience time.Duration // bounds a fetch

	mu      sync.Mutex // guards what follows; nothing is waited for under it
	schemes map[string]auth.Scheme
	kept    map[tokenKey]*token
}

var _ auth.Cache = (*tokens)(nil)

// tokenKey names a token: the host it is for, and the scopes.
type tokenKey struct {
	host   string
	scheme auth.Scheme
	scopes string
}

// token is one that was fetched or is being fetched.
type token struct {
	done chan struct{} // closed when what follows is set
	text string
	err  error
	from Credential // what it was got with, if got is set
	got  bool
}

func newTokens(patience time.Duration) *tokens {
	return &tokens{patience: patience, schemes: make(map[string]auth.Scheme), kept: make(map[tokenKey]*token)}
}

// GetScheme implements auth.Cache.
func (s *tokens) GetScheme(_ context.Context, host string) (auth.Scheme, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if scheme, ok := s.schemes[host]; ok {
		return scheme, nil
	}
	return auth.SchemeUnknown, errdef.ErrNotFound
}

// GetToken implements auth.Cache.
func (s *tokens) GetToken(ctx context.Context, host string, scheme auth.Scheme, scopes string) (string, error) {
	s.mu.Lock()
	t := s.kept[tokenKey{host, scheme, scopes}]
	s.mu.Unlock()
	if t == nil {
		return "", errdef.ErrNotFound
	}
	select {
	case <-t.done:
	default: // Set will wait for it
		return "", errdef.ErrNotFound
	}
	loginOf(ctx).use(t, false)
	return t.text, nil
}

// Set implements auth.Cache: it is called by those who were refused with the
// token that GetToken returned, or had none.
func (s *tokens) Set(ctx context.Context, host string, scheme auth.Scheme, scopes string, fetch func(context.Context) (string, error)) (string, error) {
	key := tokenKey{host, scheme, scopes}
	l := loginOf(ctx)
	s.mu.Lock()
	t := s.kept[key]
	if t == nil || l.has(t) {
		t = &token{done: make(chan struct{})}
		s.kept[key] = t
		// Not in the name of this caller, who may give up: others wait too.
		go s.fetch(context.WithoutCancel(ctx), key, t, fetch)
	}
	s.mu.Unlock()
	select {
	case <-ctx.Done():
		return "", ctx.Err()
	case <-t.done:
	}
	l.use(t, true)
	return t.text, t.err
}

// fetch ends within the patience of s.
func (s *tokens) fetch(ctx context.Context, key tokenKey, t *token, fetch func(context.Context) (string, error)) {
	ctx, cancel := context.WithTimeoutCause(ctx, s.patience, &slowError{s.patience})
	defer cancel()
	defer close(t.done)
	t.text, t.err = fetch(context.WithValue(ctx, fetchedKey{}, t))
	if t.err != nil {
		if ctx.Err() != nil {
			t.err = context.Cause(ctx)
		}
		s.forget(t)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.schemes[key.host] = key.scheme
}

// forget makes the next request that wants a token get another one than t.
func (s *tokens) forget(t *token) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for key, kept := range s.kept {
		if kept == t {
			delete(s.kept, key)
		}
	}
}

// fetchedKey is the context key of the token that is being fetched.
type fetchedKey struct{}

// gotWith notes, in the token that is being fetched, which credential it is got
// with.
func gotWith(ctx context.Context, c Credential) {
	if t, ok := ctx.Value(fetchedKey{}).(*token); ok {
		t.from, t.got = c, true
	}
}

// login is what one attempt of a request said of itself.
type login struct {
	mu    sync.Mutex
	token *token // the last one; nil for none
	fresh bool   // it was fetched after the attempt had begun
}

// loginKey is the context key of a login.
type loginKey struct{}

// loginOf returns the login of a request's context.
func loginOf(ctx context.Context) *login {
	if l, ok := ctx.Value(loginKey{}).(*login); ok {
		return l
	}
	return new(login)
}

func (l *login) use(t *token, fresh bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.token, l.fresh = t, fresh
}

func (l *login) has(t *token) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.token == t
}

func (l *login) last() (t *token, fresh bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.token, l.fresh
}
