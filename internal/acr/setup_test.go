package acr_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice/internal/acr"
	"sluice/internal/auth"
	"sluice/internal/index"
	"sluice/internal/registry"
	"sluice/internal/remote"
	"sluice/internal/storage"
	"sluice/internal/stored"
	"sluice/internal/streaming"
	"sluice/internal/teleport"
	"sluice/oci"
)

const adminPassword = "the admin's password"

// bench is a whole registry: what is stored, who may, and the server.
type bench struct {
	t         *testing.T
	store     *storage.Memory
	db        *index.DB
	reg       *stored.Registry
	authority *auth.Authority
	handler   *acr.Handler
	streaming *streaming.Service
	host      string
}

func newBench(t *testing.T, opts stored.Options) *bench {
	t.Helper()
	b := &bench{t: t, store: new(storage.Memory)}
	var err error
	if b.db, err = index.Open(t.Context(), index.Options{URL: "sqlite::memory:"}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.db.Close() })
	b.reg = stored.New(b.store, b.db, opts)
	b.authority, err = auth.Open(t.Context(), b.store, auth.Options{
		Admin: auth.Admin{Enabled: true, Password: adminPassword}, HashCost: 4,
		AnonymousPull: func(ctx context.Context, repo string) bool {
			r, err := b.reg.Repository(ctx, repo)
			return err == nil && r.AnonymousPullEnabled
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	expander, err := teleport.New(b.reg, b.db, teleport.Options{Directory: t.TempDir(), MaxRepositories: 1})
	if err != nil {
		t.Fatal(err)
	}
	b.streaming = streaming.New(b.reg, b.db, streaming.Options{Store: b.store})
	b.handler = acr.New(b.reg, b.db, b.store, acr.Options{
		Streaming: b.streaming, Teleport: expander,
		Authorizer: b.authority, Authority: b.authority, SoftDelete: opts.SoftDelete, CollectGrace: -time.Hour, // as if an hour had passed
	})
	mux := http.NewServeMux()
	mux.Handle("/acr/v1/", b.handler)
	mux.Handle("/oauth2/", b.authority)
	mux.Handle("/v2/", registry.NewHandler(b.reg, registry.Options{Authorizer: b.authority}))
	server := httptest.NewServer(registry.Wrap(mux, registry.FrontOptions{Authorizer: b.authority}))
	t.Cleanup(server.Close)
	b.host = strings.TrimPrefix(server.URL, "http://")
	return b
}

// client returns a client with an account's password.
func (b *bench) client(user, password string) *acr.Client {
	b.t.Helper()
	c, err := acr.NewClient(b.host, remote.Options{
		Credentials: func(context.Context, string) (remote.Credential, error) {
			return remote.Credential{Username: user, Password: password}, nil
		},
	})
	if err != nil {
		b.t.Fatal(err)
	}
	return c
}

func (b *bench) admin() *acr.Client { return b.client("admin", adminPassword) }

// token makes a token with a scope map of its own, and returns its password.
func (b *bench) token(name string, actions ...string) string {
	b.t.Helper()
	ctx := b.t.Context()
	if _, err := b.authority.CreateScopeMap(ctx, auth.ScopeMap{Name: name, Actions: actions}); err != nil {
		b.t.Fatal(err)
	}
	if _, err := b.authority.CreateToken(ctx, auth.Token{Name: name, ScopeMap: name}); err != nil {
		b.t.Fatal(err)
	}
	password, err := b.authority.GeneratePassword(ctx, name, 1, time.Time{})
	if err != nil {
		b.t.Fatal(err)
	}
	return password
}

// push pushes an image with a layer of this content under the tags.
func push(t *testing.T, reg oci.Registry, repo, content string, tags ...string) oci.Digest {
	t.Helper()
	ctx := t.Context()
	blob := func(mediaType string, content []byte) oci.Descriptor {
		desc := oci.Descriptor{MediaType: mediaType, Digest: oci.DigestOf(content), Size: int64(len(content))}
		if _, err := reg.PushBlob(ctx, repo, desc, bytes.NewReader(content)); err != nil {
			t.Fatal(err)
		}
		return desc
	}
	config, err := json.Marshal(oci.ImageConfig{Platform: oci.Platform{OS: "linux", Architecture: "arm64"}})
	if err != nil {
		t.Fatal(err)
	}
	m := oci.ImageManifest{Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageManifest}
	m.Config = blob(oci.MediaTypeImageConfig, config)
	m.Layers = []oci.Descriptor{blob(oci.MediaTypeLayer, []byte(content))}
	return pushDocument(t, reg, repo, m.MediaType, m, tags...)
}

func pushDocument(t *testing.T, reg oci.Registry, repo, mediaType string, doc any, tags ...string) oci.Digest {
	t.Helper()
	content, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	digest := oci.DigestOf(content)
	for _, ref := range append(tags, digest.String()) {
		if _, err := reg.PushManifest(t.Context(), repo, ref, mediaType, content); err != nil {
			t.Fatal(err)
		}
	}
	return digest
}

// send sends a request as an account, "" is nobody, and returns the answer.
func (b *bench) send(user, password, method, path, body string) (*http.Response, string) {
	b.t.Helper()
	req, err := http.NewRequestWithContext(b.t.Context(), method, "http://"+b.host+path, strings.NewReader(body))
	if err != nil {
		b.t.Fatal(err)
	}
	if user != "" {
		req.SetBasicAuth(user, password)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		b.t.Fatal(err)
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(resp.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	return resp, string(content)
}

// runImports runs the imports of a handler until the test ends or stop is
// called, which waits.
func runImports(t *testing.T, h *acr.Handler) (stop func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	running.Go(func() { h.RunImports(ctx) })
	stop = func() { cancel(); running.Wait() }
	t.Cleanup(stop)
	return stop
}

func off() *bool { return new(bool) }

func on() *bool { yes := true; return &yes }

// codeOf returns the code of an error answer.
func codeOf(body string) string {
	var doc struct{ Errors []oci.Error }
	if json.Unmarshal([]byte(body), &doc) != nil || len(doc.Errors) != 1 {
		return fmt.Sprintf("not the form of an error: %q", body)
	}
	return doc.Errors[0].Code
}
