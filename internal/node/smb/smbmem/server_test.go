package smbmem

import (
	"context"
	"errors"
	"io/fs"
	"testing"
	"testing/synctest"
	"time"

	"sluice/internal/node/smb"
	"sluice/internal/node/smb/smbtest"
)

// server is a Server as the suite has it.
type server struct{ *Server }

func (s server) Truncate(path string, size int64) {
	s.Alter(path, func(data []byte) []byte { return data[:size] })
}

func (s server) Login() smb.Login {
	return smb.Login{Server: "memory", Share: "share", Username: "user", Password: "password"}
}

func (s server) Stop()                         { s.Down() }
func (s server) Start()                        { s.Up() }
func (s server) Share(o smb.Options) smb.Share { return s.Server.Share(o) }

func TestShare(t *testing.T) {
	smbtest.Run(t, func(*testing.T) smbtest.Server {
		s := New(nil)
		s.Accept("password")
		s.Name("share")
		return server{s}
	})
}

// A server that refuses good credentials, because it or somebody on the way is in
// trouble, is tried with them again when a minute has passed, and not before.
func TestRefusalPasses(t *testing.T) { synctest.Test(t, testRefusalPasses) }

func testRefusalPasses(t *testing.T) {
	s := New(map[string][]byte{"disk": []byte("content")})
	share := s.Share(smb.Options{Login: func(context.Context, string) (smb.Login, error) { return server{s}.Login(), nil }})
	defer share.Close()
	s.Accept("another")
	for range 2 {
		if _, err := share.ReadFile(t.Context(), "disk", 100); !errors.Is(err, smb.ErrRefused) {
			t.Errorf("refused: %v", err)
		}
	}
	s.Accept("password")
	if _, err := share.ReadFile(t.Context(), "disk", 100); !errors.Is(err, smb.ErrRefused) || s.Connects() != 1 {
		t.Errorf("soon after: %v, after %d attempts to sign in", err, s.Connects())
	}
	time.Sleep(time.Minute)
	if got, err := share.ReadFile(t.Context(), "disk", 100); string(got) != "content" {
		t.Errorf("a minute after: %q, %v", got, err)
	}
}

// What the server does to its readers when it is told to.
func TestFaults(t *testing.T) { synctest.Test(t, testFaults) }

func testFaults(t *testing.T) {
	s := New(map[string][]byte{"disk": []byte("content")})
	share := s.Share(smb.Options{Timeout: 300 * time.Millisecond})
	defer share.Close()
	read := func() (string, error) {
		content, err := share.ReadFile(t.Context(), "disk", 100)
		return string(content), err
	}
	if got, err := read(); got != "content" {
		t.Errorf("%q, %v", got, err)
	}
	s.Alter("disk", func(data []byte) []byte { return append(data, " and more"...) })
	if got, err := read(); got != "content and more" {
		t.Errorf("%q, %v", got, err)
	}
	s.Mute()
	if got, err := read(); !errors.Is(err, smb.ErrUnreachable) {
		t.Errorf("while it says nothing: %q, %v", got, err)
	}
	s.Up()
	s.Remove("disk")
	if got, err := read(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("removed: %q, %v", got, err)
	}
	s.Put("disk", []byte("content"))
	const delay = 20 * time.Millisecond
	s.Delay(delay)
	began, before := time.Now(), s.Requests()
	if got, err := read(); got != "content" || time.Since(began) < 2*delay || s.Requests() < before+2 || s.Connects() < 2 {
		t.Errorf("after %v: %q, %v; %d requests, %d connects", time.Since(began), got, err, s.Requests()-before, s.Connects())
	}
}
