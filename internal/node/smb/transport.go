package smb

import "context"

// Transport makes connections to file servers.
type Transport interface {
	// Connect signs in and connects to the share. It ends soon after ctx does. Errors
	// are ErrRefused, fs.ErrNotExist (the share) and, all others, ErrUnreachable.
	Connect(ctx context.Context, l Login) (Connection, error)
}

// Connection is a share that somebody is signed in to. Its methods may be called
// concurrently.
type Connection interface {
	// Open opens a file for reading: fs.ErrNotExist if there is none, ErrUnreachable
	// if the connection is of no use any more. It can take as long as it takes: Close
	// ends it.
	Open(path string) (File, error)

	// Close ends the connection and, soon, all that is under way, with ErrUnreachable.
	// It doesn't wait for the server, and may be called again.
	Close() error
}

// File is an open file. Its methods may be called concurrently, but for Close.
type File interface {
	// Size is what it was when the file was opened, in bytes.
	Size() int64

	// ReadAt is io.ReaderAt's, for at most partSize bytes: less than len(p) come with
	// an error, which is io.EOF at the end of the file, ErrUnreachable if the
	// connection is of no use any more. It can take as long as it takes: the
	// connection's Close ends it.
	ReadAt(p []byte, off int64) (int, error)

	// Close closes the file.
	Close() error
}
