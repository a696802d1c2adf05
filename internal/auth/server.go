package auth

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"sluice/oci"
)

// maxForm bounds the body of a POST, in bytes: two tokens, and scopes.
const maxForm = 2*maxToken + 64<<10

// The errors of OAuth 2 (RFC 6749, section 5.2).
const (
	oauthInvalidRequest = "invalid_request"
	oauthInvalidGrant   = "invalid_grant"
	oauthInvalidScope   = "invalid_scope"
	oauthUnsupported    = "unsupported_grant_type"
	oauthUnavailable    = "temporarily_unavailable"
	oauthServer         = "server_error"
)

// oauthError is an error of the token server in both forms: OAuth 2's, and that
// of the registry protocol, which docker shows.
type oauthError struct {
	status      int
	code        string // OAuth 2's
	answer      *oci.Error
	description string
	retryAfter  int // seconds; 0: not said
}

func (e *oauthError) Error() string { return e.description }

func badRequest(code, format string, args ...any) error {
	description := fmt.Sprintf(format, args...)
	return &oauthError{status: http.StatusBadRequest, code: code, description: description, answer: &oci.Error{Code: "BAD_REQUEST", Message: description}}
}

// tokenAnswer is what the token server answers. Docker's clients want token or
// access_token; the rest is for those who look (RFC 6749, section 5.1).
type tokenAnswer struct {
	AccessToken  string  `json:"access_token,omitempty"`
	Token        string  `json:"token,omitempty"`
	RefreshToken string  `json:"refresh_token,omitempty"`
	TokenType    string  `json:"token_type,omitempty"`
	ExpiresIn    int     `json:"expires_in,omitempty"`
	IssuedAt     string  `json:"issued_at,omitempty"`
	Scope        *string `json:"scope,omitempty"`
}

// ServeHTTP serves /oauth2/token, /oauth2/exchange and /oauth2/keys.
func (a *Authority) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Content-Type-Options", "nosniff")
	// RFC 6749, section 5.1.
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Pragma", "no-cache")
	answer, err := a.serve(w, r)
	if err != nil {
		a.writeError(w, r, err)
		return
	}
	writeJSON(w, r, http.StatusOK, answer)
}

func (a *Authority) serve(w http.ResponseWriter, r *http.Request) (any, error) {
	type endpoint struct{ path, method string }
	switch (endpoint{r.URL.Path, r.Method}) {
	case endpoint{"/oauth2/token", http.MethodGet}:
		return a.getToken(r)
	case endpoint{"/oauth2/token", http.MethodPost}:
		return a.postToken(w, r)
	case endpoint{"/oauth2/exchange", http.MethodPost}:
		return a.exchange(w, r)
	case endpoint{"/oauth2/keys", http.MethodGet}, endpoint{"/oauth2/keys", http.MethodHead}:
		keys, err := a.keys.published(r.Context())
		if err == nil {
			w.Header().Del("Pragma")
			w.Header().Set("Cache-Control", "public, max-age=300")
		}
		return keys, err
	}
	var allow string
	switch r.URL.Path {
	case "/oauth2/token":
		allow = "GET, POST"
	case "/oauth2/exchange":
		allow = "POST"
	case "/oauth2/keys":
		allow = "GET, HEAD"
	default:
		return nil, &oauthError{status: http.StatusNotFound, code: oauthInvalidRequest, description: "no such endpoint", answer: &oci.Error{Code: "NOT_FOUND", Message: "no such endpoint"}}
	}
	w.Header().Set("Allow", allow)
	description := "method is not one of " + allow
	return nil, &oauthError{status: http.StatusMethodNotAllowed, code: oauthInvalidRequest, description: description, answer: oci.ErrUnsupported.Withf("%s", description)}
}

// getToken is Docker's way (https://distribution.github.io/distribution/spec/auth/token/):
// Basic credentials or none, and an access token for whatever they may have.
func (a *Authority) getToken(r *http.Request) (any, error) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, badRequest(oauthInvalidRequest, "the query is malformed")
	}
	scopes, err := a.parseRequest(r, query)
	if err != nil {
		return nil, err
	}
	if r.Header.Get("Authorization") == "" {
		return a.anonymousToken(r, scopes)
	}
	user, password, ok := r.BasicAuth()
	if !ok {
		return nil, oci.ErrUnauthorized.Withf("authentication required: neither Basic credentials nor none")
	}
	caller, limit, err := a.signIn(r, user, password)
	if err != nil {
		return nil, err
	}
	grant := "password"
	if user == nullGUID {
		grant = "refresh_token"
	}
	return a.accessToken(r, caller, grant, scopes, limit)
}

// anonymousToken gives one who doesn't say who they are a token for what is
// open to all. When that is nothing of what they want, they are told to sign
// in, rather than with their next request.
func (a *Authority) anonymousToken(r *http.Request, scopes []Access) (any, error) {
	caller := Caller{Kind: KindAnonymous, principal: principal{Kind: KindAnonymous}, public: a.opts.AnonymousPull}
	if caller.public == nil || len(scopes) > 0 && len(caller.granted(r.Context(), scopes)) == 0 {
		return nil, oci.ErrUnauthorized.Withf("authentication required: sign in")
	}
	return a.accessToken(r, caller, "anonymous", scopes, time.Time{})
}

