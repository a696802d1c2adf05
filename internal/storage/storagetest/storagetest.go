// Package storagetest is the conformance suite of storage.Store: Run holds an
// implementation to every promise of the interface that can be seen from
// outside.
package storagetest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/storage"
)

// Run tests the stores that open returns, an empty one at each call.
func Run(t *testing.T, open func(t *testing.T) storage.Store) {
	tests := []struct {
		name string
		test func(t *testing.T, s storage.Store)
	}{
		{"Put", testPut},
		{"Open", testOpen},
		{"OpenSurvives", testOpenSurvives},
		{"Keys", testKeys},
		{"List", testList},
		{"Link", testLink},
		{"Upload", testUpload},
		{"UploadResume", testUploadResume},
		{"UploadCancel", testUploadCancel},
		{"UploadExclusive", testUploadExclusive},
		{"CommitRace", testCommitRace},
		{"PutRace", testPutRace},
		{"DeleteRace", testDeleteRace},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { tt.test(t, open(t)) })
	}
}

func testPut(t *testing.T, s storage.Store) {
	ctx := t.Context()
	for _, content := range []string{"one", "", "another, longer"} {
		put(t, s, "a/b", content)
		wantContent(t, s, "a/b", content)
	}
	if err := s.Put(ctx, "a/big", make([]byte, storage.MaxPut+1)); err == nil {
		t.Error("put more than MaxPut")
	}
	wantNone(t, s, "a/big")
	if err := s.Delete(ctx, "a/b"); err != nil {
		t.Fatal(err)
	}
	wantNone(t, s, "a/b")
	if err := s.Delete(ctx, "a/b"); !errors.Is(err, storage.ErrNotFound) {
		t.Errorf("second delete: %v, want ErrNotFound", err)
	}
	put(t, s, "a/b", "again")
	wantContent(t, s, "a/b", "again")

	if _, err := storage.ReadAll(ctx, s, "a/b", 4); err == nil {
		t.Error("ReadAll returned more than its limit")
	}
}

func testOpen(t *testing.T, s storage.Store) {
	const content = "0123456789"
	put(t, s, "k", content)
	for _, tt := range []struct {
		offset, length int64
		want           string
	}{
		{0, -1, content}, {0, 10, content}, {0, 100, content}, {3, 4, "3456"},
		{9, -1, "9"}, {8, 100, "89"}, {0, 0, ""}, {10, -1, ""}, {10, 5, ""},
	} {
		o, err := s.Open(t.Context(), "k", tt.offset, tt.length)
		if err != nil {
			t.Errorf("Open(%d, %d): %v", tt.offset, tt.length, err)
			continue
		}
		if o.Size() != int64(len(content)) {
			t.Errorf("Open(%d, %d): Size = %d", tt.offset, tt.length, o.Size())
		}
		// Half by Read, the rest by WriteTo.
		half := make([]byte, len(tt.want)/2)
		if _, err := io.ReadFull(o, half); err != nil {
			t.Errorf("Open(%d, %d): read: %v", tt.offset, tt.length, err)
		}
		var rest bytes.Buffer
		if _, err := o.WriteTo(&rest); err != nil {
			t.Errorf("Open(%d, %d): WriteTo: %v", tt.offset, tt.length, err)
		}
		if got := string(half) + rest.String(); got != tt.want {
			t.Errorf("Open(%d, %d) yields %q, want %q", tt.offset, tt.length, got, tt.want)
		}
		if err := o.Close(); err != nil {
			t.Error(err)
		}
	}
	for _, offset := range []int64{-1, 11, 1 << 62} {
		if _, err := s.Open(t.Context(), "k", offset, 1); !errors.Is(err, storage.ErrRange) {
			t.Errorf("Open at %d: %v, want ErrRange", offset, err)
		}
	}
}

