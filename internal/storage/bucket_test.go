package storage_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"iter"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"sluice/internal/storage"
)

// memoryBucket is a Bucket that behaves as S3 does: parts are numbered per
// upload and replace each other, and can't be read.
type memoryBucket struct {
	now func() time.Time

	mu      sync.Mutex
	objects map[string]bucketObject // guarded by mu, as all that follows
	uploads map[string]*bucketParts
	counter int
	calls   int // requests that were served
}

type bucketObject struct {
	data []byte
	info storage.BucketInfo
}

type bucketParts struct {
	name  string
	begun time.Time
	parts map[int]bucketPart
}

type bucketPart struct {
	tag  string
	data []byte
}

func newMemoryBucket(now func() time.Time) *memoryBucket {
	return &memoryBucket{now: now, objects: map[string]bucketObject{}, uploads: map[string]*bucketParts{}}
}

func (b *memoryBucket) String() string { return "memory" }

func (b *memoryBucket) Get(_ context.Context, name string, offset, length int64) (io.ReadCloser, storage.BucketInfo, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls++
	o, ok := b.objects[name]
	if !ok {
		return nil, storage.BucketInfo{}, fmt.Errorf("%s: %w", name, storage.ErrNotFound)
	}
	size := int64(len(o.data))
	if offset >= size && (offset > 0 || length >= 0) {
		return nil, storage.BucketInfo{}, fmt.Errorf("%s: %w", name, storage.ErrRange)
	}
	if length < 0 || length > size-offset {
		length = size - offset
	}
	return io.NopCloser(bytes.NewReader(o.data[offset : offset+length])), o.info, nil
}

func (b *memoryBucket) Head(_ context.Context, name string) (storage.BucketInfo, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls++
	o, ok := b.objects[name]
	if !ok {
		return storage.BucketInfo{}, fmt.Errorf("%s: %w", name, storage.ErrNotFound)
	}
	return o.info, nil
}

func (b *memoryBucket) Put(_ context.Context, name string, data []byte, opts storage.BucketPut) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls++
	if _, ok := b.objects[name]; ok && opts.IfAbsent {
		return fmt.Errorf("%s: %w", name, storage.ErrExists)
	}
	b.set(name, bytes.Clone(data), opts.Label)
	return nil
}

// set stores an object. b.mu is held.
func (b *memoryBucket) set(name string, data []byte, label string) {
	b.objects[name] = bucketObject{data, storage.BucketInfo{Size: int64(len(data)), Modified: b.now(), Label: label}}
}

func (b *memoryBucket) Delete(_ context.Context, name string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls++
	delete(b.objects, name)
	return nil
}

func (b *memoryBucket) List(_ context.Context, prefix, after, delimiter string) iter.Seq2[storage.BucketEntry, error] {
	return func(yield func(storage.BucketEntry, error) bool) {
		for _, e := range b.list(prefix, after, delimiter) {
			if !yield(e, nil) {
				return
			}
		}
	}
}

func (b *memoryBucket) list(prefix, after, delimiter string) []storage.BucketEntry {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls++
	var all []storage.BucketEntry
	for _, name := range slices.Sorted(maps.Keys(b.objects)) {
		rest, ok := strings.CutPrefix(name, prefix)
		if !ok {
			continue
		}
		info := b.objects[name].info
		e := storage.BucketEntry{Name: name, Size: info.Size, Modified: info.Modified}
		if i := strings.Index(rest, "/"); i >= 0 && delimiter == "/" {
			e = storage.BucketEntry{Name: prefix + rest[:i+1]}
		}
		if e.Name > after && (len(all) == 0 || all[len(all)-1].Name != e.Name) {
			all = append(all, e)
		}
	}
	return all
}

func (b *memoryBucket) BeginParts(_ context.Context, name string) (string, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls++
	b.counter++
	id := strconv.Itoa(b.counter)
	b.uploads[id] = &bucketParts{name, b.now(), map[int]bucketPart{}}
	return id, nil
}

func (b *memoryBucket) PutPart(_ context.Context, name, upload string, n int, data []byte) (string, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls++
	u := b.uploads[upload]
	if u == nil || u.name != name {
		return "", fmt.Errorf("%s: no upload %s", name, upload)
	}
	b.counter++
	tag := strconv.Itoa(b.counter)
	u.parts[n] = bucketPart{tag, bytes.Clone(data)}
	return tag, nil
}

func (b *memoryBucket) CompleteParts(_ context.Context, name, upload string, tags []string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls++
	u := b.uploads[upload]
	if u == nil || u.name != name {
		return fmt.Errorf("%s: no upload %s", name, upload)
	}
	var data []byte
	for i, tag := range tags {
		p := u.parts[i+1]
		if p.tag != tag {
			return fmt.Errorf("%s: part %d is another one", name, i+1)
		}
		data = append(data, p.data...)
	}
	delete(b.uploads, upload)
	b.set(name, data, "")
	return nil
}

func (b *memoryBucket) AbortParts(_ context.Context, name, upload string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls++
	delete(b.uploads, upload)
	return nil
}

func (b *memoryBucket) AbortPartsBefore(_ context.Context, prefix string, before time.Time) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls++
	n := len(b.uploads)
	maps.DeleteFunc(b.uploads, func(_ string, u *bucketParts) bool {
		return strings.HasPrefix(u.name, prefix) && u.begun.Before(before)
	})
	return n - len(b.uploads), nil
}

func (b *memoryBucket) SignURL(_ context.Context, name string, ttl time.Duration) (string, error) {
	return "memory:" + name, nil
}

// names returns the names of all objects with a prefix.
func (b *memoryBucket) names(prefix string) []string {
	var all []string
	for _, e := range b.list(prefix, "", "") {
		all = append(all, e.Name)
	}
	return all
}
