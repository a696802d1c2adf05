package storage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"
	"sync/atomic"
	"time"
)

// Objects is a Store in a Bucket of an object store. Any number of processes
// may use one bucket at a time.
//
// What was Put lies at its key, and so does a small object that an upload
// committed. At the key of a large one is a pointer, told from other objects by
// its label; the bytes are elsewhere, where several pointers can share them
// (objects_shared.go says how they live and die):
//
//	KEY                          object, or pointer: {"version", "data", "size", "ref"}
//	.sluice/data/ID/data         bytes, written once
//	.sluice/data/ID/refs/HASH-…  one for each pointer at them: its key
//	.sluice/data/ID/dying        no pointer may be added any more
//	.sluice/shared/IDENTITY      an ID with the bytes of that identity
//	.sluice/uploads/ID/state-…   checkpoints of an upload, numbered
//	.sluice/uploads/ID/tail-…    bytes of a checkpoint that no part has yet
//
// # Requests
//
// One after the other, and each counts in the latency: Open 1, and 2 of what has
// a pointer; Stat, Put and SignedURL 1; List 1 for each 1,000 names; Delete 2,
// and 3 with a pointer; Link 5. An upload: start 1, stat 2, resume 2, checkpoint
// 1, each with one more if there is a tail of more than 64 KiB, and one for each
// part of at least 8 MiB; commit 2 of at most 64 KiB, otherwise 6 if the bytes
// are there already, 8 if they are new, and 10 if those have several parts.
//
// Each upload buffers at most two parts.
type Objects struct {
	bucket   Bucket
	prefix   string
	identity func(key string) string

	now      func() time.Time
	partSize int // of the first parts, in bytes
	inline   int // larger objects get a pointer, in bytes
	checks   int // about how many refs a Sweep reads

	refsSeen atomic.Int64 // how many refs the last Sweep met
	uploads  sessions
}

// ObjectsOptions says how an Objects works. The zero value is useful.
type ObjectsOptions struct {
	// Prefix is a key below which everything is kept; empty is the whole
	// bucket. A key may be that much shorter.
	Prefix string

	// Identity is that of LocalOptions.
	Identity func(key string) string
}

// Names in the bucket, after the prefix. No key begins with a dot.
const (
	dataDir          = internalDir + "/data/"
	identityDir      = internalDir + "/shared/"
	bucketUploadsDir = internalDir + "/uploads/"
	checkName        = internalDir + "/check"
)

// requestTimeout bounds a request about a small object, with its retries; that
// about a large one may take a second more for each MiB.
const requestTimeout = time.Minute

// NewObjects returns the store in a bucket, which must exist. It sends nothing;
// see Check.
func NewObjects(bucket Bucket, opts ObjectsOptions) (*Objects, error) {
	prefix := strings.TrimSuffix(opts.Prefix, "/")
	if prefix != "" {
		if err := CheckKey(prefix); err != nil {
			return nil, fmt.Errorf("prefix in %s: %w", bucket, err)
		}
		prefix += "/"
	}
	identity := opts.Identity
	if identity == nil {
		identity = func(string) string { return "" }
	}
	return &Objects{
		bucket: bucket, prefix: prefix, identity: identity,
		now: time.Now, partSize: 8 << 20, inline: 64 << 10, checks: 10_000,
	}, nil
}

// Check implements Maintainer.
func (o *Objects) Check(ctx context.Context) error {
	if err := o.put(ctx, checkName, []byte("sluice can write here\n"), BucketPut{}); err != nil {
		return fmt.Errorf("object store %s can't be written: %w", o.bucket, err)
	}
	return nil
}

// Close implements Maintainer.
func (o *Objects) Close() error { return nil }

// Open implements Reader.
func (o *Objects) Open(ctx context.Context, key string, offset, length int64) (Object, error) {
	if err := CheckKey(key); err != nil {
		return nil, err
	}
	var lost pointer
	for {
		body, info, err := o.bucket.Get(ctx, o.prefix+key, 0, -1)
		if err != nil {
			return nil, err
		}
		p, ok, err := parsePointer(key, info.Label)
		if !ok && err == nil {
			return o.openPlain(ctx, key, body, info, offset, length)
		}
		body.Close()
		if err != nil {
			return nil, err
		}
		object, err := o.openData(ctx, key, p, offset, length)
		if !errors.Is(err, ErrNotFound) {
			return object, err
		}
		if p == lost {
			return nil, fmt.Errorf("object %s: its bytes, %s, are missing in %s: the store is damaged", key, o.dataName(p.Data), o.bucket)
		}
		lost = p // deleted meanwhile, and perhaps stored anew
	}
}