// postToken is OAuth 2's way.
func (a *Authority) postToken(w http.ResponseWriter, r *http.Request) (any, error) {
	form, err := readForm(w, r)
	if err != nil {
		return nil, err
	}
	scopes, err := a.parseRequest(r, form)
	if err != nil {
		return nil, err
	}
	var caller Caller
	var limit time.Time
	grant := form.Get("grant_type")
	switch grant {
	case "password":
		caller, limit, err = a.signIn(r, form.Get("username"), form.Get("password"))
	case "refresh_token":
		caller, err = a.refresh(r, form.Get("refresh_token"))
	default:
		return nil, badRequest(oauthUnsupported, "grant_type is neither password nor refresh_token")
	}
	if err != nil {
		return nil, unauthorized(err)
	}
	return a.accessToken(r, caller, grant, scopes, limit)
}

// accessToken issues a token for what of the scopes the caller gets.
func (a *Authority) accessToken(r *http.Request, caller Caller, grant string, scopes []Access, limit time.Time) (any, error) {
	granted := caller.granted(r.Context(), scopes)
	token, lifetime, err := a.issue(r.Context(), claims{
		Subject: caller.Name, Audience: a.service(r), Access: &granted, GrantType: grant, Principal: caller.principal,
	}, a.opts.AccessLifetime, limit)
	if err != nil {
		return nil, err
	}
	scope := FormatScopes(granted)
	return tokenAnswer{
		AccessToken: token, Token: token, TokenType: "Bearer", Scope: &scope,
		ExpiresIn: int(lifetime / time.Second), IssuedAt: a.now().UTC().Format(time.RFC3339),
	}, nil
}

// parseRequest checks what all ways have in common.
func (a *Authority) parseRequest(r *http.Request, values url.Values) ([]Access, error) {
	if err := a.checkService(r, values); err != nil {
		return nil, err
	}
	scopes, err := parseScopes(values["scope"])
	if err != nil {
		return nil, badRequest(oauthInvalidScope, "%v", err)
	}
	return scopes, nil
}

func (a *Authority) checkService(r *http.Request, values url.Values) error {
	if service := values.Get("service"); service != "" && service != a.service(r) {
		return badRequest(oauthInvalidRequest, "service %q is not this registry, which is %q", clip(service), a.service(r))
	}
	return nil
}

// readForm reads the form in the body. The query isn't looked at: secrets don't
// belong there, since it is logged everywhere.
func readForm(w http.ResponseWriter, r *http.Request) (url.Values, error) {
	r.Body = http.MaxBytesReader(w, r.Body, maxForm)
	var tooLarge *http.MaxBytesError
	switch err := r.ParseForm(); {
	case errors.As(err, &tooLarge):
		return nil, badRequest(oauthInvalidRequest, "the body has more than %d bytes", maxForm)
	case err != nil:
		return nil, badRequest(oauthInvalidRequest, "the body is not a form")
	}
	return r.PostForm, nil
}

// writeError answers with an error in both forms. Credentials that aren't good
// are a 401, as Azure's registry and Docker's protocol have it, though OAuth 2
// would have some of them be a 400.
func (a *Authority) writeError(w http.ResponseWriter, r *http.Request, err error) {
	var e *oauthError
	var limit *LimitError
	switch {
	case errors.As(err, &e):
	case errors.As(err, &limit):
		e = &oauthError{status: http.StatusTooManyRequests, code: oauthUnavailable, description: limit.Error(), answer: oci.ErrTooManyRequests, retryAfter: limit.Seconds()}
	case errors.Is(err, oci.ErrUnauthorized):
		w.Header().Set("WWW-Authenticate", `Basic realm="`+a.service(r)+`"`)
		e = &oauthError{status: http.StatusUnauthorized, code: oauthInvalidGrant, description: err.Error(), answer: oci.ErrUnauthorized}
	default:
		if r.Context().Err() == nil {
			a.log.Error("token server", "path", r.URL.Path, "error", err)
		}
		e = &oauthError{status: http.StatusInternalServerError, code: oauthServer, description: "internal error: the registry's log has it", answer: &oci.Error{Code: "INTERNAL_ERROR"}}
	}
	if e.retryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(e.retryAfter))
	}
	writeJSON(w, r, e.status, map[string]any{
		"error":             e.code,
		"error_description": e.description,
		"errors":            []*oci.Error{{Code: e.answer.Code, Message: e.description}},
	})
}

func writeJSON(w http.ResponseWriter, r *http.Request, status int, doc any) {
	body, err := json.Marshal(doc)
	if err != nil {
		status, body = http.StatusInternalServerError, []byte(`{"error":"server_error"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	if r.Method != http.MethodHead {
		_, _ = w.Write(body) // a client that has gone needs nothing more
	}
}
