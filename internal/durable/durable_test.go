package durable

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "file")
	for _, content := range []string{"first", "a second and longer one", ""} {
		if err := WriteFile(name, []byte(content), 0o640); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != content {
			t.Errorf("content is %q, want %q", got, content)
		}
	}
	info, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o640 {
		t.Errorf("mode is %v, want 0640", info.Mode().Perm())
	}
	wantNames(t, dir, "file")
	if err := WriteFile(filepath.Join(dir, "none", "file"), nil, 0o600); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("in a directory that doesn't exist: %v, want fs.ErrNotExist", err)
	}
	if err := WriteFile(dir, []byte("x"), 0o600); err == nil {
		t.Error("replaced a directory by a file")
	}
	wantNames(t, dir, "file")
}

// A reader must never see anything but one of the contents, whole.
func TestWriteFileIsAtomic(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	content := func(i int) []byte { return bytes.Repeat([]byte{byte('a' + i)}, 1000+1000*i) }
	if err := WriteFile(name, content(0), 0o600); err != nil {
		t.Fatal(err)
	}
	var writers sync.WaitGroup
	for i := range 4 {
		writers.Go(func() {
			for range 25 {
				if err := WriteFile(name, content(i), 0o600); err != nil {
					t.Error(err)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { writers.Wait(); close(done) }()
	for {
		got, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, content(int(got[0]-'a'))) {
			t.Fatalf("torn content of %d bytes beginning with %q", len(got), got[0])
		}
		select {
		case <-done:
			return
		default:
		}
	}
}

func TestCommitNewRace(t *testing.T) {
	dir := t.TempDir()
	for round := range 20 {
		name := filepath.Join(dir, fmt.Sprint("file", round))
		var wg sync.WaitGroup
		var won atomic.Int32
		var winner atomic.Value
		for i := range 8 {
			wg.Go(func() {
				f, err := Create(dir, 0o600)
				if err != nil {
					t.Error(err)
					return
				}
				defer f.Discard()
				content := fmt.Sprintf("writer %d of round %d", i, round)
				f.WriteString(content)
				switch err := f.CommitNew(name); {
				case err == nil:
					won.Add(1)
					winner.Store(content)
				case !errors.Is(err, fs.ErrExist):
					t.Errorf("loser: %v, want fs.ErrExist", err)
				}
			})
		}
		wg.Wait()
		if won.Load() != 1 {
			t.Fatalf("%d of 8 writers created the file, want 1", won.Load())
		}
		got, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != winner.Load() {
			t.Errorf("content is %q, winner wrote %q", got, winner.Load())
		}
		os.Remove(name)
	}
	wantNames(t, dir)
}

func TestDiscard(t *testing.T) {
	dir := t.TempDir()
	f, err := Create(dir, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteString("never seen")
	f.Discard()
	f.Discard()
	wantNames(t, dir)
	if err := f.Commit(filepath.Join(dir, "file")); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("commit after discard: %v, want fs.ErrClosed", err)
	}
	if f, err = Create(dir, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := f.Commit(filepath.Join(dir, "file")); err != nil {
		t.Fatal(err)
	}
	f.Discard()
	wantNames(t, dir, "file")
}

func TestMkdirAll(t *testing.T) {
	dir := t.TempDir()
	deep := filepath.Join(dir, "a", "b", "c")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if err := MkdirAll(deep, 0o750); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if info, err := os.Stat(deep); err != nil || !info.IsDir() {
		t.Errorf("stat: %v, %v", info, err)
	}
	file := filepath.Join(dir, "file")
	if err := WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{file, filepath.Join(file, "below")} {
		if err := MkdirAll(d, 0o750); !errors.Is(err, unix.ENOTDIR) {
			t.Errorf("MkdirAll(%s) = %v, want ENOTDIR", d, err)
		}
	}
}

func TestLinkRenameRemove(t *testing.T) {
	dir := t.TempDir()
	a, b, c := filepath.Join(dir, "a"), filepath.Join(dir, "b"), filepath.Join(dir, "c")
	if err := WriteFile(a, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Link(a, b); err != nil {
		t.Fatal(err)
	}
	if err := Link(a, b); !errors.Is(err, fs.ErrExist) {
		t.Errorf("second link: %v, want fs.ErrExist", err)
	}
	if err := Link(filepath.Join(dir, "none"), c); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("link of nothing: %v, want fs.ErrNotExist", err)
	}
	if err := os.Mkdir(c, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := Rename(a, filepath.Join(c, "a")); err != nil {
		t.Fatal(err)
	}
	wantNames(t, dir, "b", "c")
	wantNames(t, c, "a")
	if err := Remove(b); err != nil {
		t.Fatal(err)
	}
	if err := Remove(b); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("second remove: %v, want fs.ErrNotExist", err)
	}
	wantNames(t, dir, "c")
}

func TestSweep(t *testing.T) {
	dir := t.TempDir()
	old := time.Now().Add(-time.Hour)
	for _, name := range []string{TempPrefix + "old", TempPrefix + "young", "kept"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if name != TempPrefix+"young" {
			os.Chtimes(filepath.Join(dir, name), old, old)
		}
	}
	n, err := Sweep(dir, time.Minute)
	if err != nil || n != 1 {
		t.Errorf("Sweep = %d, %v; want 1, nil", n, err)
	}
	wantNames(t, dir, TempPrefix+"young", "kept")
	if n, err := Sweep(filepath.Join(dir, "none"), 0); n != 0 || err != nil {
		t.Errorf("Sweep of nothing = %d, %v", n, err)
	}
}

func wantNames(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%s holds %v, want %v", dir, got, want)
	}
}
