package storagetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sluice/internal/storage"
)

func testUpload(t *testing.T, s storage.Store) {
	ctx := t.Context()
	u := start(t, s)
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	write(t, u, string(big))
	write(t, u, "end")
	if size, _ := u.Position(); size != int64(len(big))+3 {
		t.Errorf("size is %d", size)
	}
	r, err := u.Content(ctx)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(r)
	if err != nil || string(got) != string(big)+"end" {
		t.Errorf("Content yields %d bytes, %v", len(got), err)
	}
	r.Close()
	wantNone(t, s, "dir/object")
	if err := u.Commit(ctx, "../object"); err == nil {
		t.Error("Commit accepted a bad key")
	}
	u = start(t, s)
	write(t, u, string(big))
	if err := u.Commit(ctx, "dir/object"); err != nil {
		t.Fatal(err)
	}
	wantContent(t, s, "dir/object", string(big))
	if _, err := s.ResumeUpload(ctx, u.ID()); !errors.Is(err, storage.ErrUploadUnknown) {
		t.Errorf("resume after commit: %v, want ErrUploadUnknown", err)
	}
	if err := s.CancelUpload(ctx, u.ID()); !errors.Is(err, storage.ErrUploadUnknown) {
		t.Errorf("cancel after commit: %v, want ErrUploadUnknown", err)
	}
	// The key is taken now, and an empty object is one too.
	u = start(t, s)
	if err := u.Commit(ctx, "dir/object"); !errors.Is(err, storage.ErrExists) {
		t.Errorf("commit to a taken key: %v, want ErrExists", err)
	}
	wantContent(t, s, "dir/object", string(big))
	u = start(t, s)
	if err := u.Commit(ctx, "dir/empty"); err != nil {
		t.Fatal(err)
	}
	wantContent(t, s, "dir/empty", "")
}

func testUploadResume(t *testing.T, s storage.Store) {
	ctx := t.Context()
	u := start(t, s)
	id := u.ID()
	if err := u.Checkpoint(ctx, make([]byte, 5000)); err == nil {
		t.Error("Checkpoint accepted a state of 5000 bytes")
	}
	write(t, u, "kept ")
	if err := u.Checkpoint(ctx, []byte("state 1")); err != nil {
		t.Fatal(err)
	}
	write(t, u, "dropped by Close")
	if size, state, err := s.StatUpload(ctx, id); err != nil || size != 5 || string(state) != "state 1" {
		t.Errorf("StatUpload of an open upload = %d, %q, %v", size, state, err)
	}
	if err := u.Close(); err != nil {
		t.Fatal(err)
	}
	u = resume(t, s, id)
	size, state := u.Position()
	if size != 5 || string(state) != "state 1" {
		t.Errorf("resumed at %d with state %q", size, state)
	}
	write(t, u, "and continued")
	if err := u.Checkpoint(ctx, nil); err != nil {
		t.Fatal(err)
	}
	u.Close()
	u = resume(t, s, id)
	if size, state := u.Position(); size != 18 || len(state) != 0 {
		t.Errorf("resumed at %d with state %q", size, state)
	}
	if err := u.Commit(ctx, "object"); err != nil {
		t.Fatal(err)
	}
	wantContent(t, s, "object", "kept and continued")

	// Without any checkpoint an upload is resumed at its beginning.
	u = start(t, s)
	write(t, u, "lost")
	u.Close()
	u = resume(t, s, u.ID())
	if size, _ := u.Position(); size != 0 {
		t.Errorf("resumed at %d, want 0", size)
	}
	for _, id := range []string{"", "x", "../../etc/passwd", "00000000-0000-0000-0000-000000000000"} {
		if _, err := s.ResumeUpload(ctx, id); !errors.Is(err, storage.ErrUploadUnknown) {
			t.Errorf("ResumeUpload(%q): %v, want ErrUploadUnknown", id, err)
		}
		if _, _, err := s.StatUpload(ctx, id); !errors.Is(err, storage.ErrUploadUnknown) {
			t.Errorf("StatUpload(%q): %v, want ErrUploadUnknown", id, err)
		}
		if err := s.CancelUpload(ctx, id); !errors.Is(err, storage.ErrUploadUnknown) {
			t.Errorf("CancelUpload(%q): %v, want ErrUploadUnknown", id, err)
		}
	}
}

func testUploadCancel(t *testing.T, s storage.Store) {
	ctx := t.Context()
	for _, end := range []string{"Checkpoint", "Commit"} {
		u := start(t, s)
		write(t, u, "some")
		if err := u.Checkpoint(ctx, nil); err != nil {
			t.Fatal(err)
		}
		// While it is open, as a client does that has lost its connection.
		if err := s.CancelUpload(ctx, u.ID()); err != nil {
			t.Fatal(err)
		}
		write(t, u, "more")
		var err error
		if end == "Commit" {
			err = u.Commit(ctx, "object")
		} else {
			err = u.Checkpoint(ctx, []byte("state"))
		}
		if !errors.Is(err, storage.ErrUploadUnknown) {
			t.Errorf("%s of a canceled upload: %v, want ErrUploadUnknown", end, err)
		}
		u.Close()
		if _, err := s.ResumeUpload(ctx, u.ID()); !errors.Is(err, storage.ErrUploadUnknown) {
			t.Errorf("resume of a canceled upload: %v, want ErrUploadUnknown", err)
		}
		wantNone(t, s, "object")
	}
}

func testUploadExclusive(t *testing.T, s storage.Store) {
	u := start(t, s)
	if err := u.Checkpoint(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.ResumeUpload(short, u.ID()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("second open: %v, want DeadlineExceeded", err)
	}
	done := make(chan error, 1)
	go func() {
		second, err := s.ResumeUpload(t.Context(), u.ID())
		if err == nil {
			err = second.Close()
		}
		done <- err
	}()
	u.Close()
	if err := <-done; err != nil {
		t.Errorf("open after close: %v", err)
	}
}

// Of concurrent uploads to one key exactly one becomes the object.
func testCommitRace(t *testing.T, s storage.Store) {
	for round := range 10 {
		key := fmt.Sprintf("race/%d/object", round)
		var wg sync.WaitGroup
		var won atomic.Value
		var wins atomic.Int32
		for i := range 6 {
			wg.Go(func() {
				u, err := s.StartUpload(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				defer u.Close()
				content := fmt.Sprintf("writer %d of round %d", i, round)
				io.WriteString(u, content)
				switch err := u.Commit(t.Context(), key); {
				case err == nil:
					wins.Add(1)
					won.Store(content)
				case !errors.Is(err, storage.ErrExists):
					t.Errorf("loser: %v, want ErrExists", err)
				}
			})
		}
		wg.Wait()
		if wins.Load() != 1 {
			t.Fatalf("%d of 6 commits succeeded, want 1", wins.Load())
		}
		wantContent(t, s, key, won.Load().(string))
	}
}

func start(t *testing.T, s storage.Store) storage.Upload {
	t.Helper()
	u, err := s.StartUpload(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { u.Close() })
	return u
}

func resume(t *testing.T, s storage.Store, id string) storage.Upload {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	u, err := s.ResumeUpload(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { u.Close() })
	return u
}

func write(t *testing.T, u storage.Upload, content string) {
	t.Helper()
	if n, err := io.WriteString(u, content); err != nil || n != len(content) {
		t.Fatalf("Write of %d bytes = %d, %v", len(content), n, err)
	}
}
