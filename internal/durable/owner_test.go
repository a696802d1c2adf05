package durable

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// One at a time has a lock; who waits gets it when it's given up.
func TestLock(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	first, err := Lock(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if f, err := Lock(over, name); !errors.Is(err, ErrLocked) || !errors.Is(err, context.Canceled) {
		t.Errorf("while another has it: %v, %v", f, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	got := make(chan error, 1)
	go func() {
		second, err := Lock(ctx, name)
		if err == nil {
			err = second.Close()
		}
		got <- err
	}()
	select {
	case err := <-got:
		t.Errorf("a second one has it: %v", err)
	case <-time.After(3 * lockPause):
	}
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	if err := <-got; err != nil {
		t.Errorf("when it was given up: %v", err)
	}
	if _, err := Lock(t.Context(), filepath.Join(name, "below")); err == nil || errors.Is(err, ErrLocked) {
		t.Errorf("a file that can't be made: %v", err)
	}
}

func TestDirectory(t *testing.T) {
	top := t.TempDir()
	if err := os.Symlink(".", filepath.Join(top, "link")); err != nil {
		t.Fatal(err)
	}
	t.Chdir(top)
	for range 2 {
		got, err := Directory("link/a/b", "one", "two/three")
		if err != nil {
			t.Fatal(err)
		}
		if want := filepath.Join(top, "a/b"); got != want {
			t.Errorf("its name is %q, want %q", got, want)
		}
		for _, dir := range []string{got, filepath.Join(got, "one"), filepath.Join(got, "two/three")} {
			if fi, err := os.Stat(dir); err != nil || fi.Mode() != fs.ModeDir|0o700 {
				t.Errorf("%s: %v, %v", dir, fi, err)
			}
		}
	}
	if err := os.WriteFile("file", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Directory("file"); err == nil {
		t.Error("a file is taken for a directory")
	}
	if _, err := Directory("a", "../file"); err == nil {
		t.Error("a file is taken for a directory within")
	}
}

func TestReadFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	content := []byte("content")
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, limit := range []int64{7, 8} {
		if got, err := ReadFile(name, limit); err != nil || !bytes.Equal(got, content) {
			t.Errorf("at most %d bytes: %q, %v", limit, got, err)
		}
	}
	if got, err := ReadFile(name, 6); err == nil || got != nil || !strings.Contains(err.Error(), name) {
		t.Errorf("a file that is longer: %q, %v", got, err)
	}
	if _, err := ReadFile(name+"x", 6); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}
