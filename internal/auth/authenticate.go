package auth

import (
	"context"
	"errors"
	"net/http"
	"regexp"
	"strings"
	"time"

	"sluice/oci"
)

// nullGUID is the user name that says that the password is a refresh token.
const nullGUID = "00000000-0000-0000-0000-000000000000"

// Authenticate tells who makes a request for a resource of the registry, by its
// header Authorization: Basic with an account's password or with the null GUID
// and a refresh token, Bearer with an access token. Without the header it is
// anonymous, which is no error.
//
// Errors: oci.ErrUnauthorized for credentials that aren't good, *LimitError
// (which is oci.ErrTooManyRequests) after too many of them; others if the
// storage doesn't answer.
func (a *Authority) Authenticate(r *http.Request) (Caller, error) {
	header := r.Header.Get("Authorization")
	if header == "" {
		return Caller{Kind: KindAnonymous, public: a.opts.AnonymousPull}, nil
	}
	if token, ok := bearer(header); ok {
		return a.authenticateToken(r, token)
	}
	user, password, ok := r.BasicAuth()
	if !ok {
		return Caller{}, oci.ErrUnauthorized.Withf("authentication required: neither Basic nor Bearer credentials")
	}
	c, _, err := a.signIn(r, user, password)
	return c, err
}

func bearer(header string) (string, bool) {
	scheme, token, ok := strings.Cut(header, " ")
	return strings.TrimSpace(token), ok && strings.EqualFold(scheme, "Bearer")
}

func (a *Authority) authenticateToken(r *http.Request, token string) (Caller, error) {
	c, err := a.verify(r.Context(), token, a.service(r))
	if err == nil && c.Access == nil {
		err = errToken // it is a refresh token
	}
	if err != nil {
		return Caller{}, unauthorized(err)
	}
	caller, err := a.callerOf(r.Context(), c.Subject, c.Principal)
	if err != nil {
		return Caller{}, unauthorized(err)
	}
	caller.limit = c.Access
	return caller, nil
}

// unauthorized puts errToken into the protocol's form.
func unauthorized(err error) error {
	if errors.Is(err, errToken) {
		return oci.ErrUnauthorized.Withf("authentication required: %v", err)
	}
	return err
}

// signIn checks a user name and a password, and returns also when the password
// expires, or zero. Its error is errSignIn whatever was wrong.
func (a *Authority) signIn(r *http.Request, user, password string) (Caller, time.Time, error) {
	if user == nullGUID {
		c, err := a.refresh(r, password)
		if errors.Is(err, errToken) {
			err = errSignIn
		}
		return c, time.Time{}, err
	}
	ctx, isAdmin := r.Context(), a.opts.Admin.Enabled && user == a.opts.Admin.Name
	account, err := a.account(ctx, user, isAdmin)
	if err != nil {
		return Caller{}, time.Time{}, err
	}
	g := guess{address: addressGroup(a.opts.ClientAddress(r)), account: clip(user), password: password}
	if account != nil {
		g.hashes = account.Hashes
	}
	found, err := a.passwords.match(ctx, g, a.attempts)
	if err != nil {
		return Caller{}, time.Time{}, err
	}
	if found < 0 || account.Status != Enabled || a.expired(account.Passwords[found]) {
		// Not the name: people type passwords there by mistake.
		a.log.Warn("sign-in refused", "remote", g.address, "account", knownName(account), "right password", found >= 0)
		return Caller{}, time.Time{}, errSignIn
	}
	p := principal{Kind: KindToken, Created: account.Created.UnixNano()}
	if isAdmin {
		p = principal{Kind: KindAdmin}
	}
	c, err := a.callerOf(ctx, user, p)
	if errors.Is(err, errToken) { // changed since we looked
		err = errSignIn
	}
	return c, account.Passwords[found].Expiry, err
}

// account returns the account of a user name, or nil if there is none.
func (a *Authority) account(ctx context.Context, user string, isAdmin bool) (*accountRecord, error) {
	var r *accountRecord
	var err error
	switch {
	case isAdmin:
		r, err = a.admin.get(ctx, adminObject)
	case namePattern.MatchString(user):
		r, err = a.tokens.get(ctx, user)
	}
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	return r, err
}

func knownName(r *accountRecord) string {
	if r == nil {
		return ""
	}
	return r.Name
}

func (a *Authority) expired(p Password) bool {
	return !p.Expiry.IsZero() && !a.now().Before(p.Expiry)
}

// refresh returns the caller of a refresh token; what isn't one is errToken.
func (a *Authority) refresh(r *http.Request, token string) (Caller, error) {
	c, err := a.verify(r.Context(), token, a.service(r))
	if err != nil {
		return Caller{}, err
	}
	if c.Permissions == nil || c.Access != nil {
		return Caller{}, errToken
	}
	return a.callerOf(r.Context(), c.Subject, c.Principal)
}

// Challenge returns the value of the header WWW-Authenticate for a request that
// was refused: where a token can be had that gives the access needed (RFC 6750,
// section 3; https://distribution.github.io/distribution/spec/auth/token/). To a
// request that came with a token it says what was wrong with that.
func (a *Authority) Challenge(r *http.Request, need ...Access) string {
	scheme, host := a.origin(r)
	challenge := `Bearer realm="` + scheme + "://" + host + `/oauth2/token",service="` + a.service(r) + `"`
	if len(need) > 0 {
		challenge += `,scope="` + FormatScopes(need) + `"`
	}
	if token, ok := bearer(r.Header.Get("Authorization")); ok {
		if _, err := a.authenticateToken(r, token); err != nil {
			return challenge + `,error="invalid_token"`
		}
		return challenge + `,error="insufficient_scope"`
	}
	return challenge
}

// hostPattern is what can stand in a quoted string of a header without harm.
var hostPattern = regexp.MustCompile(`^[A-Za-z0-9._:\[\]-]{1,255}$`)

// origin returns scheme and host (with the path of ExternalURL, if it has one)
// by which the client reaches the registry.
func (a *Authority) origin(r *http.Request) (scheme, host string) {
	if a.external != nil {
		return a.external.Scheme, a.external.Host + strings.TrimSuffix(a.external.EscapedPath(), "/")
	}
	scheme, host = "http", r.Host
	if r.TLS != nil {
		scheme = "https"
	}
	if proto := r.Header.Get("X-Forwarded-Proto"); a.opts.TrustForwarded && (proto == "http" || proto == "https") {
		scheme = proto
	}
	if !hostPattern.MatchString(host) {
		host = "localhost" // whoever sends such a Host gets nothing that works
	}
	return scheme, host
}

// service is the registry's name for this request.
func (a *Authority) service(r *http.Request) string {
	switch {
	case a.opts.Service != "":
		return a.opts.Service
	case a.external != nil:
		return a.external.Host
	}
	_, host := a.origin(r)
	return host
}
