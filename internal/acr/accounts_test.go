package acr_test

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"sluice/internal/acr"
	"sluice/internal/stored"
	"sluice/oci"
)

func TestTokens(t *testing.T) {
	b := newBench(t, stored.Options{})
	ctx, admin := t.Context(), b.admin()
	push(t, b.reg, "team/app", "one", "v1")
	actions := []string{"repositories/team/*/metadata/read"}
	m, err := admin.CreateScopeMap(ctx, acr.ScopeMap{Name: "readers", Description: "for tests", Actions: actions})
	if err != nil || m.Name != "readers" || m.Description != "for tests" || !slices.Equal(m.Actions, actions) {
		t.Fatalf("%+v, %v", m, err)
	}
	if _, err := admin.CreateScopeMap(ctx, m); !errors.Is(err, acr.ErrConflict) {
		t.Errorf("a scope map is made again: %v", err)
	}
	made, err := admin.CreateToken(ctx, "ci", "readers", true)
	if err != nil || !made.Enabled || made.ScopeMap != "readers" || len(made.Passwords) != 0 || time.Since(made.Created).Abs() > time.Minute {
		t.Fatalf("%+v, %v", made, err)
	}
	if _, err := admin.CreateToken(ctx, "ci", "readers", true); !errors.Is(err, acr.ErrConflict) {
		t.Errorf("a token is made again: %v", err)
	}
	expiry := time.Now().Add(time.Hour).UTC().Truncate(time.Second)
	p, err := admin.GeneratePassword(ctx, "ci", "password2", expiry)
	if err != nil || p.Name != "password2" || len(p.Value) < 20 || !p.Expiry.Equal(expiry) {
		t.Fatalf("%+v, %v", p, err)
	}
	shown, err := admin.Token(ctx, "ci")
	if err != nil || len(shown.Passwords) != 1 || shown.Passwords[0].Name != "password2" || shown.Passwords[0].Value != "" {
		t.Errorf("%+v, %v", shown, err)
	}
	machine := b.client("ci", p.Value)
	if _, err := machine.Repository(ctx, "team/app"); err != nil {
		t.Errorf("the token can't read: %v", err)
	}
	if _, err := machine.UpdateRepository(ctx, "team/app", acr.AttributeChanges{WriteEnabled: off()}); err == nil {
		t.Error("the token can write")
	}
	if _, err := machine.Tokens(ctx); err == nil {
		t.Error("the token can list tokens")
	}

	// More rights, other rights, none.
	if _, err := admin.UpdateScopeMap(ctx, "readers", nil, append(actions, "repositories/team/app/metadata/write")); err != nil {
		t.Error(err)
	}
	if _, err := machine.UpdateRepository(ctx, "team/app", acr.AttributeChanges{WriteEnabled: on()}); err != nil {
		t.Errorf("with more rights: %v", err)
	}
	other := "_repositories_pull"
	if _, err := admin.UpdateToken(ctx, "ci", &other, nil); err != nil {
		t.Error(err)
	}
	if _, err := machine.Repository(ctx, "team/app"); err == nil {
		t.Error("with another scope map it has the old rights")
	}
	if changed, err := admin.UpdateToken(ctx, "ci", nil, off()); err != nil || changed.Enabled || changed.ScopeMap != other {
		t.Errorf("%+v, %v", changed, err)
	}
	if _, err := machine.Repository(ctx, "team/app"); !errors.Is(err, oci.ErrUnauthorized) {
		t.Errorf("a disabled token: %v", err)
	}
	if err := admin.DeletePassword(ctx, "ci", "password2"); err != nil {
		t.Error(err)
	}
	if shown, err := admin.Token(ctx, "ci"); err != nil || len(shown.Passwords) != 0 {
		t.Errorf("%+v, %v", shown, err)
	}
	if _, err := admin.GeneratePassword(ctx, "ci", "password3", time.Time{}); err == nil || !strings.Contains(err.Error(), "password1 and password2") {
		t.Errorf("password3: %v", err)
	}
	if _, err := admin.GeneratePassword(ctx, "none", "password1", time.Time{}); !errors.Is(err, acr.ErrTokenUnknown) {
		t.Errorf("a password of a token that isn't there: %v", err)
	}

	if _, err := admin.UpdateToken(ctx, "ci", &m.Name, nil); err != nil {
		t.Error(err)
	}
	if err := admin.DeleteScopeMap(ctx, "readers"); !errors.Is(err, acr.ErrConflict) || !strings.Contains(err.Error(), "token ci") {
		t.Errorf("a scope map that a token has is deleted: %v", err)
	}
	if err := admin.DeleteToken(ctx, "ci"); err != nil {
		t.Error(err)
	}
	if err := admin.DeleteScopeMap(ctx, "readers"); err != nil {
		t.Error(err)
	}
	if _, err := admin.ScopeMap(ctx, "readers"); !errors.Is(err, acr.ErrScopeMapUnknown) {
		t.Errorf("it is there still: %v", err)
	}
}

func TestManyAccounts(t *testing.T) {
	b := newBench(t, stored.Options{})
	ctx, admin := t.Context(), b.admin()
	for i := range 105 {
		name := "t" + string(rune('a'+i/26)) + string(rune('a'+i%26))
		if _, err := admin.CreateScopeMap(ctx, acr.ScopeMap{Name: name, Actions: []string{"repositories/" + name + "/content/read"}}); err != nil {
			t.Fatal(err)
		}
		if _, err := admin.CreateToken(ctx, name, name, true); err != nil {
			t.Fatal(err)
		}
	}
	tokens, err := admin.Tokens(ctx)
	if err != nil || len(tokens) != 105 || !slices.IsSortedFunc(tokens, func(a, b acr.Token) int { return strings.Compare(a.Name, b.Name) }) {
		t.Errorf("%d tokens, %v", len(tokens), err)
	}
	maps, err := admin.ScopeMaps(ctx)
	builtin := slices.DeleteFunc(slices.Clone(maps), func(m acr.ScopeMap) bool { return !m.Builtin })
	if err != nil || len(maps) != 105+len(builtin) || len(builtin) < 3 {
		t.Errorf("%d scope maps, %d of them the system's, %v", len(maps), len(builtin), err)
	}
}
