package hosts_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"sluice/internal/blob"
	"sluice/oci"
)

// A mirror that isn't of use, in whatever way, costs a request or a time-out
// once; everything comes from the registry.
func TestBadMirrorsCostOnce(t *testing.T) {
	for name, mirror := range map[string]func(t *testing.T) (url string, asked func() int){
		"refuses connections": func(*testing.T) (string, func() int) {
			return "http://127.0.0.1:1", func() int { return 0 }
		},
		"is a black hole": func(t *testing.T) (string, func() int) {
			return "http://" + blackHole(t), func() int { return 0 }
		},
		"never answers": stalls(func(net.Conn) {}),
		"stalls in the middle": stalls(func(c net.Conn) {
			_, _ = c.Read(make([]byte, 4<<10)) // the request
			fmt.Fprintf(c, "HTTP/1.1 206 Partial\r\nContent-Type: application/octet-stream\r\nContent-Range: bytes 0-99/%d\r\nContent-Length: 100\r\n\r\nfirst", len(content))
		}),
		"has nothing": func(t *testing.T) (string, func() int) { return counted(serve(t)) },
		"fails": func(t *testing.T) (string, func() int) {
			return counted(serve(t).answerWith(http.StatusInternalServerError))
		},
		"is too busy": func(t *testing.T) (string, func() int) {
			return counted(serve(t).answerWith(http.StatusTooManyRequests))
		},
		"wants a password": func(t *testing.T) (string, func() int) {
			return counted(serve(t).answerWith(http.StatusUnauthorized, "WWW-Authenticate", `Basic realm="x"`))
		},
		"forbids": func(t *testing.T) (string, func() int) { return counted(serve(t).answerWith(http.StatusForbidden)) },
		"shows a page": func(t *testing.T) (string, func() int) {
			return counted(serve(t).answerWith(http.StatusOK, "Content-Type", "text/html"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reg := serve(t).fill(t)
			url, asked := mirror(t)
			r := example(t, open(t, mirrors(reg.URL, url)))
			read(t, r, 0)
			before := asked()
			for i := range int64(20) {
				checkRange(t, r, 10*i, 100)
			}
			if n := asked(); n != before || before > 1 {
				t.Errorf("the mirror was asked %d times for the first range, %d times for all", before, n)
			}
			if len(reg.requests()) < 21 {
				t.Error("not everything came from the registry")
			}
		})
	}
}

// read reads 100 bytes as a node does: what breaks off is asked for again from
// there on.
func read(t *testing.T, r oci.Reader, off int64) {
	t.Helper()
	src := blob.Retry(blob.FromRegistry(r, repo, describe(oci.MediaTypeOctetStream, content)), blob.RetryOptions{})
	body, err := src.ReadRange(t.Context(), off, 100)
	if err != nil {
		t.Error(err)
		return
	}
	defer body.Close()
	if got, err := io.ReadAll(body); err != nil || len(got) != 100 {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// counted is a mirror that says how many blobs it was asked for.
func counted(s *server) (string, func() int) {
	return s.URL, func() int {
		s.mu.Lock()
		defer s.mu.Unlock()
		n := 0
		for _, a := range s.asked {
			if strings.Contains(a, "/blobs/") {
				n++
			}
		}
		return n
	}
}

// stalls is a mirror that does something with a connection, and nothing more.
func stalls(begin func(net.Conn)) func(t *testing.T) (string, func() int) {
	return func(t *testing.T) (string, func() int) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		var all []net.Conn
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				mu.Lock()
				all = append(all, c)
				mu.Unlock()
				begin(c)
			}
		})
		t.Cleanup(func() {
			l.Close()
			wg.Wait()
			for _, c := range all {
				c.Close()
			}
		})
		return "http://" + l.Addr().String(), func() int {
			mu.Lock()
			defer mu.Unlock()
			return len(all)
		}
	}
}

// blackHole returns an address where nothing answers to a SYN: a listener whose
// queue is full.
func blackHole(t *testing.T) string {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	sa, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	addr := fmt.Sprintf("127.0.0.1:%d", sa.(*syscall.SockaddrInet4).Port)
	for range 8 { // more than fit; those that don't are trying until the test ends
		fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { syscall.Close(fd) })
		if err := syscall.Connect(fd, sa); err != nil && err != syscall.EINPROGRESS {
			t.Fatal(err)
		}
	}
	return addr
}

