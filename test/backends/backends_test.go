package backends

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net/http"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sluice/internal/storage"
	"sluice/internal/storage/azureblob"
	"sluice/internal/storage/s3"
	"sluice/internal/storage/storagetest"
	"sluice/internal/stored"
	"sluice/test/bed"
)

// identity lets blobs of one name share their bytes, and those of the registry
// as it wants.
func identity(key string) string {
	if strings.HasPrefix(key, "blobs/") {
		return "name/" + path.Base(key)
	}
	return stored.BlobIdentity(key)
}

// place is a server of objects. Each open with the same name opens the same
// bucket or container, as another replica does; it is made the first time.
type place interface {
	open(t *testing.T, name string) *storage.Objects
	missing(t *testing.T) *storage.Objects // one in a bucket that doesn't exist
	secret() string
}

// eachPlace runs a test on every server.
func eachPlace(t *testing.T, test func(t *testing.T, p place)) {
	src, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	say := func(s string) { t.Log(s) }
	t.Run("azurite", func(t *testing.T) {
		server, err := bed.StartAzurite(t.Context(), src, t.TempDir(), say)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(server.Stop)
		test(t, &azurite{server: server, made: map[string]bool{}})
	})
	t.Run("minio", func(t *testing.T) {
		server, err := bed.StartMinIO(t.Context(), src, t.TempDir(), say)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(server.Stop)
		test(t, &minio{server: server, made: map[string]bool{}})
	})
}

type azurite struct {
	server *bed.Azurite
	made   map[string]bool
}

