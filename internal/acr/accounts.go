package acr

import (
	"errors"
	"net/http"
	"slices"

	"sluice/internal/auth"
	"sluice/internal/registry"
	"sluice/oci"
)

const (
	memberToken    = "name, scopeMap, enabled"
	memberScopeMap = "name, description, actions"
	memberPassword = "name, expiry"
)

// authority returns who keeps the accounts.
func (h *Handler) authority() (*auth.Authority, error) {
	if h.opts.Authority == nil {
		return nil, oci.ErrUnsupported.Withf("this registry has no accounts: authentication is switched off in its configuration")
	}
	return h.opts.Authority, nil
}

// accountError gives the errors of package auth their codes.
func accountError(err error, unknown *oci.Error) error {
	switch {
	case errors.Is(err, auth.ErrNotFound):
		return unknown.Withf("%v", err)
	case errors.Is(err, auth.ErrExists), errors.Is(err, auth.ErrInUse):
		return ErrConflict.Withf("%v", err)
	case errors.Is(err, auth.ErrInvalid):
		return badRequest("%v", err)
	}
	return err
}

func (h *Handler) listTokens(w http.ResponseWriter, r *http.Request, req Request) error {
	a, err := h.authority()
	if err != nil {
		return err
	}
	last, n, err := page(req)
	if err != nil {
		return err
	}
	list, err := a.Tokens(r.Context(), last, n+1)
	if err != nil {
		return err
	}
	tokens := make([]Token, len(list))
	for i, t := range list {
		tokens[i] = wireToken(t)
	}
	tokens = next(w, r, req, tokens, n, func(t Token) string { return t.Name })
	registry.WriteJSON(w, r, http.StatusOK, tokensDocument{tokens})
	return nil
}

// passwordNames are those of a token's passwords, in order.
func passwordNames() []string { return []string{"password1", "password2"} }

func wireToken(t auth.Token) Token {
	w := Token{Name: t.Name, ScopeMap: t.ScopeMap, Enabled: t.Status == auth.Enabled, Created: t.Created, Passwords: []Password{}}
	for i, p := range t.Passwords {
		if !p.Created.IsZero() {
			w.Passwords = append(w.Passwords, Password{Name: passwordNames()[i], Created: p.Created, Expiry: p.Expiry})
		}
	}
	return w
}

// answerToken answers with a token, or the error of getting it.
func answerToken(w http.ResponseWriter, r *http.Request, status int, t auth.Token, err error) error {
	if err != nil {
		return accountError(err, ErrTokenUnknown)
	}
	registry.WriteJSON(w, r, status, wireToken(t))
	return nil
}

func (h *Handler) getToken(w http.ResponseWriter, r *http.Request, req Request) error {
	a, err := h.authority()
	if err != nil {
		return err
	}
	t, err := a.Token(r.Context(), req.Name)
	return answerToken(w, r, http.StatusOK, t, err)
}

func (h *Handler) createToken(w http.ResponseWriter, r *http.Request, _ Request) error {
	a, err := h.authority()
	if err != nil {
		return err
	}
	var body tokenRequest
	if err := decode(r, &body, memberToken); err != nil {
		return err
	}
	t := auth.Token{Name: body.Name, Status: auth.Enabled}
	body.apply(&t)
	t, err = a.CreateToken(r.Context(), t)
	return answerToken(w, r, http.StatusCreated, t, err)
}

// apply sets what a request has.
func (r tokenRequest) apply(t *auth.Token) {
	if r.ScopeMap != nil {
		t.ScopeMap = *r.ScopeMap
	}
	if r.Enabled != nil {
		t.Status = auth.Disabled
		if *r.Enabled {
			t.Status = auth.Enabled
		}
	}
}

func (h *Handler) updateToken(w http.ResponseWriter, r *http.Request, req Request) error {
	a, err := h.authority()
	if err != nil {
		return err
	}
	var body tokenRequest
	if err := decode(r, &body, memberToken); err != nil {
		return err
	}
	if body.Name != "" && body.Name != req.Name {
		return badRequest("a token can't be renamed: make another one")
	}
	t, err := a.UpdateToken(r.Context(), req.Name, func(t *auth.Token) error {
		body.apply(t)
		return nil
	})
	return answerToken(w, r, http.StatusOK, t, err)
}

