// Package smbtest is the suite that every smb.Share passes, with whatever file server
// it reads from: smbmem's, a Samba.
package smbtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sluice/internal/blob"
	"sluice/internal/blob/blobtest"
	"sluice/internal/node/smb"
	"sluice/oci"
)

// Server is a file server with one share. Its methods end the test when they fail.
type Server interface {
	// Put makes a file, and the directories it is in, or puts another in its place.
	Put(path string, content []byte)

	// Truncate shortens a file that may be open.
	Truncate(path string, size int64)

	// Login returns credentials that are good.
	Login() smb.Login

	// Stop ends the server, without a word to those who are connected; Start starts
	// it again, where it was.
	Stop()
	Start()

	// Share returns the share, which the test closes.
	Share(o smb.Options) smb.Share
}

// bound is what no read takes longer than, whatever happens to the server: Timeout
// twice, for what hangs and for connecting anew, pauses between attempts, and patience
// with a busy machine.
const (
	timeout = 3 * time.Second
	bound   = 30 * time.Second
)

// Run tests a share; start is called once for each test.
func Run(t *testing.T, start func(t *testing.T) Server) {
	for _, tt := range []struct {
		name string
		test func(t *testing.T, s Server)
	}{
		{"Source", testSource},
		{"ReadFile", testReadFile},
		{"Missing", testMissing},
		{"Size", testSize},
		{"Replaced", testReplaced},
		{"Paths", testPaths},
		{"ManyFiles", testManyFiles},
		{"ManyReaders", testManyReaders},
		{"Refused", testRefused},
		{"Renewed", testRenewed},
		{"NoShare", testNoShare},
		{"NoCredentials", testNoCredentials},
		{"Stopped", testStopped},
		{"StoppedInReads", testStoppedInReads},
		{"Close", testClose},
	} {
		t.Run(tt.name, func(t *testing.T) { tt.test(t, start(t)) })
	}
}

// open returns the share of a server, reached with good credentials.
func open(t *testing.T, s Server) smb.Share {
	t.Helper()
	return openWith(t, s, func(context.Context, string) (smb.Login, error) { return s.Login(), nil })
}

func openWith(t *testing.T, s Server, login func(context.Context, string) (smb.Login, error)) smb.Share {
	t.Helper()
	share := s.Share(smb.Options{Login: login, Timeout: timeout})
	t.Cleanup(func() {
		began := time.Now()
		_ = share.Close() // the server may be gone
		if took := time.Since(began); took > bound {
			t.Errorf("Close took %v", took)
		}
	})
	return share
}

// read reads a file whole, and checks that it took no longer than it may.
func read(t *testing.T, share smb.Share, path string, want []byte) error {
	t.Helper()
	began := time.Now()
	got := make([]byte, len(want))
	err := blob.ReadFull(t.Context(), share.Open(path, int64(len(want)), oci.DigestOf(want)), got, 0)
	if took := time.Since(began); took > bound {
		t.Errorf("reading %s took %v, and ended with %v", path, took, err)
	}
	if err == nil && !bytes.Equal(got, want) {
		t.Errorf("%s: wrong bytes", path)
	}
	return err
}

// eventually reads a file until it can be read.
func eventually(t *testing.T, share smb.Share, path string, want []byte) {
	t.Helper()
	for deadline := time.Now().Add(bound); ; time.Sleep(10 * time.Millisecond) {
		err := read(t, share, path, want)
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s can't be read again: %v", path, err)
		}
	}
}

func testSource(t *testing.T, s Server) {
	share := open(t, s)
	n := 0
	blobtest.Run(t, func(t *testing.T, content []byte) blob.Source {
		n++
		path := fmt.Sprintf("_layers/sha256-%d.vhd", n)
		s.Put(path, content)
		return share.Open(path, int64(len(content)), oci.DigestOf(content))
	})
}

