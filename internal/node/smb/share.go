package smb

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path"
	"strings"
	"sync/atomic"
	"time"

	"sluice/internal/blob"
	"sluice/oci"
)

// Share reads files of a share. Its methods may be called concurrently.
//
// Errors are ErrUnreachable, which may pass; ErrRefused; fs.ErrNotExist, of a file and
// of the share; oci.ErrSizeInvalid where a file isn't of the size that was said. All
// but the first are final for blob.Final.
type Share interface {
	// Open returns a file, by its slash-separated path in the share, as a Source of a
	// known size in bytes. name, the digest of its content, is for errors. Nothing is
	// asked before the first read; then a file of another size is oci.ErrSizeInvalid.
	Open(path string, size int64, name oci.Digest) blob.Source

	// ReadFile reads a small file whole; one of more than limit bytes is
	// oci.ErrSizeInvalid.
	ReadFile(ctx context.Context, path string, limit int64) ([]byte, error)

	// Close ends connections and waits for what was started. Reads under way, and
	// later ones, fail.
	Close() error
}

// Login is what a share is reached with.
type Login struct {
	Server   string // HOST[:PORT]; the port is 445 if it isn't said
	Share    string
	Username string
	Password string
	Expires  time.Time // of username and password; zero: never
}

// Options say how a share is reached.
type Options struct {
	// Login returns what the share is reached with. It is called for the first
	// connection, for a later one when what it returned last has expired or soon
	// will, and when a server refused it: refused is then the password that was
	// refused less than a minute ago, "" otherwise. One call at a time is made,
	// whoever waits for it. ctx is that of the attempt to connect.
	Login func(ctx context.Context, refused string) (Login, error)

	// Timeout bounds connecting, sign-in included; and a connection over which no
	// answer has come for as long, while there is one to come, is given up. Default
	// 10 s.
	Timeout time.Duration

	// Tally counts connections; nil: nobody does. Several shares may have one.
	Tally *Tally

	// Log gets what happens to connections; nil: nothing is logged.
	Log *slog.Logger
}

// Tally counts connections with file servers. The zero value is ready.
type Tally struct {
	Made   atomic.Int64
	Failed atomic.Int64 // attempts to make one
	Broken atomic.Int64 // of those that were made
}

func (o Options) withDefaults() Options {
	if o.Timeout <= 0 {
		o.Timeout = 10 * time.Second
	}
	if o.Tally == nil {
		o.Tally = new(Tally)
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

var (
	// ErrUnreachable is that there is no connection to the server, or that it broke.
	ErrUnreachable = errors.New("the file server can't be reached")

	// ErrRefused is that the server doesn't accept the credentials, and that there
	// are no others. It is so until Options.Login returns others.
	ErrRefused = fmt.Errorf("the file server refused the credentials: %w", oci.ErrDenied)

	// ErrClosed is that the share was closed.
	ErrClosed = errors.New("the share is closed")
)

// NotExist returns the error of a file, or a share, that isn't there.
func NotExist(what string) error {
	return fmt.Errorf("%w: %w", oci.ErrBlobUnknown.Withf("the file server has no %s", what), fs.ErrNotExist)
}

// checkPath returns an error unless name is a path that can only be in the share.
func checkPath(name string) error {
	if name == "" || name == "." || path.Clean(name) != name || strings.HasPrefix(name, "/") || strings.HasPrefix(name, "..") ||
		strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || strings.ContainsRune(`\:*?"<>|`, r) }) {
		return oci.ErrNameInvalid.Withf("%q is no path of a file in a share", name)
	}
	return nil
}
