package smb

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	// maxRequests is how many are under way at once. Those for which there is no room
	// wait here, where their readers can give them up, and not at the server.
	maxRequests = 16

	// maxHandles is how many files are kept open that nobody reads.
	maxHandles = 64

	// maxIdle is how long: a file that the server has removed takes its room there until
	// it's closed here.
	maxIdle = time.Minute
)

// session is a connection and the files that are open over it.
type session struct {
	conn  Connection
	start func(func()) error // Client.start
	done  chan struct{}      // closed at the end
	room  chan struct{}      // holds as many as there are requests

	mu      sync.Mutex
	handles map[string]*handle // by path; those forgotten aren't in it
	pending int                // requests under way
	heard   time.Time          // when the last answer came, or the first of pending was asked
	ended   error
}

// handle is an open file, or one that is being opened.
type handle struct {
	path   string
	opened chan struct{} // closed when what is below is set
	file   File
	err    error

	// Of the session's mu.
	refs   int
	used   time.Time
	closed bool // when the last reference goes
}

func newSession(conn Connection, start func(func()) error) *session {
	return &session{conn: conn, start: start, done: make(chan struct{}), room: make(chan struct{}, maxRequests), handles: make(map[string]*handle)}
}

// with does something with an open file, as soon as there is room for a request.
func (s *session) with(ctx context.Context, path string, do func(*session, *handle) error) error {
	select {
	case s.room <- struct{}{}:
		defer func() { <-s.room }()
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-s.done: // found below
	}
	s.mu.Lock()
	if s.ended != nil {
		defer s.mu.Unlock()
		return s.ended
	}
	h := s.handles[path]
	first := h == nil
	if first {
		h = &handle{path: path, opened: make(chan struct{})}
		s.handles[path] = h
	}
	h.refs++
	s.ask()
	s.mu.Unlock()
	defer s.release(h)
	if first {
		h.file, h.err = s.conn.Open(path)
		close(h.opened)
	}
	<-h.opened // who opens it ends when the connection does
	err := h.err
	if err == nil {
		s.hear()
		err = do(s, h)
	}
	if err != nil {
		s.forget(path) // it may be another file by now
	}
	return s.why(err)
}

// ask notes a request. The caller holds mu.
func (s *session) ask() {
	if s.pending == 0 {
		s.heard = time.Now()
	}
	s.pending++
}

// hear notes an answer.
func (s *session) hear() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.heard = time.Now()
}

// why returns what ended the session, of which err is but the consequence.
func (s *session) why(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil && s.ended != nil && errors.Is(err, ErrUnreachable) {
		return s.ended
	}
	return err
}

// forget has a file opened anew by its next reader.
func (s *session) forget(path string) {
	s.mu.Lock()
	h := s.handles[path]
	if h != nil {
		delete(s.handles, path)
		h.closed = true // by its last reader
	}
	unused := h != nil && h.refs == 0
	s.mu.Unlock()
	if unused {
		s.close([]*handle{h})
	}
}

// release gives up a reference, and closes what is of no more use.
func (s *session) release(h *handle) {
	s.mu.Lock()
	now := time.Now()
	s.pending--
	h.refs--
	h.used = now
	s.heard = now
	var unused []*handle
	if h.refs == 0 && h.closed {
		unused = append(unused, h)
	}
	if len(s.handles) > maxHandles {
		unused = append(unused, s.takeOldest()...)
	}
	s.mu.Unlock()
	s.close(unused)
}

// takeOldest takes the file out that has been unused for longest, if there is one.
// The caller holds mu.
func (s *session) takeOldest() []*handle {
	var oldest *handle
	for _, h := range s.handles {
		if h.refs == 0 && (oldest == nil || h.used.Before(oldest.used)) {
			oldest = h
		}
	}
	if oldest == nil {
		return nil
	}
	delete(s.handles, oldest.path)
	return []*handle{oldest}
}

// takeIdle takes those out that have been unused for too long.
func (s *session) takeIdle(now time.Time) []*handle {
	s.mu.Lock()
	defer s.mu.Unlock()
	var idle []*handle
	for path, h := range s.handles {
		if h.refs == 0 && now.Sub(h.used) > maxIdle {
			delete(s.handles, path)
			idle = append(idle, h)
		}
	}
	return idle
}

// close closes files that nobody can reach any more, and waits for no server.
func (s *session) close(handles []*handle) {
	for _, h := range handles {
		if h.file == nil {
			continue
		}
		f := func() {
			s.mu.Lock()
			s.ask()
			s.mu.Unlock()
			_ = h.file.Close() // nothing was written
			s.mu.Lock()
			s.pending--
			s.heard = time.Now()
			s.mu.Unlock()
		}
		if s.start(f) != nil { // the client is closed, and so is the connection
			f()
		}
	}
}

// silent reports whether an answer is to come and nothing has come for too long.
func (s *session) silent(now time.Time, timeout time.Duration) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pending > 0 && now.Sub(s.heard) >= timeout
}

// end ends the connection, and with it what is under way.
func (s *session) end(why error) error {
	s.mu.Lock()
	if s.ended != nil {
		s.mu.Unlock()
		return nil
	}
	s.ended = why
	var unused []*handle
	for _, h := range s.handles {
		h.closed = true
		if h.refs == 0 {
			unused = append(unused, h)
		}
	}
	clear(s.handles)
	s.mu.Unlock()
	close(s.done)
	err := s.conn.Close()
	s.close(unused)
	return err
}

// watch gives a connection up over which nothing comes, and closes files that nobody
// reads any more, until it has ended.
func (c *Client) watch(s *session) {
	tick := time.NewTicker(max(c.opts.Timeout/8, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-s.done:
			return
		case now := <-tick.C:
			if s.silent(now, c.opts.Timeout) {
				c.drop(s, fmt.Errorf("%w: no answer came for %v", ErrUnreachable, c.opts.Timeout))
				return
			}
			s.close(s.takeIdle(now))
		}
	}
}

// read fills p with what begins at off.
func (h *handle) read(p []byte, off int64) error {
	for done := 0; done < len(p); {
		n, err := h.file.ReadAt(p[done:min(len(p), done+partSize)], off+int64(done))
		done += n
		switch {
		case err == io.EOF:
			return fmt.Errorf("%w: %s ended at byte %d; when it was opened, it had %d", io.ErrUnexpectedEOF, h.path, off+int64(done), h.file.Size())
		case err != nil:
			return err
		}
	}
	return nil
}