func testReadFile(t *testing.T, s Server) {
	share := open(t, s)
	for _, size := range []int{0, 1, 32, 4096, 1_500_000} {
		content := blobtest.Content(size)
		s.Put("_layers/sums", content)
		for _, limit := range []int{size, size + 1, size * 3} {
			if got, err := share.ReadFile(t.Context(), "_layers/sums", int64(limit)); err != nil || !bytes.Equal(got, content) {
				t.Errorf("%d bytes, limit %d: %d bytes, %v", size, limit, len(got), err)
			}
		}
		if size > 0 {
			if _, err := share.ReadFile(t.Context(), "_layers/sums", int64(size-1)); !errors.Is(err, oci.ErrSizeInvalid) {
				t.Errorf("more than the limit: %v", err)
			}
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := share.ReadFile(ctx, "_layers/sums", 1<<30); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled before: %v", err)
	}
}

func testMissing(t *testing.T, s Server) {
	share := open(t, s)
	s.Put("here", []byte("content"))
	for _, path := range []string{"nothing", "no/such/directory", "here/file"} {
		if _, err := share.ReadFile(t.Context(), path, 100); !errors.Is(err, fs.ErrNotExist) || !blob.Final(err) {
			t.Errorf("ReadFile of %s: %v", path, err)
		}
		if err := read(t, share, path, []byte("content")); !errors.Is(err, fs.ErrNotExist) || !blob.Final(err) {
			t.Errorf("reading %s: %v", path, err)
		}
	}
	s.Put("nothing", []byte("something"))
	eventually(t, share, "nothing", []byte("something")) // the kernel remembers for a second what isn't there
}

func testSize(t *testing.T, s Server) {
	share := open(t, s)
	content := blobtest.Content(3 << 20)
	s.Put("disk", content)
	for _, wrong := range []int{len(content) + 1, len(content) - 1, 1} {
		err := read(t, share, "disk", make([]byte, wrong))
		if !errors.Is(err, oci.ErrSizeInvalid) || !blob.Final(err) || !mentions(err, fmt.Sprint(len(content)), fmt.Sprint(wrong), "disk") {
			t.Errorf("said to have %d bytes: %v", wrong, err)
		}
	}
	if err := read(t, share, "disk", content); err != nil {
		t.Errorf("after that: %v", err)
	}
	s.Truncate("disk", 1<<20)
	if err := read(t, share, "disk", content); !errors.Is(err, oci.ErrSizeInvalid) || !mentions(err, fmt.Sprint(len(content)), fmt.Sprint(1<<20)) {
		t.Errorf("truncated: %v", err)
	}
	s.Put("disk", content)
	eventually(t, share, "disk", content) // what was read ahead of the error may just have it open as it was
}

func mentions(err error, words ...string) bool {
	for _, w := range words {
		if !bytes.Contains([]byte(err.Error()), []byte(w)) {
			return false
		}
	}
	return true
}

// Who doubts what came gets what is there now, not what was kept open.
func testReplaced(t *testing.T, s Server) {
	share := open(t, s)
	wrong, right := bytes.Repeat([]byte("wrong"), 1000), bytes.Repeat([]byte("right"), 1000)
	s.Put("disk", wrong)
	if err := read(t, share, "disk", wrong); err != nil {
		t.Fatal(err)
	}
	s.Put("disk", right)
	got := make([]byte, len(right))
	if err := blob.ReadFull(blob.Doubt(t.Context()), share.Open("disk", int64(len(right)), oci.DigestOf(right)), got, 0); err != nil || !bytes.Equal(got, right) {
		t.Errorf("%.10q, %v", got, err)
	}
}

func testPaths(t *testing.T, s Server) {
	share := open(t, s)
	s.Put("_layers/ä ö", []byte("content"))
	if err := read(t, share, "_layers/ä ö", []byte("content")); err != nil {
		t.Error(err)
	}
	for _, path := range []string{"", ".", "..", "../x", "/_layers", "a/../b", "a//b", "a/", `a\b`, "a:b", "a*", "a\x00b", "a\nb"} {
		if _, err := share.ReadFile(t.Context(), path, 10); !errors.Is(err, oci.ErrNameInvalid) {
			t.Errorf("%q: %v", path, err)
		}
	}
}

// More files than are kept open.
func testManyFiles(t *testing.T, s Server) {
	share := open(t, s)
	const files = 150
	for i := range files {
		s.Put(fmt.Sprint("file", i), fmt.Append(nil, "content of ", i))
	}
	var wg sync.WaitGroup
	for r := range 4 {
		wg.Go(func() {
			for i := range files {
				i = (i + r*files/4) % files
				if err := read(t, share, fmt.Sprint("file", i), fmt.Append(nil, "content of ", i)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func testManyReaders(t *testing.T, s Server) {
	share := open(t, s)
	content := blobtest.Content(6<<20 + 13)
	s.Put("disk", content)
	source := share.Open("disk", int64(len(content)), oci.DigestOf(content))
	var wg sync.WaitGroup
	for r := range 64 {
		wg.Go(func() {
			for i := range 4 {
				off := (r*1_000_003 + i*77_777) % len(content)
				got := make([]byte, min(256<<10<<i, len(content)-off))
				if err := blob.ReadFull(t.Context(), source, got, int64(off)); err != nil || !bytes.Equal(got, content[off:off+len(got)]) {
					t.Errorf("%d bytes at %d: %v", len(got), off, err)
				}
			}
		})
	}
	wg.Wait()
}

// Credentials that are refused are asked for again, once for all who wait.
func testRefused(t *testing.T, s Server) {
	s.Put("disk", []byte("content"))
	var good atomic.Bool
	var asked, again atomic.Int32
	share := openWith(t, s, func(_ context.Context, refused string) (smb.Login, error) {
		l := s.Login()
		asked.Add(1)
		switch {
		case refused == l.Password:
			t.Error("the right password is said to be refused")
		case refused != "":
			again.Add(1)
		}
		if !good.Load() {
			l.Password = `wrong,vers=1.0,"` // which is no option of a mount
		}
		return l, nil
	})
	// Asked twice: the second time, for another than the one that was refused.
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if err := read(t, share, "disk", []byte("content")); !errors.Is(err, smb.ErrRefused) || !blob.Final(err) {
				t.Errorf("with a wrong password: %v", err)
			}
		})
	}
	wg.Wait()
	if n := asked.Load(); n < 2 || n >= 16 || again.Load() != n-1 {
		t.Errorf("asked %d times, %d of them for another", n, again.Load())
	}
	good.Store(true)
	for range 2 {
		if err := read(t, share, "disk", []byte("content")); err != nil {
			t.Errorf("with the right one: %v", err)
		}
	}
}

// Credentials that have been good, and are no more, are renewed in flight.
func testRenewed(t *testing.T, s Server) {
	content := blobtest.Content(1 << 20)
	s.Put("disk", content)
	var asked atomic.Int32
	share := openWith(t, s, func(_ context.Context, refused string) (smb.Login, error) {
		l := s.Login()
		if asked.Add(1) == 1 {
			l.Password, l.Expires = "out of date", time.Now().Add(time.Hour)
		}
		return l, nil
	})
	if err := read(t, share, "disk", content); err != nil {
		t.Error(err)
	}
	if n := asked.Load(); n != 2 {
		t.Errorf("asked %d times", n)
	}
	if err := read(t, share, "disk", content); err != nil || asked.Load() != 2 {
		t.Errorf("over the same connection: %v, asked %d times", err, asked.Load())
	}
}

func testNoShare(t *testing.T, s Server) {
	share := openWith(t, s, func(context.Context, string) (smb.Login, error) {
		l := s.Login()
		l.Share = "nosuchshare"
		return l, nil
	})
	if err := read(t, share, "disk", []byte("content")); !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, smb.ErrRefused) || !mentions(err, "nosuchshare") {
		t.Errorf("%v", err)
	}
}

func testNoCredentials(t *testing.T, s Server) {
	s.Put("disk", []byte("content"))
	none := errors.New("the registry is gone")
	var gone atomic.Bool
	gone.Store(true)
	share := openWith(t, s, func(context.Context, string) (smb.Login, error) {
		if gone.Load() {
			return smb.Login{}, none
		}
		return s.Login(), nil
	})
	if err := read(t, share, "disk", []byte("content")); !errors.Is(err, none) || blob.Final(err) {
		t.Errorf("%v", err)
	}
	gone.Store(false)
	eventually(t, share, "disk", []byte("content"))
}

func testStopped(t *testing.T, s Server) {
	share := open(t, s)
	content := blobtest.Content(1 << 20)
	s.Put("disk", content)
	if err := read(t, share, "disk", content); err != nil {
		t.Fatal(err)
	}
	s.Stop()
	for range 3 {
		if err := read(t, share, "disk", content); !errors.Is(err, smb.ErrUnreachable) || blob.Final(err) {
			t.Errorf("while the server is gone: %v", err)
		}
	}
	// A reader waits no longer than it wants to.
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	began := time.Now()
	if _, err := share.ReadFile(ctx, "disk", 2<<20); err == nil || time.Since(began) > bound {
		t.Errorf("after %v: %v", time.Since(began), err)
	}
	s.Start()
	eventually(t, share, "disk", content)
}

// A read while the server goes gives the right bytes or an error, and soon.
func testStoppedInReads(t *testing.T, s Server) {
	share := open(t, s)
	content := blobtest.Content(8 << 20)
	s.Put("disk", content)
	for range 3 {
		var wg sync.WaitGroup
		begun := make(chan struct{}, 8)
		for range cap(begun) {
			wg.Go(func() {
				for first := true; ; first = false {
					err := read(t, share, "disk", content)
					if first {
						begun <- struct{}{}
					}
					if err == nil {
						continue
					}
					if !errors.Is(err, smb.ErrUnreachable) {
						t.Errorf("while the server ends: %v", err)
					}
					return
				}
			})
		}
		for range cap(begun) {
			<-begun
		}
		s.Stop()
		wg.Wait()
		s.Start()
		eventually(t, share, "disk", content)
	}
}

func testClose(t *testing.T, s Server) {
	share := open(t, s)
	content := blobtest.Content(8 << 20)
	s.Put("disk", content)
	source := share.Open("disk", int64(len(content)), oci.DigestOf(content))
	r, err := source.ReadRange(t.Context(), 0, source.Size())
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := io.ReadFull(r, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	if err := share.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if _, err := io.Copy(io.Discard, r); err == nil {
		t.Error("a reader goes on after the share was closed")
	}
	if err := read(t, share, "disk", content); !errors.Is(err, smb.ErrClosed) {
		t.Errorf("opened after that: %v", err)
	}
	if err := share.Close(); err != nil {
		t.Errorf("closed again: %v", err)
	}
}
