package storage_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice/internal/storage"
	"sluice/internal/storage/storagetest"
)

// clock is a time that tests move.
type clock struct {
	mu  sync.Mutex
	now time.Time // guarded by mu
}

func newClock() *clock { return &clock{now: time.Unix(1_000_000, 0)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) Advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

const (
	testPart   = 1000 // bytes
	testInline = 100
)

func newObjects(t testing.TB, b storage.Bucket, c *clock) *storage.Objects {
	t.Helper()
	o, err := storage.NewObjects(b, storage.ObjectsOptions{Prefix: "some/where", Identity: identity})
	if err != nil {
		t.Fatal(err)
	}
	o.SetLimits(testPart, testInline, c.Now)
	return o
}

// The suite, with everything large and with everything of several parts.
func TestObjects(t *testing.T) {
	for _, inline := range []int{-1, 0, 10, testInline} {
		t.Run(fmt.Sprint(inline), func(t *testing.T) {
			storagetest.Run(t, func(t *testing.T) storage.Store {
				c := newClock()
				o := newObjects(t, newMemoryBucket(c.Now), c)
				o.SetLimits(testPart, inline, c.Now)
				return o
			})
		})
	}
}

func content(name string, n int) string { return strings.Repeat(name+" ", n)[:n] }

func read(t *testing.T, s storage.Reader, key string) string {
	t.Helper()
	got, err := storage.ReadAll(t.Context(), s, key, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	return string(got)
}

func ranged(t *testing.T, s storage.Reader, key string, offset, length int64) string {
	t.Helper()
	r, err := s.Open(t.Context(), key, offset, length)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	got, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(got)
}

const dataNames = "some/where/.sluice/data/"

// dataCount counts the stored bytes' objects.
func dataCount(b *memoryBucket) int {
	n := 0
	for _, name := range b.names(dataNames) {
		if strings.HasSuffix(name, "/data") {
			n++
		}
	}
	return n
}

func TestObjectsShare(t *testing.T) {
	c := newClock()
	b := newMemoryBucket(c.Now)
	o := newObjects(t, b, c)
	for _, size := range []int{testInline + 1, 5*testPart + 7} {
		want := content("same", size)
		keys := []string{"a/same-1", "b/same-1", "c/same-1"}
		upload(t, o, keys[0], want)
		upload(t, o, keys[1], want)
		if err := o.Link(t.Context(), keys[0], keys[2]); err != nil {
			t.Fatal(err)
		}
		if n := dataCount(b); n != 1 {
			t.Errorf("three objects of one identity are stored %d times", n)
		}
		for _, key := range keys {
			if read(t, o, key) != want || ranged(t, o, key, 7, 11) != want[7:18] {
				t.Errorf("%s is not what was stored", key)
			}
			if err := o.Delete(t.Context(), key); err != nil {
				t.Fatal(err)
			}
		}
		sweepAll(t, o, c)
		if left := b.names(""); len(left) != 0 || len(b.uploads) != 0 {
			t.Errorf("after everything was deleted there is %v, and parts of %d", left, len(b.uploads))
		}
	}
	// Of a different size it can't be the same content, whatever the key says.
	upload(t, o, "a/same-2", content("one", 200))
	upload(t, o, "b/same-2", content("other", 300))
	if read(t, o, "a/same-2") != content("one", 200) || read(t, o, "b/same-2") != content("other", 300) {
		t.Error("objects of different sizes were shared")
	}
}

// sweepAll sweeps until nothing can be left to sweep.
func sweepAll(t *testing.T, o *storage.Objects, c *clock) {
	t.Helper()
	for range 5 {
		c.Advance(25 * time.Hour)
		if _, err := o.Sweep(t.Context(), 24*time.Hour); err != nil {
			t.Fatal(err)
		}
	}
}

// Of pushes of one blob at the same time the bytes of one stay.
func TestObjectsConcurrentPushes(t *testing.T) {
	c := newClock()
	b := newMemoryBucket(c.Now)
	want := content("same", 3*testPart)
	var wg sync.WaitGroup
	for i := range 8 {
		o := newObjects(t, b, c) // a replica each
		wg.Go(func() { upload(t, o, fmt.Sprintf("r%d/same-1", i), want) })
	}
	wg.Wait()
	if n := dataCount(b); n != 1 {
		t.Errorf("8 pushes at the same time left %d copies", n)
	}
	o := newObjects(t, b, c)
	sweepAll(t, o, c)
	for i := range 8 {
		if read(t, o, fmt.Sprintf("r%d/same-1", i)) != want {
			t.Errorf("object %d is damaged", i)
		}
	}
}

// Whoever opened or signed an object has an hour to read it.
func TestObjectsGrace(t *testing.T) {
	c := newClock()
	b := newMemoryBucket(c.Now)
	o := newObjects(t, b, c)
	want := content("x", 500)
	upload(t, o, "a/own", want)
	c.Advance(48 * time.Hour)
	url, err := o.SignedURL(t.Context(), "a/own", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	name := strings.TrimPrefix(url, "memory:")
	if err := o.Delete(t.Context(), "a/own"); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		after time.Duration
		there bool
	}{{0, true}, {50 * time.Minute, true}, {20 * time.Minute, false}} {
		c.Advance(step.after)
		if _, err := o.Sweep(t.Context(), 24*time.Hour); err != nil {
			t.Fatal(err)
		}
		if _, err := b.Head(t.Context(), name); (err == nil) != step.there {
			t.Errorf("after %v more: %v", step.after, err)
		}
	}
	if _, err := o.SignedURL(t.Context(), "a/own", time.Minute); !errors.Is(err, storage.ErrNotFound) {
		t.Errorf("URL of a deleted object: %v", err)
	}
}

// What a client stores can't be taken for a pointer.
func TestObjectsForgedPointer(t *testing.T) {
	c := newClock()
	b := newMemoryBucket(c.Now)
	o := newObjects(t, b, c)
	upload(t, o, "secret/own", content("secret", 500))
	pointer := b.objects["some/where/secret/own"]
	if pointer.info.Label == "" || string(pointer.data) != pointer.info.Label {
		t.Fatalf("not a pointer: %+v", pointer)
	}
	if err := o.Put(t.Context(), "mine", pointer.data); err != nil {
		t.Fatal(err)
	}
	upload(t, o, "uploaded", string(pointer.data[:testInline]))
	if read(t, o, "mine") != string(pointer.data) || read(t, o, "uploaded") != string(pointer.data[:testInline]) {
		t.Error("content was taken for a pointer")
	}
	// And a Put over a pointer replaces all of it.
	if err := o.Put(t.Context(), "secret/own", []byte("public")); err != nil {
		t.Fatal(err)
	}
	if got := read(t, o, "secret/own"); got != "public" {
		t.Errorf("replaced object is %q", got)
	}
	sweepAll(t, o, c)
	if n := dataCount(b); n != 0 {
		t.Errorf("the bytes of a replaced object stay: %v", b.names(""))
	}
}

// An upload goes on in another process; of two that go on, one wins, and no
// bytes are mixed.
func TestObjectsReplicas(t *testing.T) {
	for _, size := range []int{10, testInline + 50, 2*testPart + 300} {
		c := newClock()
		b := newMemoryBucket(c.Now)
		one, two := newObjects(t, b, c), newObjects(t, b, c)
		u, err := one.StartUpload(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		write := func(u storage.Upload, s string) {
			if _, err := io.WriteString(u, s); err != nil {
				t.Fatal(err)
			}
		}
		write(u, content("first", size))
		if err := u.Checkpoint(t.Context(), []byte("1")); err != nil {
			t.Fatal(err)
		}
		write(u, "dropped")
		second, err := two.ResumeUpload(t.Context(), u.ID())
		if err != nil {
			t.Fatal(err)
		}
		if n, state := second.Position(); n != int64(size) || string(state) != "1" {
			t.Fatalf("resumed at %d, %q", n, state)
		}
		write(second, content("second", size))
		if err := second.Checkpoint(t.Context(), []byte("2")); err != nil {
			t.Fatal(err)
		}
		if err := u.Checkpoint(t.Context(), []byte("2")); !errors.Is(err, storage.ErrUploadConflict) {
			t.Errorf("checkpoint of the slower process: %v", err)
		}
		u.Close()
		third, err := one.ResumeUpload(t.Context(), u.ID())
		if err != nil {
			t.Fatal(err)
		}
		err = second.Commit(t.Context(), "object")
		lost := third.Commit(t.Context(), "other")
		if err != nil || !errors.Is(lost, storage.ErrUploadUnknown) {
			t.Errorf("two commits: %v, %v", err, lost)
		}
		third.Close()
		second.Close()
		if got := read(t, one, "object"); got != content("first", size)+content("second", size) {
			t.Errorf("size %d: object is damaged: %.100q", size, got)
		}
		sweepAll(t, two, c)
		if got := read(t, two, "object"); got != content("first", size)+content("second", size) {
			t.Errorf("size %d: object is damaged after sweep: %.100q", size, got)
		}
		if err := one.Delete(t.Context(), "object"); err != nil {
			t.Fatal(err)
		}
		sweepAll(t, two, c)
		if left := b.names(""); len(left) != 0 || len(b.uploads) != 0 {
			t.Errorf("size %d: left: %v, %d parts", size, left, len(b.uploads))
		}
	}
}

// A process that doesn't know that it lost an upload may replace parts, as S3
// has it. Then the upload is lost; its bytes are never mixed.
func TestObjectsReplacedParts(t *testing.T) {
	c := newClock()
	b := newMemoryBucket(c.Now)
	one, two := newObjects(t, b, c), newObjects(t, b, c)
	u, err := one.StartUpload(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	io.WriteString(u, content("first", 2*testPart))
	if err := u.Checkpoint(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	second, err := two.ResumeUpload(t.Context(), u.ID())
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	io.WriteString(second, content("second", 2*testPart))
	if err := second.Checkpoint(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	io.WriteString(u, content("lost", testPart))
	if err := u.Checkpoint(t.Context(), nil); !errors.Is(err, storage.ErrUploadConflict) {
		t.Errorf("checkpoint of the slower process: %v", err)
	}
	if err := second.Commit(t.Context(), "object"); err == nil {
		t.Error("an object was made of parts that were replaced")
	}
	if _, err := one.Stat(t.Context(), "object"); !errors.Is(err, storage.ErrNotFound) {
		t.Errorf("object: %v", err)
	}
}

// A crash anywhere in Commit lets another process commit the same upload, or
// ends it, and never damages what is there.
func TestObjectsCommitCrash(t *testing.T) {
	for _, size := range []int{testInline + 50, 2*testPart + 300} {
		for crash := range 20 {
			c := newClock()
			b := newMemoryBucket(c.Now)
			f := &failing{memoryBucket: b, after: 1 << 30}
			o, other := newObjects(t, f, c), newObjects(t, b, c)
			u, err := o.StartUpload(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			want := content("content", size)
			io.WriteString(u, want)
			if err := u.Checkpoint(t.Context(), []byte("state")); err != nil {
				t.Fatal(err)
			}
			f.arm(crash)
			err = u.Commit(t.Context(), "a/same-1")
			u.Close()
			if err == nil {
				if got := read(t, other, "a/same-1"); got != want {
					t.Fatalf("crash %d: acknowledged object is damaged", crash)
				}
			} else if u, err = other.ResumeUpload(t.Context(), u.ID()); err == nil {
				if n, state := u.Position(); n != int64(size) || string(state) != "state" {
					t.Fatalf("crash %d: resumed at %d, %q", crash, n, state)
				}
				if err := u.Commit(t.Context(), "a/same-1"); err != nil {
					t.Fatalf("crash %d: second commit: %v", crash, err)
				}
				u.Close()
				if got := read(t, other, "a/same-1"); got != want {
					t.Fatalf("crash %d: object is damaged", crash)
				}
			} else if !errors.Is(err, storage.ErrUploadUnknown) {
				t.Fatalf("crash %d: %v", crash, err)
			}
			sweepAll(t, other, c)
			if _, err := other.Stat(t.Context(), "a/same-1"); err == nil {
				if got := read(t, other, "a/same-1"); got != want {
					t.Fatalf("crash %d: object is damaged after sweep", crash)
				}
				if err := other.Delete(t.Context(), "a/same-1"); err != nil {
					t.Fatal(err)
				}
			}
			sweepAll(t, other, c)
			c.Advance(30 * 24 * time.Hour)
			sweepAll(t, other, c)
			if left := b.names(""); len(left) != 0 || len(b.uploads) != 0 {
				t.Errorf("crash %d: left: %v, %d parts", crash, left, len(b.uploads))
			}
		}
	}
}

// failing is a bucket to which nothing gets through after some changes, as after
// a crash; the first of those lost was done, in every other case.
type failing struct {
	*memoryBucket
	mu    sync.Mutex
	after int
	done  bool
}

var errCrash = errors.New("crashed")

func (f *failing) arm(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.after, f.done = n/2, n%2 == 1
}

func (f *failing) change(do func() error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.after--
	if f.after >= 0 || f.after == -1 && f.done {
		err := do()
		if f.after < 0 {
			err = errCrash
		}
		return err
	}
	return errCrash
}

func (f *failing) Put(ctx context.Context, name string, data []byte, opts storage.BucketPut) error {
	return f.change(func() error { return f.memoryBucket.Put(ctx, name, data, opts) })
}

func (f *failing) Delete(ctx context.Context, name string) error {
	return f.change(func() error { return f.memoryBucket.Delete(ctx, name) })
}

func (f *failing) CompleteParts(ctx context.Context, name, upload string, tags []string) error {
	return f.change(func() error { return f.memoryBucket.CompleteParts(ctx, name, upload, tags) })
}

func (f *failing) AbortParts(ctx context.Context, name, upload string) error {
	return f.change(func() error { return f.memoryBucket.AbortParts(ctx, name, upload) })
}

// Abandoned uploads go, with their parts; what is in use stays.
func TestObjectsSweep(t *testing.T) {
	c := newClock()
	b := newMemoryBucket(c.Now)
	o := newObjects(t, b, c)
	upload(t, o, "kept/own", content("kept", 500))
	var ids []string
	for range 2 {
		u, err := o.StartUpload(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(u, content("x", 2*testPart+200))
		if err := u.Checkpoint(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		u.Close()
		ids = append(ids, u.ID())
		c.Advance(20 * time.Hour)
	}
	got, err := o.Sweep(t.Context(), 24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if want := (storage.SweepResult{Uploads: 1}); got != want {
		t.Errorf("Sweep = %+v, want %+v", got, want)
	}
	if _, err := o.ResumeUpload(t.Context(), ids[0]); !errors.Is(err, storage.ErrUploadUnknown) {
		t.Errorf("old upload: %v, want ErrUploadUnknown", err)
	}
	u, err := o.ResumeUpload(t.Context(), ids[1])
	if err != nil {
		t.Fatalf("young upload: %v", err)
	}
	u.Close()
	if len(b.uploads) != 1 {
		t.Errorf("parts of %d uploads are there", len(b.uploads))
	}
	sweepAll(t, o, c)
	if read(t, o, "kept/own") != content("kept", 500) || len(b.names("")) != 3 || len(b.uploads) != 0 {
		t.Errorf("left: %v", b.names(""))
	}
}

// Ten thousand parts are enough for the largest objects.
func TestObjectsPartSizes(t *testing.T) {
	o, err := storage.NewObjects(newMemoryBucket(time.Now), storage.ObjectsOptions{})
	if err != nil {
		t.Fatal(err)
	}
	total := 0
	for n := range 10_000 {
		total += o.PartSizeOf(n)
	}
	if total < 5<<40 || o.PartSizeOf(0) != 8<<20 || o.PartSizeOf(9999) > 4000<<20 {
		t.Errorf("10,000 parts have %d bytes, from %d to %d", total, o.PartSizeOf(0), o.PartSizeOf(9999))
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"version":1,"data":"00000000-0000-0000-0000-000000000000","size":1,"ref":"x"}`))
	f.Add([]byte(`{"version":1,"writer":"x","size":3,"tail":"YWJj"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		_ = storage.ParsePointer(string(b))
		_ = storage.ParseRecord(".sluice/uploads/x/state-00000001", b)
		if bytes.HasPrefix(b, []byte("{}")) && storage.ParsePointer(string(b)) == nil {
			t.Error("a pointer without a version")
		}
	})
}

// The documentation of Objects counts requests, since each costs latency.
func TestObjectsRequests(t *testing.T) {
	c := newClock()
	b := newMemoryBucket(c.Now)
	o := newObjects(t, b, c)
	var u storage.Upload
	begin := func(size int) {
		u, _ = o.StartUpload(t.Context())
		io.WriteString(u, content("x", size))
		if size > testPart {
			if err := u.Checkpoint(t.Context(), nil); err != nil { // no part is on its way now
				t.Fatal(err)
			}
		}
	}
	commit := func(key string) func() error { return func() error { return u.Commit(t.Context(), key) } }
	for _, step := range []struct {
		name string
		size int // of an upload to begin before
		do   func() error
		want int
	}{
		{"put", 0, func() error { return o.Put(t.Context(), "small", []byte("x")) }, 1},
		{"commit small", testInline, commit("up/small"), 2},
		{"commit large", testInline + 1, commit("a/same-1"), 8},
		{"commit parts", 2*testPart + 1, commit("a/same-2"), 10},
		{"commit shared", testInline + 1, commit("b/same-1"), 6},
		{"open", 0, func() error { _, err := storage.ReadAll(t.Context(), o, "small", 10); return err }, 1},
		{"open large", 0, func() error { _, err := storage.ReadAll(t.Context(), o, "a/same-1", 1000); return err }, 2},
		{"stat large", 0, func() error { _, err := o.Stat(t.Context(), "a/same-1"); return err }, 1},
		{"url", 0, func() error { _, err := o.SignedURL(t.Context(), "a/same-1", time.Hour); return err }, 1},
		{"link", 0, func() error { return o.Link(t.Context(), "a/same-1", "c/same-1") }, 5},
		{"delete", 0, func() error { return o.Delete(t.Context(), "small") }, 2},
		{"delete large", 0, func() error { return o.Delete(t.Context(), "a/same-1") }, 3},
		{"checkpoint", testInline, func() error { return u.Checkpoint(t.Context(), nil) }, 1},
		{"stat upload", 0, func() error { _, _, err := o.StatUpload(t.Context(), u.ID()); return err }, 2},
		{"resume upload", 0, func() error { u.Close(); _, err := o.ResumeUpload(t.Context(), u.ID()); return err }, 2},
	} {
		if step.size > 0 {
			begin(step.size)
		}
		before := b.calls
		if err := step.do(); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		if n := b.calls - before; n != step.want {
			t.Errorf("%s: %d requests, want %d", step.name, n, step.want)
		}
	}
}
