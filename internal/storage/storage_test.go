package storage_test

import (
	"errors"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice/internal/storage"
	"sluice/internal/storage/storagetest"
)

func TestMemory(t *testing.T) {
	storagetest.Run(t, func(*testing.T) storage.Store { return &storage.Memory{} })
}

func TestLocal(t *testing.T) {
	storagetest.Run(t, func(t *testing.T) storage.Store { return openLocal(t, t.TempDir()) })
}

func openLocal(t *testing.T, dir string) *storage.Local {
	t.Helper()
	s, err := storage.OpenLocal(dir, storage.LocalOptions{Identity: identity})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// identity lets keys that end alike below layers/ share their bytes.
func identity(key string) string {
	if name, ok := strings.CutPrefix(path.Base(key), "same-"); ok {
		return "x/" + name
	}
	return ""
}

func upload(t *testing.T, s storage.Store, key, content string) {
	t.Helper()
	u, err := s.StartUpload(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	io.WriteString(u, content)
	if err := u.Commit(t.Context(), key); err != nil {
		t.Fatal(err)
	}
}

func TestLocalLock(t *testing.T) {
	dir := t.TempDir()
	s := openLocal(t, dir)
	_, err := storage.OpenLocal(dir, storage.LocalOptions{})
	if !errors.Is(err, storage.ErrLocked) || !strings.Contains(err.Error(), dir) {
		t.Errorf("second open: %v, want ErrLocked with the directory", err)
	}
	s.Close()
	openLocal(t, dir)
}

// Whoever may not ask the registry may not ask the file system either.
func TestLocalIsPrivate(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	openLocal(t, dir)
	if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("a new data directory has mode %v, %v; want 0700", fi.Mode(), err)
	}
}

func TestLocalReopen(t *testing.T) {
	dir := t.TempDir()
	s := openLocal(t, dir)
	upload(t, s, "a/object", "content")
	u, err := s.StartUpload(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(u, "first ")
	if err := u.Checkpoint(t.Context(), []byte("state")); err != nil {
		t.Fatal(err)
	}
	io.WriteString(u, "and what a crash leaves unaccounted for")
	s.Close() // with the upload open, as a killed process does

	s = openLocal(t, dir)
	if got, err := storage.ReadAll(t.Context(), s, "a/object", 100); err != nil || string(got) != "content" {
		t.Errorf("object is %q, %v", got, err)
	}
	u, err = s.ResumeUpload(t.Context(), u.ID())
	if err != nil {
		t.Fatal(err)
	}
	if size, state := u.Position(); size != 6 || string(state) != "state" {
		t.Errorf("resumed at %d with state %q", size, state)
	}
	io.WriteString(u, "second")
	if err := u.Commit(t.Context(), "a/other"); err != nil {
		t.Fatal(err)
	}
	if got, err := storage.ReadAll(t.Context(), s, "a/other", 100); err != nil || string(got) != "first second" {
		t.Errorf("object is %q, %v", got, err)
	}
}

// A crash between the two last steps of Commit leaves the upload's name behind.
// Whoever resumes it must not be able to change the object.
func TestLocalResumeAfterCommit(t *testing.T) {
	dir := t.TempDir()
	s := openLocal(t, dir)
	u, err := s.StartUpload(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(u, "content")
	if err := u.Checkpoint(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	u.Close()
	name := filepath.Join(dir, ".sluice/uploads", u.ID())
	if err := os.Link(name, filepath.Join(dir, "object")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ResumeUpload(t.Context(), u.ID()); !errors.Is(err, storage.ErrUploadUnknown) {
		t.Errorf("resume: %v, want ErrUploadUnknown", err)
	}
	if got, err := storage.ReadAll(t.Context(), s, "object", 100); err != nil || string(got) != "content" {
		t.Errorf("object is %q, %v", got, err)
	}
}

func TestLocalShares(t *testing.T) {
	dir := t.TempDir()
	s := openLocal(t, dir)
	stat := func(key string) os.FileInfo {
		info, err := os.Stat(filepath.Join(dir, key))
		if err != nil {
			t.Fatal(err)
		}
		return info
	}
	for _, key := range []string{"a/same-1", "b/same-1", "a/same-2", "a/own", "b/own"} {
		upload(t, s, key, "content of "+path.Base(key))
	}
	if !os.SameFile(stat("a/same-1"), stat("b/same-1")) {
		t.Error("objects of one identity are stored twice")
	}
	if os.SameFile(stat("a/own"), stat("b/own")) || os.SameFile(stat("a/same-1"), stat("a/same-2")) {
		t.Error("objects of no or different identities are stored once")
	}
	shared := filepath.Join(dir, ".sluice/shared/x/1")
	for _, key := range []string{"a/same-1", "b/same-1"} {
		if _, err := os.Stat(shared); err != nil {
			t.Errorf("before %s is deleted: %v", key, err)
		}
		if err := s.Delete(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(shared); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("shared bytes outlive their last object: %v", err)
	}
	// Of a different size it can't be the same content, whatever the key says.
	upload(t, s, "c/same-2", "something else")
	if got, err := storage.ReadAll(t.Context(), s, "c/same-2", 100); err != nil || string(got) != "something else" {
		t.Errorf("object is %q, %v", got, err)
	}
}

func TestLocalSweep(t *testing.T) {
	dir := t.TempDir()
	s := openLocal(t, dir)
	old := time.Now().Add(-48 * time.Hour)
	var ids []string
	for range 2 {
		u, err := s.StartUpload(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := u.Checkpoint(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		u.Close()
		ids = append(ids, u.ID())
	}
	os.Chtimes(filepath.Join(dir, ".sluice/uploads", ids[0]), old, old)
	litter := filepath.Join(dir, ".sluice/temporary/.tmp-1")
	if err := os.WriteFile(litter, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	os.Chtimes(litter, old, old)
	upload(t, s, "a/same-1", "kept")
	upload(t, s, "a/same-2", "lost")
	os.Remove(filepath.Join(dir, "a/same-2")) // a crash before its shared link went

	got, err := s.Sweep(t.Context(), 24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if want := (storage.SweepResult{Uploads: 1, Temporary: 1, Shared: 1}); got != want {
		t.Errorf("Sweep = %+v, want %+v", got, want)
	}
	if _, err := s.ResumeUpload(t.Context(), ids[0]); !errors.Is(err, storage.ErrUploadUnknown) {
		t.Errorf("old upload: %v, want ErrUploadUnknown", err)
	}
	u, err := s.ResumeUpload(t.Context(), ids[1])
	if err != nil {
		t.Fatalf("young upload: %v", err)
	}
	u.Close()
	if _, err := storage.ReadAll(t.Context(), s, "a/same-1", 100); err != nil {
		t.Error(err)
	}
}

func TestLocalUnusableDirectory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := storage.OpenLocal(filepath.Join(file, "data"), storage.LocalOptions{}); err == nil || !strings.Contains(err.Error(), "can't be used") {
		t.Errorf("OpenLocal below a file: %v", err)
	}
}