// openPlain opens an object that lies at its key, of which body is all.
func (o *Objects) openPlain(ctx context.Context, key string, body io.ReadCloser, info BucketInfo, offset, length int64) (Object, error) {
	length, err := rangeOf(key, info.Size, offset, length)
	if err != nil {
		body.Close()
		return nil, err
	}
	if offset > 0 && length > 0 {
		size := info.Size
		body.Close()
		if body, info, err = o.bucket.Get(ctx, o.prefix+key, offset, length); err != nil {
			return nil, err
		}
		if info.Size != size || info.Label != "" {
			body.Close()
			return nil, fmt.Errorf("object %s was replaced while it was opened: try again", key)
		}
	}
	return newBucketObject(key, body, info.Size, length), nil
}

// openData opens what a pointer points at. Errors: ErrNotFound, if it doesn't
// exist; ErrRange.
func (o *Objects) openData(ctx context.Context, key string, p pointer, offset, length int64) (Object, error) {
	length, err := rangeOf(key, p.Size, offset, length)
	if err != nil {
		return nil, err
	}
	if length == 0 {
		return newBucketObject(key, io.NopCloser(bytes.NewReader(nil)), p.Size, 0), nil
	}
	body, info, err := o.bucket.Get(ctx, o.dataName(p.Data), offset, length)
	if err == nil && info.Size != p.Size {
		body.Close()
		err = fmt.Errorf("object %s: %s in %s has %d bytes, not %d: the store is damaged", key, o.dataName(p.Data), o.bucket, info.Size, p.Size)
	}
	if err != nil {
		return nil, err
	}
	return newBucketObject(key, body, p.Size, length), nil
}

// Stat implements Reader.
func (o *Objects) Stat(ctx context.Context, key string) (int64, error) {
	p, info, err := o.look(ctx, key)
	if err != nil {
		return 0, err
	}
	if p != (pointer{}) {
		return p.Size, nil
	}
	return info.Size, nil
}

// look returns what lies at a key, with the pointer if it is one.
func (o *Objects) look(ctx context.Context, key string) (pointer, BucketInfo, error) {
	if err := CheckKey(key); err != nil {
		return pointer{}, BucketInfo{}, err
	}
	info, err := o.head(ctx, key)
	if err != nil {
		return pointer{}, info, err
	}
	p, _, err := parsePointer(key, info.Label)
	return p, info, err
}

// List implements Reader.
func (o *Objects) List(ctx context.Context, prefix, after string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		if err := checkPrefix(prefix); err != nil {
			yield("", err)
			return
		}
		start := o.prefix + prefix
		if after > prefix {
			start = o.prefix + after
		}
		for e, err := range o.bucket.List(ctx, o.prefix+prefix, start, "/") {
			if err != nil {
				yield("", err)
				return
			}
			// What isn't well-formed was put there by somebody else, or by us
			// below .sluice.
			name := strings.TrimPrefix(e.Name, o.prefix)
			if name <= after || CheckKey(strings.TrimSuffix(name, "/")) != nil {
				continue
			}
			if !yield(name, nil) {
				return
			}
		}
	}
}

// Put implements Writer.
func (o *Objects) Put(ctx context.Context, key string, data []byte) error {
	if len(data) > MaxPut {
		return fmt.Errorf("object %s of %d bytes: at most %d can be put at once", key, len(data), MaxPut)
	}
	if err := CheckKey(key); err != nil {
		return err
	}
	// A pointer that was there leaves its ref to Sweep.
	return o.put(ctx, key, data, BucketPut{})
}

// Link implements Writer.
func (o *Objects) Link(ctx context.Context, from, to string) error {
	if err := CheckKey(to); err != nil {
		return err
	}
	p, info, err := o.look(ctx, from)
	if err != nil {
		return err
	}
	if p == (pointer{}) && info.Size <= MaxPut {
		data, err := ReadAll(ctx, o, from, MaxPut)
		if err != nil {
			return err
		}
		return o.put(ctx, to, data, BucketPut{IfAbsent: true})
	}
	if p != (pointer{}) {
		c, ok, err := o.share(ctx, p.Data, p.Size, to)
		if err != nil {
			return err
		}
		if ok {
			return o.point(ctx, c, to)
		}
	}
	// Its bytes live only as long as the pointers that they have.
	return o.duplicate(ctx, from, to)
}

