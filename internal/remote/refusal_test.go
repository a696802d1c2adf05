package remote_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sluice/internal/remote"
	"sluice/oci"
)

// sources is a CredentialFunc with several credentials, which gives the next one
// when one was refused.
type sources struct {
	mu      sync.Mutex
	all     []remote.Credential
	refused []string
	end     error
}

func (s *sources) credential(ctx context.Context, _ string) (remote.Credential, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r, ok := remote.RefusalOf(ctx); ok {
		s.refused = append(s.refused, r.Reason)
		if len(s.all) > 0 && s.all[0] == r.Credential {
			s.all = s.all[1:]
		} else if s.end != nil {
			return remote.Credential{}, s.end
		}
	}
	if len(s.all) == 0 {
		return remote.Credential{}, nil
	}
	return s.all[0], nil
}

func TestNextCredential(t *testing.T) {
	wrong := remote.Credential{Username: "user", Password: "wr0ng"}
	right := remote.Credential{Username: "user", Password: secret}
	_, bearer := newTokens(t, inMemory())
	basicServer := httptest.NewServer(basic(inMemory()))
	t.Cleanup(basicServer.Close)
	for name, server := range map[string]*httptest.Server{"basic": basicServer, "bearer": bearer} {
		t.Run(name, func(t *testing.T) {
			s := &sources{all: []remote.Credential{wrong, {Username: "other", Password: "x"}, right}}
			if err := useAll(t.Context(), connect(t, server, remote.Options{Credentials: s.credential})); err != nil {
				t.Error(err)
			}
			if len(s.refused) != 2 || !strings.Contains(s.refused[0], "401") {
				t.Errorf("refused %q, want two", s.refused)
			}
			s = &sources{all: []remote.Credential{wrong}, end: errors.New("the login has expired")}
			_, err := connect(t, server, remote.Options{Credentials: s.credential}).GetManifest(t.Context(), "some/repo", "tag")
			if !errors.Is(err, oci.ErrUnauthorized) || !strings.Contains(err.Error(), "the login has expired") {
				t.Errorf("without a right one: %v", err)
			}
			if len(s.refused) != 2 { // the wrong one, and none
				t.Errorf("refused %q", s.refused)
			}
		})
	}
}

// gate is a registry whose tokens are withdrawn at will; it says so with status.
type gate struct {
	http.Handler
	url     string
	status  int
	valid   atomic.Int64
	fetched atomic.Int64
	hold    chan struct{} // closed: tokens are given
}

func (g *gate) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if req.URL.Path == "/token" {
		n := g.fetched.Add(1)
		select {
		case <-g.hold:
		case <-req.Context().Done():
			return
		}
		json.NewEncoder(w).Encode(map[string]string{"token": fmt.Sprint(max(n, g.valid.Load()))})
		return
	}
	a := req.Header.Get("Authorization")
	status := g.status
	if a == "" {
		status = 401
	}
	var n int64
	if fmt.Sscanf(a, "Bearer %d", &n); n < g.valid.Load() || n == 0 {
		answer(status, "", "WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="test"`, g.url))(w, req)
		return
	}
	g.Handler.ServeHTTP(w, req)
}

func newGate(t *testing.T, status int) (*gate, *remote.Registry) {
	g := &gate{Handler: inMemory(), status: status, hold: make(chan struct{})}
	server := httptest.NewServer(g)
	t.Cleanup(server.Close)
	g.url = server.URL
	return g, connect(t, server, remote.Options{Credentials: user})
}

// A token that ran out is replaced, whatever the registry says of it, once for
// all that were refused with it.
func TestTokensAreRenewedTogether(t *testing.T) {
	for _, status := range []int{401, 403} {
		g, reg := newGate(t, status)
		close(g.hold)
		for round := range int64(3) {
			g.valid.Store(10 * round)
			before := g.fetched.Load()
			var wg sync.WaitGroup
			for range 30 {
				wg.Go(func() {
					if _, err := reg.ResolveManifest(t.Context(), "some/repo", "tag"); !errors.Is(err, oci.ErrManifestUnknown) && !errors.Is(err, oci.ErrNameUnknown) {
						t.Errorf("%d: %v", status, err)
					}
				})
			}
			wg.Wait()
			if n := g.fetched.Load() - before; n != 1 {
				t.Errorf("%d: %d tokens were fetched for 30 requests at once", status, n)
			}
		}
	}
}

// Who waits for a token doesn't depend on the patience of who asked for it.
func TestTokenOutlivesWhoAskedFirst(t *testing.T) {
	g, reg := newGate(t, 401)
	first, cancel := context.WithCancel(t.Context())
	gone := make(chan error, 1)
	go func() {
		_, err := reg.ResolveManifest(first, "some/repo", "tag")
		gone <- err
	}()
	for g.fetched.Load() == 0 {
		if t.Context().Err() != nil {
			t.Fatal("nobody asks for a token")
		}
		time.Sleep(time.Millisecond)
	}
	second := make(chan error, 1)
	go func() {
		_, err := reg.ResolveManifest(t.Context(), "some/repo", "tag")
		second <- err
	}()
	cancel()
	if err := <-gone; !errors.Is(err, context.Canceled) {
		t.Errorf("the first: %v", err)
	}
	close(g.hold)
	if err := <-second; !errors.Is(err, oci.ErrManifestUnknown) && !errors.Is(err, oci.ErrNameUnknown) {
		t.Errorf("the second: %v", err)
	}
	if n := g.fetched.Load(); n != 1 {
		t.Errorf("%d tokens were fetched", n)
	}
}