func testOpenSurvives(t *testing.T, s storage.Store) {
	put(t, s, "k", "old content")
	first, err := s.Open(t.Context(), "k", 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	put(t, s, "k", "new")
	second, err := s.Open(t.Context(), "k", 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if err := s.Delete(t.Context(), "k"); err != nil {
		t.Fatal(err)
	}
	for o, want := range map[storage.Object]string{first: "old content", second: "new"} {
		if got, err := io.ReadAll(o); err != nil || string(got) != want {
			t.Errorf("read %q, %v; want %q", got, err, want)
		}
	}
}

func testKeys(t *testing.T, s storage.Store) {
	ctx := t.Context()
	long := strings.Repeat("x", 255)
	good := []string{"a", "_x/sha256:00ff", long, "d/" + long + "/e", "a.b/c..d", strings.Repeat("abc/", 255) + "def"}
	bad := []string{"", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/.b", ".sluice/lock", "a b", "a\nb", "a\x00b", "é", long + "x", strings.Repeat("abc/", 256) + "d"}
	for _, key := range good {
		put(t, s, key, key)
		wantContent(t, s, key, key)
	}
	for _, key := range bad {
		if err := s.Put(ctx, key, nil); err == nil {
			t.Errorf("Put(%.20q) accepted the key", key)
		}
		if _, err := s.Open(ctx, key, 0, -1); err == nil {
			t.Errorf("Open(%.20q) accepted the key", key)
		}
		if _, err := s.Stat(ctx, key); err == nil {
			t.Errorf("Stat(%.20q) accepted the key", key)
		}
		if err := s.Delete(ctx, key); err == nil {
			t.Errorf("Delete(%.20q) accepted the key", key)
		}
		if err := s.Link(ctx, "a", key); err == nil {
			t.Errorf("Link to %.20q accepted the key", key)
		}
	}
	for _, key := range []string{"d", "_x", "a/below"} {
		wantNone(t, s, key)
	}
	for _, prefix := range []string{"/", "_x", "../", "a//"} {
		if _, err := collect(s.List(ctx, prefix, "")); err == nil {
			t.Errorf("List(%q) accepted the prefix", prefix)
		}
	}
}

func testList(t *testing.T, s storage.Store) {
	ctx := t.Context()
	if got, err := collect(s.List(ctx, "", "")); err != nil || len(got) != 0 {
		t.Errorf("List of an empty store = %v, %v", got, err)
	}
	for _, key := range []string{"r/a/1", "r/a/2", "r/a-b/1", "r/a.b", "r/a0", "r/b/c/d/e", "q/x", "r/gone/1"} {
		put(t, s, key, key)
	}
	if err := s.Delete(ctx, "r/gone/1"); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		prefix, after string
		want          []string
	}{
		{"", "", []string{"q/", "r/"}},
		{"", "q/", []string{"r/"}},
		{"r/", "", []string{"r/a-b/", "r/a.b", "r/a/", "r/a0", "r/b/"}},
		{"r/", "r/a.b", []string{"r/a/", "r/a0", "r/b/"}},
		{"r/", "r/a/1", []string{"r/a0", "r/b/"}},
		{"r/", "r/b/", nil},
		{"r/a/", "", []string{"r/a/1", "r/a/2"}},
		{"r/b/", "", []string{"r/b/c/"}},
		{"r/a.b/", "", nil},
		{"none/", "", nil},
	} {
		got, err := collect(s.List(ctx, tt.prefix, tt.after))
		if err != nil {
			t.Errorf("List(%q, %q): %v", tt.prefix, tt.after, err)
		}
		if d := cmp.Diff(tt.want, got); d != "" {
			t.Errorf("List(%q, %q) (-want +got):\n%s", tt.prefix, tt.after, d)
		}
	}
	for range s.List(ctx, "r/", "") {
		break // stopping early must be possible
	}
}

func testLink(t *testing.T, s storage.Store) {
	ctx := t.Context()
	put(t, s, "from", "content")
	if err := s.Link(ctx, "from", "x/to"); err != nil {
		t.Fatal(err)
	}
	if err := s.Link(ctx, "from", "x/to"); !errors.Is(err, storage.ErrExists) {
		t.Errorf("second link: %v, want ErrExists", err)
	}
	if err := s.Link(ctx, "none", "x/other"); !errors.Is(err, storage.ErrNotFound) {
		t.Errorf("link of nothing: %v, want ErrNotFound", err)
	}
	if err := s.Link(ctx, "none", "new/other"); !errors.Is(err, storage.ErrNotFound) {
		t.Errorf("link of nothing: %v, want ErrNotFound", err)
	}
	put(t, s, "from", "changed")
	wantContent(t, s, "x/to", "content")
	if err := s.Delete(ctx, "from"); err != nil {
		t.Fatal(err)
	}
	wantContent(t, s, "x/to", "content")
}

// Readers of a key that is replaced all the time see whole objects only.
func testPutRace(t *testing.T, s storage.Store) {
	content := func(i int) string { return strings.Repeat(string(rune('a'+i)), 1+1000*i) }
	put(t, s, "k", content(0))
	var writers sync.WaitGroup
	for i := range 3 {
		writers.Go(func() {
			for range 20 {
				if err := s.Put(t.Context(), "k", []byte(content(i))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { writers.Wait(); close(done) }()
	for {
		got, err := storage.ReadAll(t.Context(), s, "k", 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != content(int(got[0]-'a')) {
			t.Fatalf("torn object of %d bytes beginning with %q", len(got), got[0])
		}
		select {
		case <-done:
			return
		default:
		}
	}
}

// Objects come and go in one place without getting into each other's way.
func testDeleteRace(t *testing.T, s storage.Store) {
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			key := fmt.Sprintf("shared/prefix/%d/object", i%2)
			for range 25 {
				if err := s.Put(t.Context(), key, []byte("x")); err != nil {
					t.Errorf("put: %v", err)
				}
				if err := s.Delete(t.Context(), key); err != nil && !errors.Is(err, storage.ErrNotFound) {
					t.Errorf("delete: %v", err)
				}
				if _, err := collect(s.List(t.Context(), "shared/prefix/", "")); err != nil {
					t.Errorf("list: %v", err)
				}
			}
		})
	}
	wg.Wait()
	if got, err := collect(s.List(t.Context(), "", "")); err != nil || len(got) != 0 {
		t.Errorf("List after everything was deleted = %v, %v", got, err)
	}
}

func put(t *testing.T, s storage.Store, key, content string) {
	t.Helper()
	if err := s.Put(t.Context(), key, []byte(content)); err != nil {
		t.Fatal(err)
	}
}

func wantContent(t *testing.T, s storage.Store, key, want string) {
	t.Helper()
	got, err := storage.ReadAll(t.Context(), s, key, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("%s holds %.40q, want %.40q", key, got, want)
	}
	if size, err := s.Stat(t.Context(), key); err != nil || size != int64(len(want)) {
		t.Errorf("Stat(%s) = %d, %v; want %d", key, size, err, len(want))
	}
	// It must be listed exactly once.
	i := strings.LastIndexByte(key, '/') + 1
	names, err := collect(s.List(t.Context(), key[:i], ""))
	if err != nil || len(slices.DeleteFunc(names, func(n string) bool { return n != key })) != 1 {
		t.Errorf("List(%s) doesn't have %s once: %v, %v", key[:i], key, names, err)
	}
}

func wantNone(t *testing.T, s storage.Store, key string) {
	t.Helper()
	if _, err := s.Stat(t.Context(), key); !errors.Is(err, storage.ErrNotFound) {
		t.Errorf("Stat(%s): %v, want ErrNotFound", key, err)
	}
	if o, err := s.Open(t.Context(), key, 0, -1); !errors.Is(err, storage.ErrNotFound) {
		t.Errorf("Open(%s): %v, want ErrNotFound", key, err)
		if err == nil {
			o.Close()
		}
	}
}

func collect(seq iter.Seq2[string, error]) ([]string, error) {
	var all []string
	for s, err := range seq {
		if err != nil {
			return all, err
		}
		all = append(all, s)
	}
	return all, nil
}
