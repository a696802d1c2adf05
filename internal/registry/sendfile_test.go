package registry_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"sluice/internal/index"
	"sluice/internal/registry"
	"sluice/internal/storage"
	"sluice/internal/stored"
	"sluice/oci"
)

// fileConn counts the bytes that come to the connection as a file, which are
// those that the kernel moves by itself.
type fileConn struct {
	*net.TCPConn
	bytes *atomic.Int64
}

func (c fileConn) ReadFrom(r io.Reader) (int64, error) {
	n, err := c.TCPConn.ReadFrom(r)
	if l, ok := r.(*io.LimitedReader); ok {
		r = l.R
	}
	if _, ok := r.(*os.File); ok {
		c.bytes.Add(n)
	}
	return n, err
}

type fileListener struct {
	net.Listener
	bytes *atomic.Int64
}

func (l fileListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return fileConn{c.(*net.TCPConn), l.bytes}, nil
}

// openStored returns a registry on a store, which takes what comes.
func openStored(t *testing.T, store storage.Store) *stored.Registry {
	t.Helper()
	db, err := index.Open(t.Context(), index.Options{URL: "sqlite::memory:"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return stored.New(store, db, stored.Options{AllowStreamingPush: true})
}

func openLocal(t testing.TB, dir string) *storage.Local {
	t.Helper()
	store, err := storage.OpenLocal(dir, storage.LocalOptions{Identity: stored.BlobIdentity})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	return store
}

// Blobs must go from page cache to socket without passing through the program:
// nearly all of a pull is that.
func TestSendfile(t *testing.T) {
	reg := openStored(t, openLocal(t, t.TempDir()))
	content := bytes.Repeat([]byte("0123456789abcdef"), 3<<16+1) // several pieces and a rest
	desc := oci.Descriptor{Digest: oci.DigestOf(content), Size: int64(len(content))}
	if _, err := reg.PushBlob(t.Context(), "a", desc, bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	var sent atomic.Int64
	server := httptest.NewUnstartedServer(registry.NewHandler(reg, registry.Options{}))
	server.Listener = fileListener{server.Listener, &sent}
	server.Start()
	t.Cleanup(server.Close)
	for _, rng := range []string{"", "bytes=1000-2999999", "bytes=-5000"} {
		req, err := http.NewRequest(http.MethodGet, fmt.Sprintf("%s/v2/a/blobs/%s", server.URL, desc.Digest), nil)
		if err != nil {
			t.Fatal(err)
		}
		want := content
		switch rng {
		case "bytes=1000-2999999":
			want = content[1000:3000000]
		case "bytes=-5000":
			want = content[len(content)-5000:]
		}
		req.Header.Set("Range", rng)
		before := sent.Load()
		resp, err := server.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || sha256.Sum256(got) != sha256.Sum256(want) {
			t.Errorf("range %q: %d bytes that differ from the %d wanted (%v)", rng, len(got), len(want), err)
		}
		// The server counts after the client may have read it all. The first
		// 512 bytes net/http always takes by itself.
		for deadline := time.Now().Add(time.Minute); sent.Load()-before < int64(len(want))-512 && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond)
		}
		if n := sent.Load() - before; n < int64(len(want))-512 {
			t.Errorf("range %q: %d of %d bytes were sent as a file", rng, n, len(want))
		}
	}
}
