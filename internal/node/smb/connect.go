package smb

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"
)

// The pauses between attempts to connect, each twice as long as the one before, less
// up to a half at random.
const (
	minPause = 100 * time.Millisecond
	maxPause = 5 * time.Second
)

// refusalLasts is for how long credentials aren't tried again that a server has
// refused. It may have been wrong about them, while its accounts were written anew,
// or somebody on the way was; but many servers lock accounts that are tried often.
const refusalLasts = time.Minute

// attempt is one to connect, for all who wait for it.
type attempt struct {
	cancel  context.CancelFunc
	done    chan struct{} // closed when what is below is set
	session *session
	err     error
}

// session returns the connection, and makes one if there is none. It returns when ctx
// ends, and at once when ctx would end before another attempt may be made.
func (c *Client) session(ctx context.Context) (*session, error) {
	c.mu.Lock()
	if c.closed || c.live != nil {
		defer c.mu.Unlock()
		if c.closed {
			return nil, ErrClosed
		}
		return c.live, nil
	}
	if deadline, ok := ctx.Deadline(); ok && deadline.Before(c.pause) {
		defer c.mu.Unlock()
		return nil, fmt.Errorf("not tried again yet: %w", c.last)
	}
	a := c.attempt
	if a == nil {
		a = c.begin()
	}
	last := c.last
	c.mu.Unlock()
	select {
	case <-a.done:
		return a.session, a.err
	case <-ctx.Done():
		if last != nil {
			return nil, fmt.Errorf("%w; before: %w", context.Cause(ctx), last)
		}
		return nil, context.Cause(ctx)
	}
}

// begin starts an attempt. The caller holds mu.
func (c *Client) begin() *attempt {
	ctx, cancel := context.WithCancel(context.Background()) // nobody's: all who come until it ends wait for it
	a := &attempt{cancel: cancel, done: make(chan struct{})}
	c.attempt = a
	wait := time.Until(c.pause)
	c.wg.Go(func() {
		defer cancel()
		var conn Connection
		err := sleep(ctx, wait)
		if err == nil {
			ctx, cancel := context.WithTimeoutCause(ctx, c.opts.Timeout, fmt.Errorf("%w: nothing came of it in %v", ErrUnreachable, c.opts.Timeout))
			conn, err = c.connect(ctx)
			cancel()
		}
		c.finish(a, conn, err)
	})
	return a
}

// finish ends an attempt.
func (c *Client) finish(a *attempt, conn Connection, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer close(a.done)
	c.attempt = nil
	switch {
	case c.closed:
		a.err = ErrClosed
		if conn != nil {
			_ = conn.Close()
		}
	case err != nil:
		a.err, c.last = err, err
		c.opts.Tally.Failed.Add(1)
		d := maxPause
		if c.failed < 10 {
			d = min(d, minPause<<c.failed)
		}
		c.failed++
		c.pause = time.Now().Add(d - rand.N(d/2))
		level := slog.LevelWarn
		if c.failed > 1 {
			level = slog.LevelDebug // said before
		}
		c.opts.Log.Log(context.Background(), level, "no connection to the file server", "server", c.login.Server, "share", c.login.Share, "attempts", c.failed, "error", err)
	default:
		c.failed, c.last, c.pause = 0, nil, time.Time{}
		c.opts.Tally.Made.Add(1)
		a.session = newSession(conn, c.start)
		c.live = a.session
		c.wg.Go(func() { c.watch(a.session) })
		c.opts.Log.Info("connected to the file server", "server", c.login.Server, "share", c.login.Share)
	}
}

// drop gives up a connection.
func (c *Client) drop(s *session, why error) {
	c.mu.Lock()
	if c.live == s {
		c.live = nil
		c.opts.Tally.Broken.Add(1)
		c.opts.Log.Warn("the connection to the file server is given up", "error", why)
	}
	c.mu.Unlock()
	_ = s.end(why)
}

// connect signs in, with other credentials if those there were are refused.
func (c *Client) connect(ctx context.Context) (Connection, error) {
	if err := c.renew(ctx); err != nil {
		return nil, err
	}
	conn, err := c.signIn(ctx)
	if errors.Is(err, ErrRefused) {
		if other := c.renew(ctx); other != nil {
			return nil, other
		}
		conn, err = c.signIn(ctx)
	}
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
	}
	if err != nil {
		return nil, fmt.Errorf("share %s of %s: %w", c.login.Share, c.login.Server, err)
	}
	return conn, nil
}

// signIn tries the credentials that there are.
func (c *Client) signIn(ctx context.Context) (Connection, error) {
	conn, err := c.transport.Connect(ctx, c.login)
	if errors.Is(err, ErrRefused) {
		c.refused, c.refusedAt = c.login.Password, time.Now()
	}
	return conn, err
}

// renew asks for credentials where those there are won't do.
func (c *Client) renew(ctx context.Context) error {
	if time.Since(c.refusedAt) >= refusalLasts {
		c.refused = ""
	}
	old := c.login
	known := old.Server != ""
	if known && c.refused == "" && (old.Expires.IsZero() || time.Until(old.Expires) > c.opts.Timeout) {
		return nil
	}
	l, err := c.opts.Login(ctx, c.refused)
	switch {
	case err != nil && known && c.refused == "":
		// The old ones may do yet. If they don't, that's found at once.
		c.opts.Log.Warn("no new credentials for the file server; the old ones are tried", "server", old.Server, "share", old.Share, "error", err)
		return nil
	case err != nil:
		return fmt.Errorf("credentials for the file server: %w", err)
	case c.refused != "" && l.Password == c.refused && l.Username == old.Username:
		return fmt.Errorf("share %s of %s: %w; no others are to be had", l.Share, l.Server, ErrRefused)
	}
	c.login, c.refused = l, ""
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
