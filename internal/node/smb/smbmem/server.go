// Package smbmem is a file server in memory: for tests of what reads from a share, in
// which it is to be slow, gone, or not what it was.
//
// Server is an smb.Transport, so what is tested with it has smb.Client in it as with
// any server: connections that are made anew, credentials that are asked for again,
// files that are kept open.
package smbmem

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"sync"
	"time"

	"sluice/internal/node/smb"
)

// Server is a file server. Use New. Its methods may be called concurrently.
type Server struct {
	mu        sync.Mutex
	files     map[string]*content
	share     string   // its name; "": any
	passwords []string // accepted; nil: all
	delay     time.Duration
	down      bool
	mute      chan struct{} // closed when it answers again; nil: it answers
	conns     map[*connection]struct{}
	requests  int
	connects  int
}

// content is a file's, which readers have open under whatever name.
type content struct {
	mu   sync.Mutex
	data []byte
}

// New returns a server that has files, by their paths in the share, and accepts any
// password.
func New(files map[string][]byte) *Server {
	s := &Server{files: make(map[string]*content), conns: make(map[*connection]struct{})}
	for path, data := range files {
		s.Put(path, data)
	}
	return s
}

// Share returns the share, read with credentials that Accept needn't know: those of
// o.Login, or some if that is nil.
func (s *Server) Share(o smb.Options) *smb.Client {
	if o.Login == nil {
		o.Login = func(context.Context, string) (smb.Login, error) {
			return smb.Login{Server: "memory", Share: "share", Username: "user", Password: "password"}, nil
		}
	}
	return smb.New(s, o)
}

// Put makes a file, or puts another in its place. Who has the old one open reads it on.
func (s *Server) Put(path string, data []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files[path] = &content{data: bytes.Clone(data)}
}

// Alter changes a file that is there, also for those who have it open: change gets its
// content and returns the new one.
func (s *Server) Alter(path string, change func(data []byte) []byte) {
	s.mu.Lock()
	f := s.files[path]
	s.mu.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.data = change(bytes.Clone(f.data))
}

// Remove removes a file. Who has it open reads it on.
func (s *Server) Remove(path string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.files, path)
}

// Accept says which passwords are accepted from now on. Who is signed in stays so.
func (s *Server) Accept(passwords ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.passwords = append([]string{}, passwords...)
}

// Name says what the share is called; any other isn't there from now on.
func (s *Server) Name(share string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.share = share
}

// Delay says how long each request takes from now on.
func (s *Server) Delay(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.delay = d
}

// Down ends all connections, and refuses new ones until Up.
func (s *Server) Down() {
	s.mu.Lock()
	s.down = true
	conns := slices.Collect(maps.Keys(s.conns))
	s.mu.Unlock()
	for _, c := range conns {
		_ = c.Close() // never fails
	}
}

// Mute answers nothing until Up, also to those who connect.
func (s *Server) Mute() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mute == nil {
		s.mute = make(chan struct{})
	}
}

// Up is the end of Down and Mute.
func (s *Server) Up() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down = false
	if s.mute != nil {
		close(s.mute)
		s.mute = nil
	}
}

// Requests is how many were answered to those who are signed in.
func (s *Server) Requests() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.requests
}

// Connects is how often somebody tried to sign in.
func (s *Server) Connects() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.connects
}

// Connect is as smb.Transport has it.
func (s *Server) Connect(ctx context.Context, l smb.Login) (smb.Connection, error) {
	c := &connection{server: s, closed: make(chan struct{})}
	s.mu.Lock()
	s.connects++
	s.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	if err := c.take(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.down:
		return nil, fmt.Errorf("%w: it is down", smb.ErrUnreachable)
	case s.passwords != nil && !slices.Contains(s.passwords, l.Password):
		return nil, smb.ErrRefused
	case s.share != "" && l.Share != s.share:
		return nil, smb.NotExist("share " + l.Share)
	}
	s.conns[c] = struct{}{}
	return c, nil
}

type connection struct {
	server *Server
	once   sync.Once
	closed chan struct{}
}

// take lets the time of a request pass.
func (c *connection) take() error {
	c.server.mu.Lock()
	delay, mute, down := c.server.delay, c.server.mute, c.server.down
	c.server.mu.Unlock()
	gone := fmt.Errorf("%w: the connection is closed", smb.ErrUnreachable)
	if down {
		return gone
	}
	if mute != nil {
		select {
		case <-mute:
		case <-c.closed:
			return gone
		}
	}
	t := time.NewTimer(delay)
	defer t.Stop()
	select {
	case <-c.closed:
		return gone
	default:
	}
	select {
	case <-t.C:
		return nil
	case <-c.closed:
		return gone
	}
}

// request is take, counted.
func (c *connection) request() error {
	err := c.take()
	if err == nil {
		c.server.mu.Lock()
		c.server.requests++
		c.server.mu.Unlock()
	}
	return err
}

func (c *connection) Open(path string) (smb.File, error) {
	if err := c.request(); err != nil {
		return nil, err
	}
	c.server.mu.Lock()
	f := c.server.files[path]
	c.server.mu.Unlock()
	if f == nil {
		return nil, smb.NotExist(path)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return &file{conn: c, content: f, size: int64(len(f.data))}, nil
}

func (c *connection) Close() error {
	c.once.Do(func() {
		close(c.closed)
		c.server.mu.Lock()
		delete(c.server.conns, c)
		c.server.mu.Unlock()
	})
	return nil
}

type file struct {
	conn    *connection
	content *content
	size    int64

	mu     sync.Mutex
	closed bool
}

func (f *file) Size() int64 { return f.size }

func (f *file) ReadAt(p []byte, off int64) (int, error) {
	if err := f.conn.request(); err != nil {
		return 0, err
	}
	f.mu.Lock()
	closed := f.closed
	f.mu.Unlock()
	if closed {
		return 0, fs.ErrClosed // whoever uses it has to know
	}
	f.content.mu.Lock()
	defer f.content.mu.Unlock()
	if off >= int64(len(f.content.data)) {
		return 0, io.EOF
	}
	n := copy(p, f.content.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *file) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	return f.conn.request()
}
