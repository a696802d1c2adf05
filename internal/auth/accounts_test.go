package auth_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/crypto/bcrypt"

	"sluice/internal/auth"
	"sluice/internal/storage"
)

func TestScopeMaps(t *testing.T) {
	ctx := t.Context()
	b := open(t, new(storage.Memory), newClock(), nil)
	for name, m := range map[string]auth.ScopeMap{
		"no name":           {Actions: []string{"repositories/a/content/read"}},
		"system's":          {Name: "_repositories_pull", Actions: []string{"repositories/a/content/read"}},
		"path":              {Name: "a/b", Actions: []string{"repositories/a/content/read"}},
		"long name":         {Name: strings.Repeat("x", 51), Actions: []string{"repositories/a/content/read"}},
		"no actions":        {Name: "m"},
		"many actions":      {Name: "m", Actions: make([]string, 1001)},
		"empty action":      {Name: "m", Actions: []string{""}},
		"other thing":       {Name: "m", Actions: []string{"registries/a/content/read"}},
		"other right":       {Name: "m", Actions: []string{"repositories/a/content/list"}},
		"metadata/delete":   {Name: "m", Actions: []string{"repositories/a/metadata/delete"}},
		"no right":          {Name: "m", Actions: []string{"repositories/a"}},
		"no repository":     {Name: "m", Actions: []string{"repositories//content/read"}},
		"upper case":        {Name: "m", Actions: []string{"repositories/A/content/read"}},
		"wildcard inside":   {Name: "m", Actions: []string{"repositories/a/*/b/content/read"}},
		"wildcard of part":  {Name: "m", Actions: []string{"repositories/a*/content/read"}},
		"two wildcards":     {Name: "m", Actions: []string{"repositories/*/*/content/read"}},
		"wildcard and more": {Name: "m", Actions: []string{"repositories/a/**/content/read"}},
		"description":       {Name: "m", Description: strings.Repeat("x", 501), Actions: []string{"repositories/a/content/read"}},
	} {
		if _, err := b.CreateScopeMap(ctx, m); !errors.Is(err, auth.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	m := auth.ScopeMap{Name: "m", Description: "d", Actions: []string{"repositories/a/b/content/read", "repositories/a/*/metadata/write", "repositories/*/content/delete"}}
	created, err := b.CreateScopeMap(ctx, m)
	if err != nil {
		t.Fatal(err)
	}
	m.Created = b.clock.Now()
	got, err := b.ScopeMap(ctx, "m")
	if diff := cmp.Diff(m, got); diff != "" || err != nil || cmp.Diff(created, got) != "" {
		t.Errorf("%v %s", err, diff)
	}
	if _, err := b.CreateScopeMap(ctx, m); !errors.Is(err, auth.ErrExists) {
		t.Errorf("twice: %v", err)
	}
	for _, name := range []string{auth.MapPull, "_x", ""} {
		change := func(*auth.ScopeMap) error { return nil }
		if _, err := b.UpdateScopeMap(ctx, name, change); !errors.Is(err, auth.ErrInvalid) {
			t.Errorf("update %q: %v", name, err)
		}
		if err := b.DeleteScopeMap(ctx, name); !errors.Is(err, auth.ErrInvalid) {
			t.Errorf("delete %q: %v", name, err)
		}
	}
	b.scopeMap("n", "repositories/a/content/read")
	all, err := b.ScopeMaps(ctx, "", 10)
	if err != nil || len(all) != 7 || !all[0].Builtin || all[6].Name != "n" || all[6].Builtin {
		t.Errorf("list: %v %v", all, err)
	}
	if all, err = b.ScopeMaps(ctx, "m", 10); err != nil || len(all) != 1 || all[0].Name != "n" {
		t.Errorf("rest of the list: %v %v", all, err)
	}
	// What a caller does to what it got is its own affair.
	all[0].Actions[0] = "repositories/*/content/write"
	if got, err := b.ScopeMap(ctx, "n"); err != nil || got.Actions[0] != "repositories/a/content/read" {
		t.Errorf("changed from outside: %v %v", got, err)
	}
	b.token("ci", "n")
	if err := b.DeleteScopeMap(ctx, "n"); !errors.Is(err, auth.ErrInUse) {
		t.Errorf("delete what a token has: %v", err)
	}
	if err := b.DeleteScopeMap(ctx, "m"); err != nil {
		t.Error(err)
	}
	if _, err := b.ScopeMap(ctx, "m"); !errors.Is(err, auth.ErrNotFound) {
		t.Errorf("deleted: %v", err)
	}
	if err := b.DeleteScopeMap(ctx, "m"); !errors.Is(err, auth.ErrNotFound) {
		t.Errorf("deleted twice: %v", err)
	}
}

func TestTokens(t *testing.T) {
	ctx, store := t.Context(), new(storage.Memory)
	b := open(t, store, newClock(), nil)
	for name, token := range map[string]auth.Token{
		"no map":      {Name: "ci"},
		"unknown map": {Name: "ci", ScopeMap: "nothing"},
		"status":      {Name: "ci", ScopeMap: auth.MapPull, Status: "asleep"},
		"null GUID":   {Name: nullGUID + "x:y", ScopeMap: auth.MapPull},
		"path":        {Name: "../keys/x", ScopeMap: auth.MapPull},
		"empty":       {ScopeMap: auth.MapPull},
	} {
		if _, err := b.CreateToken(ctx, token); !errors.Is(err, auth.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"admin", nullGUID} {
		if _, err := b.CreateToken(ctx, auth.Token{Name: name, ScopeMap: auth.MapPull}); !errors.Is(err, auth.ErrExists) {
			t.Errorf("%s: %v", name, err)
		}
	}
	secret := b.token("ci", auth.MapPull)
	if len(secret) < 32 {
		t.Errorf("a password of %d characters", len(secret))
	}
	if _, err := b.CreateToken(ctx, auth.Token{Name: "ci", ScopeMap: auth.MapPull}); !errors.Is(err, auth.ErrExists) {
		t.Errorf("twice: %v", err)
	}
	for _, n := range []int{0, 3} {
		if _, err := b.GeneratePassword(ctx, "ci", n, time.Time{}); !errors.Is(err, auth.ErrInvalid) {
			t.Errorf("password %d: %v", n, err)
		}
	}
	if _, err := b.GeneratePassword(ctx, "ci", 1, b.clock.Now()); !errors.Is(err, auth.ErrInvalid) {
		t.Errorf("expired already: %v", err)
	}
	if _, err := b.GeneratePassword(ctx, "nobody", 1, time.Time{}); !errors.Is(err, auth.ErrNotFound) {
		t.Errorf("nobody's: %v", err)
	}
	data, err := storage.ReadAll(ctx, store, "registry/tokens/ci", 1<<20)
	if err != nil || strings.Contains(string(data), secret) {
		t.Errorf("the secret is stored: %v", err)
	}
	var stored struct{ Hashes [2][]byte }
	if err := json.Unmarshal(data, &stored); err != nil || bcrypt.CompareHashAndPassword(stored.Hashes[0], []byte(secret)) != nil {
		t.Errorf("%v %s", err, data)
	}
	got, err := b.Token(ctx, "ci")
	if err != nil {
		t.Fatal(err)
	}
	// A Token can be shown: hashes aren't part of it.
	if shown, err := json.Marshal(got); err != nil || strings.Contains(string(shown), "ash") {
		t.Errorf("%s %v", shown, err)
	}
	// Nobody can get a password by setting its dates.
	got, err = b.UpdateToken(ctx, "ci", func(tok *auth.Token) error {
		tok.Passwords[1].Created = b.clock.Now()
		tok.Name = "other"
		return nil
	})
	if err != nil || !got.Passwords[1].Created.IsZero() || got.Name != "ci" || got.Passwords[0].Created.IsZero() {
		t.Errorf("%+v %v", got, err)
	}
	if _, err := b.UpdateToken(ctx, "ci", func(tok *auth.Token) error { tok.ScopeMap = "nothing"; return nil }); !errors.Is(err, auth.ErrInvalid) {
		t.Errorf("a map that doesn't exist: %v", err)
	}
	b.token("b", auth.MapPull)
	b.token("d", auth.MapPull)
	list, err := b.Tokens(ctx, "b", 1)
	if err != nil || len(list) != 1 || list[0].Name != "ci" {
		t.Errorf("list: %v %v", list, err)
	}
	if err := store.Put(ctx, "registry/tokens/ci", []byte(`{"name":"admin"}`)); err != nil {
		t.Fatal(err)
	}
	b.clock.Advance(5 * time.Second)
	if _, err := b.who(basic("ci", secret)); err == nil || errors.Is(err, auth.ErrInvalid) {
		t.Errorf("a damaged object: %v", err)
	}
}

// With a lock that replicas share, no change is lost.
func TestConcurrentChanges(t *testing.T) {
	store, c := new(storage.Memory), newClock()
	locks := make(chan struct{}, 1)
	exclude := func(o *auth.Options) {
		o.Exclude = func(ctx context.Context, _ string) (func(), error) {
			select {
			case locks <- struct{}{}:
				return func() { <-locks }, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
	}
	a, b := open(t, store, c, exclude), open(t, store, c, exclude)
	a.scopeMap("m", "repositories/start/content/read")
	var all sync.WaitGroup
	for i := range 40 {
		x := []*bed{a, b}[i%2]
		all.Go(func() {
			_, err := x.UpdateScopeMap(t.Context(), "m", func(m *auth.ScopeMap) error {
				m.Actions = append(m.Actions, fmt.Sprintf("repositories/r%d/content/read", i))
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	c.Advance(5 * time.Second)
	m, err := a.ScopeMap(t.Context(), "m")
	if err != nil || len(m.Actions) != 41 {
		t.Errorf("%d actions of 41 (%v)", len(m.Actions), err)
	}
}

func FuzzParseScope(f *testing.F) {
	for _, s := range []string{"repository:a/b:pull,push", "registry:catalog:*", "repository(x):a:pull", "repository:h:5000/a:pull", "::", "repository:a:", strings.Repeat("a", 600)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := auth.ParseScope(s)
		if err != nil {
			return
		}
		again, err := auth.ParseScope(a.String())
		if diff := cmp.Diff(a, again); diff != "" || err != nil {
			t.Errorf("%q → %q: %v %s", s, a, err, diff)
		}
		if strings.ContainsAny(a.String(), "\" \n\\") || len(a.Actions) == 0 || len(a.String()) > len(s) {
			t.Errorf("%q → %q", s, a)
		}
	})
}
