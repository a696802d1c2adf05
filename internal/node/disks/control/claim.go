package control

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"sluice/internal/durable"
	"sluice/internal/node/mount"
)

// ErrUnknown: there's no such claim or image.
var ErrUnknown = errors.New("not known to the daemon")

// newClaim returns a claim of a process.
func newClaim(pid int) (Claim, error) {
	started, err := mount.ProcessStart(pid)
	if err != nil {
		return Claim{}, fmt.Errorf("process %d, for which to mount: %w", pid, err)
	}
	var id [6]byte
	if _, err := rand.Read(id[:]); err != nil {
		return Claim{}, err
	}
	return Claim{ID: hex.EncodeToString(id[:]), PID: pid, Started: started, Created: time.Now().UTC()}, nil
}

func (c Claim) owner() string { return "claim/" + c.ID }

// gone reports whether the claim's process has ended.
func (c Claim) gone() bool {
	started, err := mount.ProcessStart(c.PID)
	return err != nil || started != c.Started
}

func (s *Server) claimFile(id string) string {
	return filepath.Join(s.opts.Root, "claims", id+".json")
}

// claim mounts an image for a process. What a crash leaves of it is found at the
// next start: the record comes first.
func (s *Server) claim(ctx context.Context, c Claim) (dirs []string, err error) {
	record, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	if err := durable.WriteFile(s.claimFile(c.ID), record, 0o600); err != nil {
		return nil, fmt.Errorf("record the mount: %w", err)
	}
	if dirs, err = s.images(c.Teleported).Stack(ctx, c.Image, c.owner()); err != nil {
		return nil, errors.Join(err, s.forget(c))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.claims[c.ID] = c // from now on it may end with its process
	return dirs, nil
}

// forget removes a claim's record.
func (s *Server) forget(c Claim) error {
	err := durable.Remove(s.claimFile(c.ID))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// Unmount ends a claim.
func (s *Server) Unmount(ctx context.Context, id string) error {
	s.mu.Lock()
	c, ok := s.claims[id]
	s.mu.Unlock()
	if !ok {
		return fmt.Errorf("mount %q: %w", id, ErrUnknown)
	}
	return s.end(ctx, c)
}

// end ends a claim. If it can't, it's still there. Ending it twice is fine.
func (s *Server) end(ctx context.Context, c Claim) error {
	if err := s.images(c.Teleported).Release(ctx, c.owner()); err != nil {
		return err
	}
	s.mu.Lock()
	delete(s.claims, c.ID)
	s.mu.Unlock()
	return s.forget(c)
}

// Claims lists what is mounted, in no order.
func (s *Server) Claims() []Claim {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]Claim, 0, len(s.claims))
	for _, c := range s.claims {
		list = append(list, c)
	}
	return list
}

// Idle reports whether nothing is mounted and nobody is being answered.
func (s *Server) Idle() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.claims) == 0 && s.busy == 0
}
