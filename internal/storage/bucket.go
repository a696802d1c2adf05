package storage

import (
	"context"
	"io"
	"iter"
	"time"
)

// Bucket is what Objects needs of an object store: a container of Azure Blob
// Storage (azureblob), a bucket of S3 (s3). It is a thin layer over the
// service's requests. Names are those of the bucket, at most 1,024 printable
// ASCII characters.
//
// The service must be strongly consistent: what a method acknowledged is seen
// by everything that begins afterwards, in listings too. Both have been that
// since 2010 and 2020. Methods retry what is worth it, a bounded number of
// times, may be called concurrently, and return errors that name the object
// and the service, and no secret.
type Bucket interface {
	// Get opens length bytes of an object from offset on, or all that follow
	// if length is negative. The range must not be empty, except that of an
	// empty object. Errors: ErrNotFound, ErrRange.
	Get(ctx context.Context, name string, offset, length int64) (io.ReadCloser, BucketInfo, error)

	// Head returns what is known of an object. Errors: ErrNotFound.
	Head(ctx context.Context, name string) (BucketInfo, error)

	// Put stores an object whole, in one request. Errors: ErrExists, with
	// opts.IfAbsent only; after a retry it may be this very Put that it
	// ran into.
	Put(ctx context.Context, name string, data []byte, opts BucketPut) error

	// Delete removes an object; that there is none is no error.
	Delete(ctx context.Context, name string) error

	// List yields, in the order of their bytes, the names that begin with
	// prefix and sort after the given one. With a delimiter, what has one
	// beyond the prefix is cut after the first and yielded once.
	List(ctx context.Context, prefix, after, delimiter string) iter.Seq2[BucketEntry, error]

	// BeginParts begins to make an object of parts. It can be seen when
	// CompleteParts has returned.
	BeginParts(ctx context.Context, name string) (upload string, err error)

	// PutPart stores part number n, counted from 1, of at least 5 MiB except
	// for the last one, and returns what CompleteParts wants to know of it.
	PutPart(ctx context.Context, name, upload string, n int, data []byte) (tag string, err error)

	// CompleteParts makes the object of the parts with these tags, which are
	// 1, 2, 3 and so on; parts that aren't among them are dropped. It fails
	// if one of them was replaced since.
	CompleteParts(ctx context.Context, name, upload string, tags []string) error

	// AbortParts drops all parts. That there are none is no error.
	AbortParts(ctx context.Context, name, upload string) error

	// AbortPartsBefore does that to all uploads of parts to names with that
	// prefix that were begun before a time, and counts them. Where the
	// service does it by itself there is nothing to do.
	AbortPartsBefore(ctx context.Context, prefix string, before time.Time) (int, error)

	// SignURL returns a URL for reading an object.
	SignURL(ctx context.Context, name string, ttl time.Duration) (string, error)

	// String names the place, for messages.
	String() string
}

// BucketInfo is what a service tells of an object besides its bytes.
type BucketInfo struct {
	Size     int64 // of the whole object
	Modified time.Time
	Label    string // see BucketPut
}

// BucketPut says how to Put. The zero value replaces what there is.
type BucketPut struct {
	// IfAbsent fails with ErrExists if there is an object of that name.
	IfAbsent bool

	// Label is at most 1 KiB of printable ASCII that the service keeps
	// beside the bytes, as metadata; no byte of an object can forge it.
	Label string
}

// BucketEntry is an element of a listing. One that ends with the delimiter
// has only its name.
type BucketEntry struct {
	Name     string
	Size     int64
	Modified time.Time
}
