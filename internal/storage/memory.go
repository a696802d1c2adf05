package storage

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"
)

// Memory is a Store in memory, for tests and for registries that needn't
// outlive their process. Its zero value is empty and ready.
type Memory struct {
	mu      sync.Mutex
	objects map[string][]byte        // guarded by mu; the slices are never written to
	pending map[string]*memoryUpload // guarded by mu; what a checkpoint holds

	uploads sessions
}

// Open implements Reader.
func (m *Memory) Open(_ context.Context, key string, offset, length int64) (Object, error) {
	data, err := m.get(key)
	if err != nil {
		return nil, err
	}
	if length, err = rangeOf(key, int64(len(data)), offset, length); err != nil {
		return nil, err
	}
	return &memoryObject{Reader: bytes.NewReader(data[offset : offset+length]), size: int64(len(data))}, nil
}

// Stat implements Reader.
func (m *Memory) Stat(_ context.Context, key string) (int64, error) {
	data, err := m.get(key)
	return int64(len(data)), err
}

// List implements Reader.
func (m *Memory) List(ctx context.Context, prefix, after string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		if err := checkPrefix(prefix); err != nil {
			yield("", err)
			return
		}
		names := map[string]bool{}
		m.mu.Lock()
		for key := range m.objects {
			rest, ok := strings.CutPrefix(key, prefix)
			if !ok {
				continue
			}
			if i := strings.IndexByte(rest, '/'); i >= 0 {
				rest = rest[:i+1]
			}
			if prefix+rest > after {
				names[prefix+rest] = true
			}
		}
		m.mu.Unlock()
		for _, name := range slices.Sorted(maps.Keys(names)) {
			if err := ctx.Err(); err != nil {
				yield("", err)
				return
			}
			if !yield(name, nil) {
				return
			}
		}
	}
}

// Put implements Writer.
func (m *Memory) Put(_ context.Context, key string, data []byte) error {
	if len(data) > MaxPut {
		return fmt.Errorf("object %s of %d bytes: at most %d can be put at once", key, len(data), MaxPut)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.set(key, bytes.Clone(data), true)
}

// Link implements Writer.
func (m *Memory) Link(_ context.Context, from, to string) error {
	data, err := m.get(from)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.set(to, data, false)
}

// Delete implements Writer.
func (m *Memory) Delete(_ context.Context, key string) error {
	if err := CheckKey(key); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.objects[key]; !ok {
		return fmt.Errorf("%s: %w", key, ErrNotFound)
	}
	delete(m.objects, key)
	return nil
}

func (m *Memory) get(key string) ([]byte, error) {
	if err := CheckKey(key); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	data, ok := m.objects[key]
	if !ok {
		return nil, fmt.Errorf("%s: %w", key, ErrNotFound)
	}
	return data, nil
}

// set stores an object. m.mu is held.
func (m *Memory) set(key string, data []byte, replace bool) error {
	if err := CheckKey(key); err != nil {
		return err
	}
	if _, ok := m.objects[key]; ok && !replace {
		return fmt.Errorf("%s: %w", key, ErrExists)
	}
	if m.objects == nil {
		m.objects = map[string][]byte{}
	}
	m.objects[key] = data
	return nil
}

// memoryUpload is an upload; in Memory.pending, one as of its last checkpoint.
type memoryUpload struct {
	store *Memory
	id    string
	data  []byte
	state []byte
	done  func()
}

// StartUpload implements Uploader.
func (m *Memory) StartUpload(ctx context.Context) (Upload, error) {
	id := newUploadID()
	done, err := m.uploads.acquire(ctx, id)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pending == nil {
		m.pending = map[string]*memoryUpload{}
	}
	m.pending[id] = &memoryUpload{}
	return &memoryUpload{store: m, id: id, done: done}, nil
}

// ResumeUpload implements Uploader.
func (m *Memory) ResumeUpload(ctx context.Context, id string) (Upload, error) {
	done, err := m.uploads.acquire(ctx, id)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.pending[id]
	if p == nil {
		done()
		return nil, fmt.Errorf("upload %.100q: %w", id, ErrUploadUnknown)
	}
	return &memoryUpload{store: m, id: id, data: p.data, state: p.state, done: done}, nil
}

// StatUpload implements Uploader.
func (m *Memory) StatUpload(_ context.Context, id string) (int64, []byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.pending[id]
	if p == nil {
		return 0, nil, fmt.Errorf("upload %.100q: %w", id, ErrUploadUnknown)
	}
	return int64(len(p.data)), p.state, nil
}

// CancelUpload implements Uploader.
func (m *Memory) CancelUpload(_ context.Context, id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pending[id] == nil {
		return fmt.Errorf("upload %.100q: %w", id, ErrUploadUnknown)
	}
	delete(m.pending, id)
	return nil
}

func (u *memoryUpload) ID() string { return u.id }

func (u *memoryUpload) Position() (int64, []byte) { return int64(len(u.data)), u.state }

func (u *memoryUpload) Write(p []byte) (int, error) {
	// Growing in place is fine: a checkpoint holds a shorter slice of the
	// same bytes, and one Upload at a time appends to it.
	u.data = append(u.data, p...)
	return len(p), nil
}

func (u *memoryUpload) Checkpoint(_ context.Context, state []byte) error {
	if len(state) > maxState {
		return fmt.Errorf("upload %s: state of %d bytes: %d are allowed", u.id, len(state), maxState)
	}
	u.store.mu.Lock()
	defer u.store.mu.Unlock()
	p := u.store.pending[u.id]
	if p == nil {
		return fmt.Errorf("upload %s: %w", u.id, ErrUploadUnknown)
	}
	u.state = bytes.Clone(state)
	p.data, p.state = u.data, u.state
	return nil
}

func (u *memoryUpload) Content(context.Context) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(u.data)), nil
}

func (u *memoryUpload) Commit(_ context.Context, key string) error {
	if err := CheckKey(key); err != nil {
		return err
	}
	defer u.Close()
	u.store.mu.Lock()
	defer u.store.mu.Unlock()
	if u.store.pending[u.id] == nil {
		return fmt.Errorf("upload %s: %w", u.id, ErrUploadUnknown)
	}
	delete(u.store.pending, u.id)
	return u.store.set(key, u.data, false)
}

func (u *memoryUpload) Close() error {
	if u.done != nil {
		u.done()
		u.done = nil
	}
	return nil
}

type memoryObject struct {
	*bytes.Reader
	size int64
}

func (o *memoryObject) Size() int64  { return o.size }
func (o *memoryObject) Close() error { return nil }