// A mirror that comes back is asked again.
func TestMirrorComesBack(t *testing.T) {
	t.Parallel()
	reg, mirror := serve(t).fill(t), serve(t).fill(t)
	mirror.answerWith(http.StatusServiceUnavailable)
	h := open(t, mirrors(reg.URL, mirror.URL))
	checkRange(t, example(t, h), 0, 10)
	if p := h.Problems(); len(p) != 1 || p[0].Registry != "example.test" || p[0].Host != mirror.URL+"/v2" || !strings.Contains(p[0].Error, "503") {
		t.Errorf("problems are %+v", p)
	}
	mirror.setFront(nil)
	eventually(t, "the mirror is asked again", func() bool {
		reg.requests()
		checkRange(t, example(t, h), 0, 10)
		return len(reg.requests()) == 0
	})
	if p := h.Problems(); len(p) != 0 {
		t.Errorf("problems are %+v", p)
	}
}

// When all hosts but those that failed are of no use, these are asked again.
func TestLeftOutIsBetterThanNothing(t *testing.T) {
	reg, mirror := serve(t).fill(t), serve(t).fill(t)
	mirror.answerWith(http.StatusServiceUnavailable)
	r := example(t, open(t, mirrors(reg.URL, mirror.URL)))
	checkRange(t, r, 0, 10)
	reg.Close()
	mirror.setFront(nil)
	checkRange(t, r, 0, 10)
	// And the registry, which is out now, is asked for what the mirror lacks.
	_, err := r.GetManifest(t.Context(), repo, "v2")
	if err == nil || errors.Is(err, oci.ErrManifestUnknown) || !strings.Contains(err.Error(), "refused") || !strings.Contains(err.Error(), mirror.addr()) {
		t.Errorf("a tag that the mirror lacks and the registry can't tell: %v", err)
	}
}

// The registry's word is final: hosts that failed aren't asked for what it doesn't have.
func TestWordOfTheRegistryIsFinal(t *testing.T) {
	reg, mirror := serve(t).fill(t), serve(t).fill(t)
	mirror.answerWith(http.StatusServiceUnavailable)
	r := example(t, open(t, mirrors(reg.URL, mirror.URL)))
	checkRange(t, r, 0, 10)
	mirror.requests()
	_, err := r.GetManifest(t.Context(), repo, "none")
	if !errors.Is(err, oci.ErrManifestUnknown) {
		t.Errorf("a tag that doesn't exist: %v", err)
	}
	if asked := mirror.requests(); len(asked) > 0 {
		t.Errorf("the mirror was asked %q", asked)
	}
}

// What a mirror sends instead of a manifest, or says of a tag that it isn't asked
// for, isn't believed.
func TestMirrorWithWrongManifests(t *testing.T) {
	reg, mirror := serve(t).fill(t), serve(t).fill(t)
	mirror.setFront(func(w http.ResponseWriter, req *http.Request) bool {
		w.Header().Set("Content-Type", oci.MediaTypeImageManifest)
		fmt.Fprint(w, `{"schemaVersion":2}`)
		return true
	})
	r := example(t, open(t, mirrors(reg.URL, mirror.URL)))
	for range 2 {
		m, err := r.GetManifest(t.Context(), repo, reg.manifest.Descriptor.Digest.String())
		if err != nil || string(m.Content) != string(reg.manifest.Content) {
			t.Errorf("%.100s, %v", m.Content, err)
		}
	}
	if asked := mirror.requests(); len(asked) != 1 {
		t.Errorf("the mirror was asked %q", asked)
	}
}

