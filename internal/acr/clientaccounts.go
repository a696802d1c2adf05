package acr

import (
	"context"
	"net/http"
	"time"

	"sluice/internal/remote"
)

// Tokens lists the tokens by name.
func (c *Client) Tokens(ctx context.Context) ([]Token, error) {
	return list(ctx, c, remote.APIRequest{What: "listing tokens", Path: "_tokens"}, ListOptions{},
		func(d tokensDocument) []Token { return d.Tokens })
}

// Token returns a token. Errors: ErrTokenUnknown.
func (c *Client) Token(ctx context.Context, name string) (t Token, err error) {
	_, err = c.call(ctx, remote.APIRequest{What: "token " + name, Path: "_tokens/" + name}, nil, &t)
	return t, err
}

// CreateToken makes a token without passwords. Errors: ErrConflict if it
// exists, ErrScopeMapUnknown.
func (c *Client) CreateToken(ctx context.Context, name, scopeMap string, enabled bool) (t Token, err error) {
	_, err = c.call(ctx, remote.APIRequest{What: "creating token " + name, Method: http.MethodPost, Path: "_tokens"},
		tokenRequest{Name: name, ScopeMap: &scopeMap, Enabled: &enabled}, &t)
	return t, err
}

// UpdateToken changes a token's scope map, and whether it is enabled; nil
// leaves them. Errors: ErrTokenUnknown, ErrScopeMapUnknown.
func (c *Client) UpdateToken(ctx context.Context, name string, scopeMap *string, enabled *bool) (t Token, err error) {
	_, err = c.call(ctx, remote.APIRequest{What: "updating token " + name, Method: http.MethodPatch, Path: "_tokens/" + name},
		tokenRequest{ScopeMap: scopeMap, Enabled: enabled}, &t)
	return t, err
}

// DeleteToken deletes a token. Errors: ErrTokenUnknown.
func (c *Client) DeleteToken(ctx context.Context, name string) error {
	_, err := c.call(ctx, remote.APIRequest{What: "deleting token " + name, Method: http.MethodDelete, Path: "_tokens/" + name}, nil, nil)
	return err
}

// GeneratePassword replaces password1 or password2 of a token by a new one,
// which is in the answer. A zero expiry is never. Errors: ErrTokenUnknown.
func (c *Client) GeneratePassword(ctx context.Context, token, password string, expiry time.Time) (p Password, err error) {
	_, err = c.call(ctx, remote.APIRequest{What: "generating a password of token " + token, Method: http.MethodPost, Path: "_tokens/" + token + "/passwords"},
		passwordRequest{Name: password, Expiry: expiry}, &p)
	return p, err
}

// DeletePassword deletes password1 or password2 of a token.
func (c *Client) DeletePassword(ctx context.Context, token, password string) error {
	_, err := c.call(ctx, remote.APIRequest{What: "deleting " + password + " of token " + token, Method: http.MethodDelete, Path: "_tokens/" + token + "/passwords/" + password}, nil, nil)
	return err
}

// ScopeMaps lists the scope maps by name.
func (c *Client) ScopeMaps(ctx context.Context) ([]ScopeMap, error) {
	return list(ctx, c, remote.APIRequest{What: "listing scope maps", Path: "_scopeMaps"}, ListOptions{},
		func(d scopeMapsDocument) []ScopeMap { return d.ScopeMaps })
}

// ScopeMap returns a scope map. Errors: ErrScopeMapUnknown.
func (c *Client) ScopeMap(ctx context.Context, name string) (m ScopeMap, err error) {
	_, err = c.call(ctx, remote.APIRequest{What: "scope map " + name, Path: "_scopeMaps/" + name}, nil, &m)
	return m, err
}

// CreateScopeMap makes a scope map. Errors: ErrConflict if it exists.
func (c *Client) CreateScopeMap(ctx context.Context, m ScopeMap) (r ScopeMap, err error) {
	_, err = c.call(ctx, remote.APIRequest{What: "creating scope map " + m.Name, Method: http.MethodPost, Path: "_scopeMaps"},
		scopeMapRequest{Name: m.Name, Description: &m.Description, Actions: m.Actions}, &r)
	return r, err
}

// UpdateScopeMap changes a scope map's description if it isn't nil, and its
// actions if there are any. Errors: ErrScopeMapUnknown.
func (c *Client) UpdateScopeMap(ctx context.Context, name string, description *string, actions []string) (r ScopeMap, err error) {
	_, err = c.call(ctx, remote.APIRequest{What: "updating scope map " + name, Method: http.MethodPatch, Path: "_scopeMaps/" + name},
		scopeMapRequest{Description: description, Actions: actions}, &r)
	return r, err
}

// DeleteScopeMap deletes a scope map that no token has. Errors:
// ErrScopeMapUnknown, ErrConflict.
func (c *Client) DeleteScopeMap(ctx context.Context, name string) error {
	_, err := c.call(ctx, remote.APIRequest{What: "deleting scope map " + name, Method: http.MethodDelete, Path: "_scopeMaps/" + name}, nil, nil)
	return err
}