func (h *Handler) deleteToken(w http.ResponseWriter, r *http.Request, req Request) error {
	a, err := h.authority()
	if err != nil {
		return err
	}
	if err := a.DeleteToken(r.Context(), req.Name); err != nil {
		return accountError(err, ErrTokenUnknown)
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (h *Handler) generatePassword(w http.ResponseWriter, r *http.Request, req Request) error {
	a, err := h.authority()
	if err != nil {
		return err
	}
	var body passwordRequest
	if err := decode(r, &body, memberPassword); err != nil {
		return err
	}
	i := slices.Index(passwordNames(), body.Name)
	if i < 0 {
		return badRequest("password %.40q: a token has password1 and password2", body.Name)
	}
	secret, err := a.GeneratePassword(r.Context(), req.Name, i+1, body.Expiry)
	if err != nil {
		return accountError(err, ErrTokenUnknown)
	}
	t, err := a.Token(r.Context(), req.Name)
	if err != nil {
		return accountError(err, ErrTokenUnknown)
	}
	p := t.Passwords[i]
	registry.WriteJSON(w, r, http.StatusCreated, Password{Name: body.Name, Created: p.Created, Expiry: p.Expiry, Value: secret})
	return nil
}

func (h *Handler) deletePassword(w http.ResponseWriter, r *http.Request, req Request) error {
	a, err := h.authority()
	if err != nil {
		return err
	}
	i := slices.Index(passwordNames(), req.Password)
	if i < 0 {
		return notFound(r.URL.Path)
	}
	_, err = a.UpdateToken(r.Context(), req.Name, func(t *auth.Token) error {
		t.Passwords[i] = auth.Password{}
		return nil
	})
	if err != nil {
		return accountError(err, ErrTokenUnknown)
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// listScopeMaps begins with those of the system, which don't count in n.
func (h *Handler) listScopeMaps(w http.ResponseWriter, r *http.Request, req Request) error {
	a, err := h.authority()
	if err != nil {
		return err
	}
	last, n, err := page(req)
	if err != nil {
		return err
	}
	list, err := a.ScopeMaps(r.Context(), last, n+1)
	if err != nil {
		return err
	}
	var builtin, others []ScopeMap
	for _, m := range list {
		if m.Builtin {
			builtin = append(builtin, wireScopeMap(m))
		} else {
			others = append(others, wireScopeMap(m))
		}
	}
	others = next(w, r, req, others, n, func(m ScopeMap) string { return m.Name })
	registry.WriteJSON(w, r, http.StatusOK, scopeMapsDocument{append(builtin, others...)})
	return nil
}

func wireScopeMap(m auth.ScopeMap) ScopeMap {
	return ScopeMap{Name: m.Name, Description: m.Description, Actions: m.Actions, Builtin: m.Builtin}
}

// answerScopeMap answers with a scope map, or the error of getting it.
func answerScopeMap(w http.ResponseWriter, r *http.Request, status int, m auth.ScopeMap, err error) error {
	if err != nil {
		return accountError(err, ErrScopeMapUnknown)
	}
	registry.WriteJSON(w, r, status, wireScopeMap(m))
	return nil
}

func (h *Handler) getScopeMap(w http.ResponseWriter, r *http.Request, req Request) error {
	a, err := h.authority()
	if err != nil {
		return err
	}
	m, err := a.ScopeMap(r.Context(), req.Name)
	return answerScopeMap(w, r, http.StatusOK, m, err)
}

func (h *Handler) createScopeMap(w http.ResponseWriter, r *http.Request, _ Request) error {
	a, err := h.authority()
	if err != nil {
		return err
	}
	var body scopeMapRequest
	if err := decode(r, &body, memberScopeMap); err != nil {
		return err
	}
	m := auth.ScopeMap{Name: body.Name}
	body.apply(&m)
	m, err = a.CreateScopeMap(r.Context(), m)
	return answerScopeMap(w, r, http.StatusCreated, m, err)
}

// apply sets what a request has.
func (r scopeMapRequest) apply(m *auth.ScopeMap) {
	if r.Description != nil {
		m.Description = *r.Description
	}
	if r.Actions != nil {
		m.Actions = r.Actions
	}
}

func (h *Handler) updateScopeMap(w http.ResponseWriter, r *http.Request, req Request) error {
	a, err := h.authority()
	if err != nil {
		return err
	}
	var body scopeMapRequest
	if err := decode(r, &body, memberScopeMap); err != nil {
		return err
	}
	if body.Name != "" && body.Name != req.Name {
		return badRequest("a scope map can't be renamed: make another one")
	}
	m, err := a.UpdateScopeMap(r.Context(), req.Name, func(m *auth.ScopeMap) error {
		body.apply(m)
		return nil
	})
	return answerScopeMap(w, r, http.StatusOK, m, err)
}

func (h *Handler) deleteScopeMap(w http.ResponseWriter, r *http.Request, req Request) error {
	a, err := h.authority()
	if err != nil {
		return err
	}
	if err := a.DeleteScopeMap(r.Context(), req.Name); err != nil {
		return accountError(err, ErrScopeMapUnknown)
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}