func (a *azurite) open(t *testing.T, name string) *storage.Objects {
	t.Helper()
	if !a.made[name] {
		if err := a.server.NewContainer(t.Context(), name); err != nil {
			t.Fatal(err)
		}
		a.made[name] = true
	}
	o, err := azureblob.Open(t.Context(), azureblob.Options{ConnectionString: a.server.ConnectionString(), Container: name, Identity: identity})
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func (a *azurite) missing(t *testing.T) *storage.Objects {
	a.made["missing"] = true
	return a.open(t, "missing")
}

func (a *azurite) secret() string { return a.server.Key }

type minio struct {
	server *bed.MinIO
	made   map[string]bool
}

func (m *minio) open(t *testing.T, name string) *storage.Objects {
	t.Helper()
	if !m.made[name] {
		if err := m.server.NewBucket(name); err != nil {
			t.Fatal(err)
		}
		m.made[name] = true
	}
	o, err := s3.Open(t.Context(), s3.Options{
		Endpoint: m.server.Addr, Bucket: name, Region: "us-east-1", Insecure: true,
		AccessKey: m.server.AccessKey, SecretKey: m.server.SecretKey, Identity: identity,
	})
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func (m *minio) missing(t *testing.T) *storage.Objects {
	m.made["missing"] = true
	return m.open(t, "missing")
}

func (m *minio) secret() string { return m.server.SecretKey }

func TestConformance(t *testing.T) {
	eachPlace(t, func(t *testing.T, p place) {
		n := 0
		storagetest.Run(t, func(t *testing.T) storage.Store {
			n++
			return p.open(t, fmt.Sprintf("suite-%d", n))
		})
	})
}

func TestCheck(t *testing.T) {
	eachPlace(t, func(t *testing.T, p place) {
		if err := p.open(t, "check").Check(t.Context()); err != nil {
			t.Error(err)
		}
		err := p.missing(t).Check(t.Context())
		if err == nil || !strings.Contains(err.Error(), ": create the ") || strings.Contains(err.Error(), p.secret()) {
			t.Errorf("without bucket: %v", err)
		}
	})
}

// One replica begins an upload, another goes on, a third commits; two push the
// same blob; all read it.
func TestReplicas(t *testing.T) {
	eachPlace(t, func(t *testing.T, p place) {
		replicas := []*storage.Objects{p.open(t, "replicas"), p.open(t, "replicas"), p.open(t, "replicas")}
		var want []byte
		u, err := replicas[0].StartUpload(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		u.Close()
		for i, r := range replicas {
			if u, err = r.ResumeUpload(t.Context(), u.ID()); err != nil {
				t.Fatal(err)
			}
			piece := bytes.Repeat([]byte{byte('a' + i)}, 7<<20)
			want = append(want, piece...)
			if _, err := u.Write(piece); err != nil {
				t.Fatal(err)
			}
			if i < 2 {
				if err := u.Checkpoint(t.Context(), []byte{byte(i)}); err != nil {
					t.Fatal(err)
				}
				u.Close()
			}
		}
		if err := u.Commit(t.Context(), "blobs/a/1"); err != nil {
			t.Fatal(err)
		}
		for _, r := range replicas {
			got, err := storage.ReadAll(t.Context(), r, "blobs/a/1", 1<<30)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		}
		var wg sync.WaitGroup
		for i, r := range replicas {
			wg.Go(func() {
				key := fmt.Sprintf("blobs/c%d/2", i)
				if err := store(t.Context(), r, key, bytes.NewReader(want)); err != nil {
					t.Error(err)
					return
				}
				got, err := storage.ReadAll(t.Context(), replicas[(i+1)%3], key, 1<<30)
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: %d bytes, %v", key, len(got), err)
				}
			})
		}
		wg.Wait()
		if r, err := replicas[0].Sweep(t.Context(), time.Hour); err != nil || r != (storage.SweepResult{}) {
			t.Errorf("Sweep = %+v, %v", r, err)
		}
	})
}

// store uploads what r yields.
func store(ctx context.Context, s storage.Store, key string, r io.Reader) error {
	u, err := s.StartUpload(ctx)
	if err != nil {
		return err
	}
	defer u.Close()
	if _, err := io.Copy(u, r); err != nil {
		return err
	}
	return u.Commit(ctx, key)
}

// What was uploaded is read back before it is an object, and then becomes one.
func TestContent(t *testing.T) {
	eachPlace(t, func(t *testing.T, p place) {
		o := p.open(t, "content")
		want := bytes.Repeat([]byte("0123456789abcdef"), 18<<16)
		u, err := o.StartUpload(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := u.Write(want); err != nil {
			t.Fatal(err)
		}
		if err := u.Checkpoint(t.Context(), []byte("state")); err != nil {
			t.Fatal(err)
		}
		r, err := u.Content(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		r.Close()
		u.Close() // the process ends here
		if u, err = p.open(t, "content").ResumeUpload(t.Context(), u.ID()); err != nil {
			t.Fatal(err)
		}
		if n, state := u.Position(); n != int64(len(want)) || string(state) != "state" {
			t.Errorf("resumed at %d, %q", n, state)
		}
		if err := u.Commit(t.Context(), "blobs/a/1"); err != nil {
			t.Fatal(err)
		}
		if got, err := storage.ReadAll(t.Context(), o, "blobs/a/1", 1<<30); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	})
}

func TestSignedURL(t *testing.T) {
	eachPlace(t, func(t *testing.T, p place) {
		o := p.open(t, "signed")
		want := bytes.Repeat([]byte("0123456789"), 100_000)
		if err := store(t.Context(), o, "blobs/a/1", bytes.NewReader(want)); err != nil {
			t.Fatal(err)
		}
		if err := o.Put(t.Context(), "dir/_tags/sha256:1", []byte("small")); err != nil {
			t.Fatal(err)
		}
		for key, want := range map[string]string{"blobs/a/1": string(want[5:5005]), "dir/_tags/sha256:1": ""} {
			address, err := o.SignedURL(t.Context(), key, time.Minute)
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(address, p.secret()) {
				t.Errorf("%s has the secret", address)
			}
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, address, nil)
			if err != nil {
				t.Fatal(err)
			}
			if want != "" {
				req.Header.Set("Range", "bytes=5-5004")
			} else {
				want = "small"
			}
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || string(got) != want {
				t.Errorf("%s yields %s, %.200q, %v", key, resp.Status, got, err)
			}
		}
		if _, err := o.SignedURL(t.Context(), "none", time.Minute); !errors.Is(err, storage.ErrNotFound) {
			t.Errorf("URL of nothing: %v", err)
		}
	})
}

// An upload of 300 MiB takes the memory of two parts and of its requests.
func TestMemory(t *testing.T) {
	eachPlace(t, func(t *testing.T, p place) {
		const size, bound = 300 << 20, 64 << 20
		o := p.open(t, "memory")
		runtime.GC()
		var before runtime.MemStats
		runtime.ReadMemStats(&before)
		var peak atomic.Uint64
		done := make(chan struct{})
		var watch sync.WaitGroup
		watch.Go(func() {
			for {
				select {
				case <-done:
					return
				case <-time.After(20 * time.Millisecond):
					var m runtime.MemStats
					runtime.ReadMemStats(&m)
					peak.Store(max(peak.Load(), m.HeapInuse))
				}
			}
		})
		sum := sha256.New()
		begun := time.Now()
		err := store(t.Context(), o, "blobs/a/1", io.TeeReader(io.LimitReader(rand.NewChaCha8([32]byte{1}), size), sum))
		stored := time.Since(begun)
		if err == nil {
			err = same(t.Context(), o, "blobs/a/1", size, sum)
		}
		close(done)
		watch.Wait()
		if err != nil {
			t.Fatal(err)
		}
		grown := int64(peak.Load()) - int64(before.HeapInuse)
		t.Logf("stored in %v, read in %v; heap grew by %d MiB", stored.Round(time.Millisecond), (time.Since(begun) - stored).Round(time.Millisecond), grown>>20)
		if grown > bound {
			t.Errorf("heap grew by %d MiB, more than %d", grown>>20, bound>>20)
		}
	})
}

// same reads an object and compares it to what was hashed.
func same(ctx context.Context, s storage.Store, key string, size int64, sum hash.Hash) error {
	r, err := s.Open(ctx, key, 0, -1)
	if err != nil {
		return err
	}
	defer r.Close()
	got := sha256.New()
	n, err := r.WriteTo(got)
	if err != nil || n != size || !bytes.Equal(got.Sum(nil), sum.Sum(nil)) {
		return fmt.Errorf("%d bytes that are not what was stored: %w", n, err)
	}
	return nil
}
