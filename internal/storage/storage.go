// Package storage keeps objects: bytes under a key such as
// "repositories/library/debian/_tags/12". It is what the registry stands on,
// and small enough that a local disk, Azure Blob Storage and S3 can all offer
// it. Local and Memory are here, and Objects, the Store in an object store,
// whose services are behind Bucket: see azureblob and s3.
//
// Small objects (manifests, tags) are Put whole. Large ones (blobs) come
// through an Upload, which can be continued by another process, and appear
// under their key only when it commits. There is no rename and no partial
// overwrite: an object is whole from the moment it can be seen.
//
// The suite that every Store passes is in storagetest.
//
// # Promises
//
// What a method acknowledges by returning nil is durable and visible to every
// reader that begins afterwards. Every method may be called concurrently. A
// crash at any moment leaves no part of an object visible; what it may leave
// behind invisibly is swept by the implementation.
//
// # Keys
//
// A key is one or more components joined by "/". A component has 1 to 255
// bytes, none of them a slash, a control character or outside ASCII, and does
// not begin with a dot (CheckKey). No key may be a leading part of another:
// with "a/b" stored, neither "a" nor "a/b/c" can be, since on a disk "a/b" is a
// file.
package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"
)

// The errors that callers tell apart; those returned wrap them and name the key
// or the upload.
var (
	ErrNotFound      = errors.New("no such object")
	ErrExists        = errors.New("object exists")
	ErrRange         = errors.New("range begins beyond the end of the object")
	ErrUploadUnknown = errors.New("no such upload")
	// ErrUploadConflict: another process has continued the upload since it
	// was resumed here. Resume it again to see how far it is.
	ErrUploadConflict = errors.New("upload was continued by another process")
	ErrLocked         = errors.New("in use by another process")
)

// Store is a place for objects.
type Store interface {
	Reader
	Writer
	Uploader
}

// Reader is the half of a Store that looks.
type Reader interface {
	// Open opens length bytes of an object from offset on; a negative length
	// means all that follows. A range may end beyond the object, where it is
	// cut, and begin at its end, but not beyond. An object that is deleted
	// or replaced while open can be read to its end unchanged.
	//
	// Errors: ErrNotFound, ErrRange.
	Open(ctx context.Context, key string, offset, length int64) (Object, error)

	// Stat returns an object's size. Errors: ErrNotFound.
	Stat(ctx context.Context, key string) (int64, error)

	// List yields what is directly below prefix, which is empty or ends with
	// a slash: keys of objects, and prefixes of more objects, which end with
	// a slash. A prefix is yielded only if there is an object below it. The
	// order is that of the bytes of the yielded strings, and only what sorts
	// after the given string is yielded, so that a listing can be continued.
	//
	// What is stored or deleted while the sequence runs may or may not be in
	// it. An error comes at most once, as the last element.
	List(ctx context.Context, prefix, after string) iter.Seq2[string, error]
}

// Writer is the half of a Store that changes.
type Writer interface {
	// Put stores a small object, at most MaxPut bytes, and replaces the one
	// that has the key. Concurrent Puts to one key leave one of them, whole.
	Put(ctx context.Context, key string, data []byte) error

	// Link makes the object from available as to as well, without moving
	// its bytes through the caller. The two are independent afterwards.
	//
	// Errors: ErrNotFound, ErrExists.
	Link(ctx context.Context, from, to string) error

	// Delete removes an object. Errors: ErrNotFound.
	Delete(ctx context.Context, key string) error
}

// Uploader makes large objects.
type Uploader interface {
	// StartUpload begins an upload. It lasts until it is committed or
	// canceled, or nothing happened to it for long enough to be swept.
	StartUpload(ctx context.Context) (Upload, error)

	// ResumeUpload continues an upload at its last checkpoint. While another
	// Upload of the same ID is open it waits for it to be closed, as long as
	// ctx allows.
	//
	// Errors: ErrUploadUnknown.
	ResumeUpload(ctx context.Context, id string) (Upload, error)

	// StatUpload returns what the last checkpoint of an upload recorded,
	// without waiting for whoever has it open.
	//
	// Errors: ErrUploadUnknown.
	StatUpload(ctx context.Context, id string) (size int64, state []byte, err error)

	// CancelUpload discards an upload and all of its bytes, also while
	// somebody has it open: their next Checkpoint or Commit fails with
	// ErrUploadUnknown.
	//
	// Errors: ErrUploadUnknown.
	CancelUpload(ctx context.Context, id string) error
}