// duplicate moves the bytes of an object through this process.
func (o *Objects) duplicate(ctx context.Context, from, to string) error {
	r, err := o.Open(ctx, from, 0, -1)
	if err != nil {
		return err
	}
	defer r.Close()
	u, err := o.StartUpload(ctx)
	if err != nil {
		return err
	}
	defer u.Close()
	if _, err = io.Copy(u, r); err == nil {
		err = u.Commit(ctx, to)
	}
	if err != nil {
		return errors.Join(err, ignore(o.CancelUpload(ctx, u.ID()), ErrUploadUnknown))
	}
	return nil
}

// Delete implements Writer.
func (o *Objects) Delete(ctx context.Context, key string) error {
	p, _, err := o.look(ctx, key)
	if err != nil {
		return err
	}
	if err := o.remove(ctx, key); err != nil {
		return err
	}
	if p != (pointer{}) {
		// Failing leaves it to Sweep; the object is deleted.
		_ = o.remove(ctx, refName(p.Data, p.Ref))
	}
	return nil
}

// SignedURL implements Signer.
func (o *Objects) SignedURL(ctx context.Context, key string, ttl time.Duration) (string, error) {
	p, _, err := o.look(ctx, key)
	if err != nil {
		return "", err
	}
	name := o.prefix + key
	if p != (pointer{}) {
		name = o.dataName(p.Data)
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	return o.bucket.SignURL(ctx, name, ttl)
}

// What follows are requests of bounded duration about names after the prefix.

func (o *Objects) head(ctx context.Context, name string) (BucketInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	return o.bucket.Head(ctx, o.prefix+name)
}

func (o *Objects) put(ctx context.Context, name string, data []byte, opts BucketPut) error {
	ctx, cancel := context.WithTimeout(ctx, transferTimeout(len(data)))
	defer cancel()
	return o.bucket.Put(ctx, o.prefix+name, data, opts)
}

func (o *Objects) remove(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	return o.bucket.Delete(ctx, o.prefix+name)
}

// read returns an object of at most max bytes.
func (o *Objects) read(ctx context.Context, name string, max int64) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, transferTimeout(int(max)))
	defer cancel()
	body, info, err := o.bucket.Get(ctx, o.prefix+name, 0, -1)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	if info.Size > max {
		return nil, fmt.Errorf("object %s in %s has %d bytes: at most %d were expected", o.prefix+name, o.bucket, info.Size, max)
	}
	data := make([]byte, info.Size)
	if _, err := io.ReadFull(body, data); err != nil {
		return nil, fmt.Errorf("read %s in %s: %w", o.prefix+name, o.bucket, err)
	}
	return data, nil
}

// walk yields everything below a directory.
func (o *Objects) walk(ctx context.Context, dir string) iter.Seq2[BucketEntry, error] {
	return func(yield func(BucketEntry, error) bool) {
		for e, err := range o.bucket.List(ctx, o.prefix+dir, "", "") {
			e.Name = strings.TrimPrefix(e.Name, o.prefix)
			if !yield(e, err) || err != nil {
				return
			}
		}
	}
}

func transferTimeout(size int) time.Duration {
	return requestTimeout + time.Duration(size>>20)*time.Second
}

// ignore returns err unless it is what was expected.
func ignore(err, expected error) error {
	if errors.Is(err, expected) {
		return nil
	}
	return err
}

// bucketObject is a range of an object that a service sends.
type bucketObject struct {
	key  string
	body io.ReadCloser
	rest io.LimitedReader
	size int64
}

func newBucketObject(key string, body io.ReadCloser, size, length int64) *bucketObject {
	return &bucketObject{key: key, body: body, rest: io.LimitedReader{R: body, N: length}, size: size}
}

func (b *bucketObject) Read(p []byte) (int, error) {
	n, err := b.rest.Read(p)
	return n, b.check(err)
}

func (b *bucketObject) WriteTo(w io.Writer) (int64, error) {
	n, err := io.Copy(w, &b.rest)
	if err == nil {
		err = b.check(io.EOF)
	}
	if err == io.EOF {
		err = nil
	}
	return n, err
}

// check finds a body that ended too early.
func (b *bucketObject) check(err error) error {
	if err == io.EOF && b.rest.N > 0 {
		return fmt.Errorf("object %s: %d bytes are missing at its end: %w", b.key, b.rest.N, io.ErrUnexpectedEOF)
	}
	return err
}

func (b *bucketObject) Size() int64  { return b.size }
func (b *bucketObject) Close() error { return b.body.Close() }
