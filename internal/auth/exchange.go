package auth

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
	"golang.org/x/time/rate"

	"sluice/oci"
)

// Issuer is an OpenID provider whose tokens are exchanged for the registry's.
type Issuer struct {
	// URL is the claim "iss" of its tokens, to the letter.
	URL string

	// Discovery is where its .well-known/openid-configuration lies. Empty:
	// at URL. Microsoft Entra's tokens of version 1.0 need it: they have
	// "https://sts.windows.net/TENANT/" and lie at
	// "https://login.microsoftonline.com/TENANT".
	Discovery string

	// Audience must be among the claim "aud". For another, list the issuer
	// again.
	Audience string

	// NameClaim is the claim that callers are named by. Empty: "sub".
	NameClaim string

	// Rules give rights to the tokens they match; the first one that does
	// decides. A token that matches none is refused.
	Rules []Rule

	// Transport carries requests to the issuer: for one whose certificate is
	// of a private authority. Nil: http.DefaultTransport.
	Transport http.RoundTripper
}

// Rule gives a scope map to those whose claims have these values: all of them,
// and of a claim that is a list at least one. A "*" at the end of a value stands
// for anything: "system:serviceaccount:team-a:*".
type Rule struct {
	Claims   map[string]string
	ScopeMap string
}

const (
	issuerTimeout = 10 * time.Second
	maxDocument   = 1 << 20 // bytes of what an issuer answers

	// issuerTTL is how long what an issuer published is believed without
	// asking again, so that a key it withdraws isn't trusted for ever.
	issuerTTL = time.Hour

	// issuerRetry is how long an issuer that didn't answer is left alone.
	issuerRetry = 5 * time.Second
)

// issuer is an Issuer, and what is known of its keys.
type issuer struct {
	Issuer
	now    func() time.Time
	client *http.Client

	mu       sync.Mutex            // held while the issuer is asked what it is
	verifier *oidc.IDTokenVerifier // guarded by mu; nil until it answered
	fetched  time.Time             // guarded by mu
	tried    time.Time             // guarded by mu
}

func newIssuer(i Issuer, now func() time.Time) (*issuer, error) {
	i.NameClaim = cmp.Or(i.NameClaim, "sub")
	i.Discovery = cmp.Or(i.Discovery, i.URL)
	for _, s := range []string{i.URL, i.Discovery} {
		if u, err := url.Parse(s); err != nil || u.Scheme != "https" && (u.Scheme != "http" || !isLoopback(u.Hostname())) {
			return nil, fmt.Errorf("issuer %q: write https://…: whoever is between here and there could sign in as anybody", s)
		}
	}
	if i.Audience == "" {
		return nil, fmt.Errorf("issuer %s: say which audience its tokens must have, so that those meant for others can't be used here", i.URL)
	}
	if len(i.Rules) == 0 {
		return nil, fmt.Errorf("issuer %s: give it a rule, or nobody can use its tokens", i.URL)
	}
	for n, rule := range i.Rules {
		if len(rule.Claims) == 0 || rule.ScopeMap == "" {
			return nil, fmt.Errorf("issuer %s: rule %d needs claims and a scope map", i.URL, n+1)
		}
		for claim, value := range rule.Claims {
			if value == "" || strings.Contains(strings.TrimSuffix(value, "*"), "*") {
				return nil, fmt.Errorf("issuer %s: rule %d: claim %s: %q: write a value, with * only at its end", i.URL, n+1, claim, value)
			}
		}
	}
	return &issuer{Issuer: i, now: now, client: &http.Client{
		Timeout: issuerTimeout,
		// A token of a key that isn't known makes the library fetch the
		// keys again, whoever made it up.
		Transport: &modest{next: i.Transport, limit: rate.NewLimiter(rate.Every(2*time.Second), 10), now: now},
	}}, nil
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// modest limits how often an issuer is asked, and how much it may answer.
type modest struct {
	next  http.RoundTripper
	limit *rate.Limiter
	now   func() time.Time
}

// RoundTrip implements http.RoundTripper.
func (m *modest) RoundTrip(r *http.Request) (*http.Response, error) {
	if !m.limit.AllowN(m.now(), 1) {
		return nil, errors.New("the issuer was asked too often in the last seconds")
	}
	next := m.next
	if next == nil {
		next = http.DefaultTransport
	}
	resp, err := next.RoundTrip(r)
	if err == nil {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(resp.Body, maxDocument), resp.Body}
	}
	return resp, err
}

