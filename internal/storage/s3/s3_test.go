package s3_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"path"
	"strings"
	"testing"
	"time"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"

	"sluice/internal/storage"
	"sluice/internal/storage/s3"
	"sluice/internal/storage/storagetest"
)

const secret = "not-to-be-seen"

// serve starts an S3 server in this process, with one bucket.
func serve(t *testing.T) s3.Options {
	t.Helper()
	backend := s3mem.New()
	if err := backend.CreateBucket("registry"); err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(gofakes3.New(backend, gofakes3.WithLogger(gofakes3.DiscardLog())).Server())
	t.Cleanup(server.Close)
	return s3.Options{
		Endpoint: strings.TrimPrefix(server.URL, "http://"), Bucket: "registry", Region: "us-east-1",
		AccessKey: "access", SecretKey: secret, Insecure: true,
		Identity: func(key string) string {
			if strings.HasPrefix(key, "blobs") {
				return path.Base(key)
			}
			return ""
		},
	}
}

func open(t *testing.T, opts s3.Options) *storage.Objects {
	t.Helper()
	o, err := s3.Open(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func TestConformance(t *testing.T) {
	storagetest.Run(t, func(t *testing.T) storage.Store { return open(t, serve(t)) })
}

// An object of several parts, made by two processes, shared, read by URL, swept.
func TestParts(t *testing.T) {
	opts := serve(t)
	opts.Prefix = "below"
	one, two := open(t, opts), open(t, opts)
	if err := one.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte("0123456789abcdef"), 20<<16) // 20 MiB
	u, err := one.StartUpload(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := u.Write(want[:11<<20]); err != nil {
		t.Fatal(err)
	}
	if err := u.Checkpoint(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	u.Close()
	if u, err = two.ResumeUpload(t.Context(), u.ID()); err != nil {
		t.Fatal(err)
	}
	if _, err := u.Write(want[11<<20:]); err != nil {
		t.Fatal(err)
	}
	if err := u.Commit(t.Context(), "blobs/a/1"); err != nil {
		t.Fatal(err)
	}
	if err := one.Link(t.Context(), "blobs/a/1", "blobs/b/1"); err != nil {
		t.Fatal(err)
	}
	got, err := storage.ReadAll(t.Context(), one, "blobs/b/1", 1<<30)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %d bytes, %v", len(got), err)
	}
	address, err := one.SignedURL(t.Context(), "blobs/b/1", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.Get(address)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if got, err := io.ReadAll(resp.Body); err != nil || !bytes.Equal(got, want) {
		t.Errorf("URL yields %d bytes, %v, %s", len(got), err, resp.Status)
	}
	if r, err := two.Sweep(t.Context(), time.Hour); err != nil || r != (storage.SweepResult{}) {
		t.Errorf("Sweep = %+v, %v", r, err)
	}
	if err := one.Delete(t.Context(), "blobs/a/1"); err != nil {
		t.Fatal(err)
	}
	if _, err := one.SignedURL(t.Context(), "blobs/a/1", time.Minute); !errors.Is(err, storage.ErrNotFound) {
		t.Errorf("URL of a deleted object: %v", err)
	}
}

// What is wrong is said, with what to do, and without the secret.
func TestCheck(t *testing.T) {
	opts := serve(t)
	opts.Bucket = "missing"
	err := open(t, opts).Check(t.Context())
	if err == nil || !strings.Contains(err.Error(), "create the bucket") || !strings.Contains(err.Error(), "missing") || strings.Contains(err.Error(), secret) {
		t.Errorf("Check without bucket: %v", err)
	}
	opts.Endpoint = "127.0.0.1:1"
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := open(t, opts).Check(ctx); err == nil || !strings.Contains(err.Error(), opts.Endpoint) || strings.Contains(err.Error(), secret) {
		t.Errorf("Check without server: %v", err)
	}
	for _, bad := range []s3.Options{{}, {Bucket: "b", AccessKey: "a"}, {Bucket: "b", Endpoint: "http://a/b"}, {Bucket: "b", Prefix: "../a"}} {
		if _, err := s3.Open(t.Context(), bad); err == nil {
			t.Errorf("Open(%+v) succeeded", bad)
		}
	}
}