// Upload is an object on its way into a Store. It must be closed, and its
// methods must not be called concurrently.
type Upload interface {
	// ID resumes the upload with ResumeUpload. It consists of letters,
	// digits and dashes.
	ID() string

	// Position tells how many bytes were written, and the state that the
	// last checkpoint recorded with them.
	Position() (size int64, state []byte)

	// Write appends. The bytes are durable after the next Checkpoint or
	// Commit; those written after the last one are dropped by Close.
	io.Writer

	// Checkpoint makes everything written durable, together with state: at
	// most 4 KiB that the caller needs to go on, such as that of a running
	// hash. It is atomic: after a crash the upload is found at a checkpoint.
	// One without bytes may be lost with power, and the upload with it.
	Checkpoint(ctx context.Context, state []byte) error

	// Content reads back what was written so far. A Store whose service
	// can't read what isn't an object yet may refuse to Write afterwards.
	Content(ctx context.Context) (io.ReadCloser, error)

	// Commit makes what was written the object of that key, and ends the
	// upload. If the key is taken, that is ErrExists, the object there is
	// left alone and the upload is over as well.
	Commit(ctx context.Context, key string) error

	// Close lets others resume the upload. It may be called more than once,
	// and after Commit.
	Close() error
}

// Object is an open object, or a range of one.
type Object interface {
	io.ReadCloser

	// WriterTo writes what is left to be read. An object in a file is handed
	// to the kernel (sendfile) where the writer is a socket.
	io.WriterTo

	// Size is that of the whole object.
	Size() int64
}

// MaxPut bounds what Put takes, in bytes; more goes through an Upload.
const MaxPut = 16 << 20

// maxState bounds the state of a checkpoint, in bytes.
const maxState = 4 << 10

// maxComponent is what file systems allow a name to have, in bytes.
const maxComponent = 255

// maxKey is what Azure Blob Storage and S3 allow, in bytes.
const maxKey = 1024

// CheckKey returns an error unless key is well-formed.
func CheckKey(key string) error {
	if len(key) > maxKey {
		return fmt.Errorf("object key of %d bytes: %d are allowed", len(key), maxKey)
	}
	if !isKey(key) {
		return fmt.Errorf("%q is not an object key: components of printable ASCII, not beginning with a dot, joined by slashes", key)
	}
	return nil
}

// isKey is a regular expression by hand: every read of a blob comes by here.
func isKey(key string) bool {
	length := 0 // of the component
	for i := range len(key) {
		switch c := key[i]; {
		case c == '/':
			if length == 0 {
				return false
			}
			length = 0
			continue
		case c <= ' ' || c > '~', c == '.' && length == 0:
			return false
		}
		if length++; length > maxComponent {
			return false
		}
	}
	return length > 0
}

// checkPrefix is CheckKey for List.
func checkPrefix(prefix string) error {
	if prefix == "" {
		return nil
	}
	key, ok := strings.CutSuffix(prefix, "/")
	if !ok {
		return fmt.Errorf("prefix %q does not end with a slash", prefix)
	}
	return CheckKey(key)
}

// ReadAll returns the content of an object, which must not have more than max
// bytes. Errors: ErrNotFound.
func ReadAll(ctx context.Context, r Reader, key string, max int64) ([]byte, error) {
	o, err := r.Open(ctx, key, 0, -1)
	if err != nil {
		return nil, err
	}
	defer o.Close()
	if o.Size() > max {
		return nil, fmt.Errorf("object %s has %d bytes: at most %d were expected", key, o.Size(), max)
	}
	data := make([]byte, o.Size())
	if _, err := io.ReadFull(o, data); err != nil {
		return nil, fmt.Errorf("read object %s: %w", key, err)
	}
	return data, nil
}

// rangeOf checks a range against an object's size and returns its length.
func rangeOf(key string, size, offset, length int64) (int64, error) {
	if offset < 0 || offset > size {
		return 0, fmt.Errorf("%s: offset %d of %d bytes: %w", key, offset, size, ErrRange)
	}
	if length < 0 || length > size-offset {
		length = size - offset
	}
	return length, nil
}