var errIssuer = errors.New("the issuer of the token can't be asked for its keys")

// keys returns what verifies the issuer's tokens. Errors: errIssuer.
func (i *issuer) keys(ctx context.Context) (*oidc.IDTokenVerifier, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	now := i.now()
	fresh := i.verifier != nil && now.Sub(i.fetched) < issuerTTL
	if fresh || !i.tried.IsZero() && now.Sub(i.tried) < issuerRetry {
		if i.verifier == nil {
			return nil, errIssuer
		}
		return i.verifier, nil
	}
	i.tried = now
	// Not for as long as this caller waits: the answer is everybody's.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), issuerTimeout)
	defer cancel()
	ctx = oidc.ClientContext(oidc.InsecureIssuerURLContext(ctx, i.URL), i.client) // "insecure": it may lie elsewhere than at its URL
	provider, err := oidc.NewProvider(ctx, i.Discovery)
	if err != nil {
		if i.verifier != nil && now.Sub(i.fetched) < 24*issuerTTL {
			return i.verifier, nil
		}
		return nil, fmt.Errorf("%w: %s: %s", errIssuer, i.Discovery, clip(err.Error()))
	}
	i.verifier, i.fetched = provider.Verifier(&oidc.Config{ClientID: i.Audience, Now: i.now}), now
	return i.verifier, nil
}

// rule returns the scope map of a token's claims.
func (i *issuer) rule(claims map[string]any) (string, bool) {
	for _, rule := range i.Rules {
		matches := true
		for claim, want := range rule.Claims {
			matches = matches && slices.ContainsFunc(values(claims[claim]), func(v string) bool { return matchesValue(want, v) })
		}
		if matches {
			return rule.ScopeMap, true
		}
	}
	return "", false
}

func matchesValue(want, value string) bool {
	if prefix, ok := strings.CutSuffix(want, "*"); ok {
		return strings.HasPrefix(value, prefix)
	}
	return want == value
}

// values returns the strings that a claim has.
func values(claim any) []string {
	switch v := claim.(type) {
	case string:
		return []string{v}
	case []any:
		var all []string
		for _, e := range v {
			if s, ok := e.(string); ok {
				all = append(all, s)
			}
		}
		return all
	}
	return nil
}

// federates reports whether the configuration still lets an issuer give a map.
func (a *Authority) federates(issuerURL, scopeMap string) bool {
	return slices.ContainsFunc(a.issuers, func(i *issuer) bool {
		return i.URL == issuerURL && slices.ContainsFunc(i.Rules, func(r Rule) bool { return r.ScopeMap == scopeMap })
	})
}

// exchange is POST /oauth2/exchange: a token of an issuer for a refresh token of
// ours. The grant types that Azure calls deprecated are taken if an access token
// comes with them: an issuer's refresh token is of no use here.
func (a *Authority) exchange(w http.ResponseWriter, r *http.Request) (any, error) {
	form, err := readForm(w, r)
	if err != nil {
		return nil, err
	}
	if err := a.checkService(r, form); err != nil {
		return nil, err
	}
	switch form.Get("grant_type") {
	case "access_token", "access_token_refresh_token", "refresh_token":
	default:
		return nil, badRequest(oauthUnsupported, "grant_type is none of access_token, access_token_refresh_token, refresh_token")
	}
	token := form.Get("access_token") // which says of which tenant it is
	if token == "" || len(token) > maxToken {
		return nil, badRequest(oauthInvalidRequest, "access_token is missing or too long")
	}
	f, err := a.federate(r, token)
	if err != nil {
		return nil, err
	}
	g, err := a.grantsOf(r.Context(), f.principal.ScopeMap)
	if err != nil {
		return nil, err
	}
	refresh, _, err := a.issue(r.Context(), claims{
		Subject: f.name, Audience: a.service(r), Permissions: permissionsOf(g), GrantType: "refresh_token", Tenant: f.tenant, Principal: f.principal,
	}, a.opts.RefreshLifetime, time.Time{})
	return tokenAnswer{RefreshToken: refresh}, err
}