// A mirror that sends wrong bytes can't make a blob unreadable: a reader who
// doubts gets it from elsewhere, and so does who comes after that.
func TestMirrorWithWrongBytes(t *testing.T) {
	reg, mirror := serve(t).fill(t), serve(t).fill(t)
	mirror.setFront(func(w http.ResponseWriter, req *http.Request) bool {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-3/%d", len(content)))
		w.WriteHeader(http.StatusPartialContent)
		fmt.Fprint(w, "evil")
		return true
	})
	r := example(t, open(t, mirrors(reg.URL, mirror.URL)))
	body, err := r.GetBlobRange(t.Context(), repo, reg.blob.Digest, 0, 4)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(body); string(got) != "evil" {
		t.Fatalf("%q, %v: the mirror wasn't asked", got, err)
	}
	body.Close()
	body, err = r.GetBlobRange(blob.Doubt(t.Context()), repo, reg.blob.Digest, 0, 4)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(body); string(got) != string(content[:4]) {
		t.Errorf("who doubts gets %q, %v", got, err)
	}
	body.Close()
	mirror.requests()
	checkRange(t, r, 0, 4)
	if asked := mirror.requests(); len(asked) > 0 {
		t.Errorf("the mirror is asked again: %q", asked)
	}
	reg.Close() // it's still better than nothing
	if body, err := r.GetBlobRange(t.Context(), repo, reg.blob.Digest, 0, 4); err != nil {
		t.Errorf("without the registry: %v", err)
	} else {
		body.Close()
	}
}

// It may as well be the registry that is wrong, and a mirror that is right: here
// one that lacked the blob at first.
func TestRegistryWithWrongBytes(t *testing.T) {
	reg, mirror := serve(t), serve(t).fill(t)
	reg.setFront(func(w http.ResponseWriter, req *http.Request) bool {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-3/%d", len(content)))
		w.WriteHeader(http.StatusPartialContent)
		fmt.Fprint(w, "evil")
		return true
	})
	r := example(t, open(t, mirrors(reg.URL, mirror.URL)))
	mirror.answerWith(http.StatusServiceUnavailable)
	ctx := t.Context()
	for _, want := range []string{"evil", string(content[:4])} {
		body, err := r.GetBlobRange(ctx, repo, mirror.blob.Digest, 0, 4)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(body); string(got) != want {
			t.Errorf("%q, %v, want %q", got, err, want)
		}
		body.Close()
		mirror.setFront(nil)
		ctx = blob.Doubt(ctx)
	}
}

// Who doubts may have to ask several times until all is there. That doesn't make
// those liars who were asked in the place of the one that was.
func TestDoubtIsAboutWhatCame(t *testing.T) {
	reg, mirror := serve(t).fill(t), serve(t).fill(t)
	r := example(t, open(t, mirrors(reg.URL, mirror.URL)))
	read := func(ctx context.Context) {
		t.Helper()
		body, err := r.GetBlobRange(ctx, repo, reg.blob.Digest, 0, 4)
		if err != nil {
			t.Fatal(err)
		}
		body.Close()
	}
	read(t.Context()) // of the mirror
	doubting := blob.Doubt(t.Context())
	for range 3 {
		read(doubting)
	}
	if asked := mirror.requests(); len(asked) != 1 {
		t.Errorf("the mirror was asked %q", asked)
	}
	if asked := reg.requests(); len(asked) != 3 {
		t.Errorf("the registry was asked %q", asked)
	}
}

// A mirror that stalls costs one time-out also when whoever waits has less
// patience than we; and one that wasn't waited for isn't to blame.
func TestLittlePatience(t *testing.T) {
	reg, mirror := serve(t).fill(t), serve(t).fill(t)
	mirror.setFront(func(_ http.ResponseWriter, req *http.Request) bool {
		<-req.Context().Done()
		return true
	})
	h := open(t, mirrors(reg.URL, mirror.URL))
	r := example(t, h)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.ResolveManifest(ended, repo, "v1"); !errors.Is(err, context.Canceled) || len(h.Problems()) > 0 {
		t.Errorf("%v, problems are %+v", err, h.Problems())
	}
	soon, cancel := context.WithTimeoutCause(t.Context(), 3*time.Second, errors.New("the pull can't wait")) // but longer than what blames nobody
	defer cancel()
	if _, err := r.ResolveManifest(soon, repo, "v1"); err == nil || !strings.Contains(err.Error(), "the pull can't wait") {
		t.Errorf("without patience: %v", err)
	}
	if _, err := r.ResolveManifest(t.Context(), repo, "v1"); err != nil {
		t.Error(err)
	}
	if asked := mirror.requests(); len(asked) != 1 {
		t.Errorf("the mirror was asked %q", asked)
	}
}

