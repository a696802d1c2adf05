package storage

import (
	"context"
	"fmt"
	"sync"
)

// sessions lets each upload be open once at a time.
type sessions struct {
	mu   sync.Mutex
	open map[string]*session // guarded by mu
}

// session is the right to one upload. It exists while somebody has or wants it.
type session struct {
	token chan struct{} // holds one element while nobody has the upload
	users int           // holder and waiters; guarded by sessions.mu
}

// acquire waits until nobody has the upload and takes it. The function that it
// returns gives it back and must be called once.
func (s *sessions) acquire(ctx context.Context, id string) (release func(), err error) {
	s.mu.Lock()
	if s.open == nil {
		s.open = map[string]*session{}
	}
	one := s.open[id]
	if one == nil {
		one = &session{token: make(chan struct{}, 1)}
		one.token <- struct{}{}
		s.open[id] = one
	}
	one.users++
	s.mu.Unlock()

	leave := func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if one.users--; one.users == 0 {
			delete(s.open, id)
		}
	}
	select {
	case <-one.token:
		return func() { one.token <- struct{}{}; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, fmt.Errorf("upload %s is in use by another request: %w", id, ctx.Err())
	}
}