// foreign is whose a token of an issuer is.
type foreign struct {
	name, tenant string
	principal    principal
}

// federate verifies a token of an issuer, within the limits of attempts.
func (a *Authority) federate(r *http.Request, token string) (foreign, error) {
	address := addressGroup(a.opts.ClientAddress(r))
	if err := a.attempts.admit(address, ""); err != nil {
		return foreign{}, err
	}
	f, err := a.verifyForeign(r.Context(), token)
	if err == nil || errors.Is(err, errIssuer) {
		a.attempts.undecided(address, "")
	}
	switch {
	case errors.Is(err, errIssuer):
		a.log.Error("token exchange", "error", err)
		return foreign{}, &oauthError{
			status: http.StatusServiceUnavailable, code: oauthUnavailable, description: errIssuer.Error(),
			answer: &oci.Error{Code: "UNAVAILABLE"}, retryAfter: int(issuerRetry / time.Second),
		}
	case err != nil:
		a.log.Warn("token exchange refused", "remote", address, "error", clip(err.Error()))
		return foreign{}, unauthorized(errToken)
	}
	return f, nil
}

func (a *Authority) verifyForeign(ctx context.Context, token string) (foreign, error) {
	iss, err := issuerOf(token)
	if err != nil {
		return foreign{}, err
	}
	err = errors.New("its issuer is not configured")
	for _, i := range a.issuers {
		if i.URL != iss {
			continue
		}
		var verifier *oidc.IDTokenVerifier
		if verifier, err = i.keys(ctx); err != nil {
			continue
		}
		var verified *oidc.IDToken
		if verified, err = verifier.Verify(ctx, token); err != nil {
			continue
		}
		var all map[string]any
		if err = verified.Claims(&all); err != nil {
			continue
		}
		names := values(all[i.NameClaim])
		scopeMap, ok := i.rule(all)
		if !ok || len(names) != 1 || names[0] == "" || len(names[0]) > maxScope {
			err = fmt.Errorf("no rule of issuer %s matches, or claim %s is missing", i.URL, i.NameClaim)
			continue
		}
		tenant, _ := all["tid"].(string) // Entra's
		return foreign{names[0], tenant, principal{Kind: KindFederated, ScopeMap: scopeMap, Issuer: i.URL}}, nil
	}
	return foreign{}, err
}

// issuerOf reads the claim "iss" before anything is verified.
func issuerOf(token string) (string, error) {
	jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{
		jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512, jose.ES256, jose.ES384, jose.ES512, jose.EdDSA,
	})
	if err != nil {
		return "", errors.New("it is not a signed JWT")
	}
	var c struct {
		Issuer string `json:"iss"`
	}
	if err := json.Unmarshal(jws.UnsafePayloadWithoutVerification(), &c); err != nil {
		return "", errors.New("its claims are not JSON")
	}
	return c.Issuer, nil
}

// permissionsOf tells a refresh token's owner roughly what they have.
func permissionsOf(g *grants) *permissions {
	p := &permissions{Actions: []string{}, NotActions: []string{}}
	var set actionSet
	if g != nil {
		for _, of := range []map[string]actionSet{g.exact, g.below} {
			for _, s := range of {
				set |= s
			}
		}
	}
	for action, bit := range map[string]actionSet{"read": canPull, "write": canPush, "delete": canDelete} {
		if set&bit != 0 {
			p.Actions = append(p.Actions, action)
		}
	}
	slices.Sort(p.Actions)
	return p
}