// A mirror whose blob has another size is the same.
func TestMirrorWithAnotherSize(t *testing.T) {
	reg, mirror := serve(t).fill(t), serve(t).fill(t)
	mirror.setFront(func(w http.ResponseWriter, req *http.Request) bool {
		w.Header().Set("Content-Range", "bytes 0-99/100")
		w.WriteHeader(http.StatusPartialContent)
		_, _ = w.Write(make([]byte, 100))
		return true
	})
	read(t, example(t, open(t, mirrors(reg.URL, mirror.URL))), 0)
	if len(mirror.requests()) != 1 || len(reg.requests()) != 1 {
		t.Error("not both were asked")
	}
}

// Mirrors are asked for what they are capable of.
func TestCapabilities(t *testing.T) {
	reg, pulls, resolves, refers := serve(t).fill(t), serve(t).fill(t), serve(t).fill(t), serve(t).fill(t)
	r := example(t, open(t, fmt.Sprintf("server = %q\n[host.%q]\ncapabilities = [\"pull\"]\n[host.%q]\ncapabilities = [\"pull\", \"resolve\"]\n[host.%q]\ncapabilities = [\"referrers\"]\n",
		reg.URL, pulls.URL, resolves.URL, refers.URL)))
	checkRange(t, r, 0, 10)
	if _, err := r.GetManifest(t.Context(), repo, reg.manifest.Descriptor.Digest.String()); err != nil {
		t.Error(err)
	}
	if _, err := r.ResolveManifest(t.Context(), repo, "v1"); err != nil {
		t.Error(err)
	}
	referring := 0
	for d, err := range r.Referrers(t.Context(), repo, reg.manifest.Descriptor.Digest, "") {
		if err != nil || d.ArtifactType != "application/x" {
			t.Error(d, err)
		}
		referring++
	}
	if referring != 1 {
		t.Errorf("%d referrers", referring)
	}
	digest := reg.manifest.Descriptor.Digest
	for name, c := range map[string]struct {
		server *server
		want   []string
	}{
		"pull": {pulls, []string{
			"GET /v2/team/app/blobs/" + reg.blob.Digest.String() + "?ns=example.test",
			"GET /v2/team/app/manifests/" + digest.String() + "?ns=example.test",
		}},
		"resolve":   {resolves, []string{"HEAD /v2/team/app/manifests/v1?ns=example.test"}},
		"referrers": {refers, []string{"GET /v2/team/app/referrers/" + digest.String() + "?ns=example.test"}},
		"registry":  {reg, nil},
	} {
		if got := c.server.requests(); !slices.Equal(got, c.want) {
			t.Errorf("%s: asked %q, want %q", name, got, c.want)
		}
	}
}

// Which artifacts an image has is asked of the registry when a mirror knows of
// none, and a mirror's index in a tag counts only if it may resolve tags.
func TestReferrersOfMirrors(t *testing.T) {
	reg, empty := serve(t).fill(t), serve(t)
	r := example(t, open(t, mirrors(reg.URL, empty.URL)))
	n := 0
	for _, err := range r.Referrers(t.Context(), repo, reg.manifest.Descriptor.Digest, "") {
		if err != nil {
			t.Error(err)
		}
		n++
	}
	if n != 1 || len(empty.requests()) != 1 {
		t.Errorf("%d referrers", n)
	}
	// Files that don't know of the capability, and a registry out of reach.
	r = example(t, open(t, fmt.Sprintf("server = \"http://%s\"\n[host.%q]\ncapabilities = [\"pull\", \"resolve\"]\n", blackHole(t), reg.URL)))
	for range 2 {
		for d, err := range r.Referrers(t.Context(), repo, reg.manifest.Descriptor.Digest, "") {
			if err != nil || d.ArtifactType != "application/x" {
				t.Error(d, err)
			}
		}
	}
	r = example(t, open(t, fmt.Sprintf("server = %q\ncapabilities = [\"pull\"]\n", reg.URL)))
	for _, err := range r.Referrers(t.Context(), repo, reg.manifest.Descriptor.Digest, "") {
		if !errors.Is(err, oci.ErrUnsupported) || !strings.Contains(err.Error(), "capabilities") {
			t.Errorf("a registry that nobody may ask for referrers: %v", err)
		}
	}
}
