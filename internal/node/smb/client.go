package smb

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"sluice/internal/blob"
	"sluice/oci"
)

// Client is a Share over a Transport. Use New, NewClient or NewKernel.
type Client struct {
	transport Transport
	opts      Options

	mu      sync.Mutex // before session.mu
	live    *session   // the connection that is used; nil: there is none
	attempt *attempt   // to make one; nil: nobody tries
	failed  int        // attempts in a row
	last    error      // of the last attempt
	pause   time.Time  // no attempt before
	closed  bool

	// Of the attempt under way: only one is.
	login     Login     // the last that Options.Login returned
	refused   string    // its password, once the server refused it
	refusedAt time.Time // when that was

	wg sync.WaitGroup // everything started; added to under mu unless closed
}

// New returns a share that is reached over a transport.
func New(t Transport, o Options) *Client {
	return &Client{transport: t, opts: o.withDefaults()}
}

// Open is as Share has it.
func (c *Client) Open(path string, size int64, name oci.Digest) blob.Source {
	return &file{client: c, path: path, size: size, name: name.String()}
}

// ReadFile is as Share has it.
func (c *Client) ReadFile(ctx context.Context, path string, limit int64) ([]byte, error) {
	var content []byte
	done := make(chan error, 1)
	err := c.start(func() {
		done <- c.with(ctx, path, func(s *session, h *handle) error {
			defer s.forget(path) // it is read once
			if h.file.Size() > limit {
				return oci.ErrSizeInvalid.Withf("%s has %d bytes on the file server, more than %d", path, h.file.Size(), limit)
			}
			content = make([]byte, h.file.Size())
			return h.read(content, 0)
		})
	})
	if err == nil {
		select {
		case err = <-done:
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("reading %s from the file server: %w", path, err)
	}
	return content, nil
}

// with does something with an open file; once more with a new connection if the one
// that was there has broken, perhaps long before. What is under way can't be taken
// back when ctx ends.
func (c *Client) with(ctx context.Context, path string, do func(*session, *handle) error) error {
	if err := checkPath(path); err != nil {
		return err
	}
	var err error
	for range 2 {
		var s *session
		if s, err = c.session(ctx); err != nil {
			return err
		}
		if err = s.with(ctx, path, do); !errors.Is(err, ErrUnreachable) {
			return err
		}
		c.drop(s, err)
		if ctx.Err() != nil {
			break
		}
	}
	return err
}

// start runs f in a goroutine that Close waits for.
func (c *Client) start(f func()) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return ErrClosed
	}
	c.wg.Go(f)
	return nil
}

// Close is as Share has it.
func (c *Client) Close() error {
	c.mu.Lock()
	c.closed = true
	if c.attempt != nil {
		c.attempt.cancel()
	}
	s := c.live
	c.live = nil
	c.mu.Unlock()
	var err error
	if s != nil {
		err = s.end(ErrClosed)
	}
	c.wg.Wait()
	if t, ok := c.transport.(io.Closer); ok {
		err = errors.Join(err, t.Close())
	}
	return err
}
