package bed

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Link is a TCP proxy that behaves like a network of a given bandwidth and
// round-trip time: bytes of all connections share the bandwidth, one pool per
// direction, and everything arrives half a round trip after it was sent. A new
// connection costs a round trip before its first byte, as TCP's handshake does.
// The queue before the wire is short, and connections take turns. Slow start
// and loss are not modelled. Several servers can be behind it.
type Link struct {
	addr  string // of the first server
	rtt   time.Duration
	down  pipe // from servers to clients
	up    pipe
	conns atomic.Int64
	wg    sync.WaitGroup

	mu    sync.Mutex
	close []func() error // guarded by mu; for each server, what Close calls
}

// pipe is one direction of a link, shared by all connections.
type pipe struct {
	rate  float64 // bytes per second; 0: unlimited
	delay time.Duration
	bytes atomic.Int64

	mu   sync.Mutex
	free time.Time // guarded by mu: when the wire has sent all it took on
}

// LinkStats is what has crossed a link since it was made.
type LinkStats struct {
	Down, Up    int64 // bytes
	Connections int64
}

// NewLink listens on a free port of loopback and forwards to target until
// Close. rate is in bits per second, 0 for no limit.
func NewLink(ctx context.Context, target string, rate float64, rtt time.Duration) (*Link, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	return NewLinkAt(ctx, ln, target, rate, rtt), nil
}

// NewLinkAt is NewLink with a listener of the caller's, which Close closes.
func NewLinkAt(ctx context.Context, ln net.Listener, target string, rate float64, rtt time.Duration) *Link {
	l := &Link{addr: ln.Addr().String(), rtt: rtt}
	l.down.rate, l.up.rate = rate/8, rate/8
	l.down.delay, l.up.delay = rtt/2, rtt/2
	l.forward(ctx, ln, target)
	return l
}

// Add puts a further server behind the link, which shares its bandwidth and counts
// with the others, and returns where clients reach it. It must not be called
// beside Close.
func (l *Link) Add(ctx context.Context, target string) (addr string, err error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	l.forward(ctx, ln, target)
	return ln.Addr().String(), nil
}

// forward carries what connects to ln to target until Close.
func (l *Link) forward(ctx context.Context, ln net.Listener, target string) {
	ctx, cancel := context.WithCancel(ctx)
	l.mu.Lock()
	l.close = append(l.close, func() error {
		cancel()
		return ln.Close()
	})
	l.mu.Unlock()
	l.wg.Go(func() { l.accept(ctx, ln, target) })
}

// Addr is where clients connect to for the first server, as host:port.
func (l *Link) Addr() string { return l.addr }

// Stats may be called at any time.
func (l *Link) Stats() LinkStats {
	return LinkStats{Down: l.down.bytes.Load(), Up: l.up.bytes.Load(), Connections: l.conns.Load()}
}

// Close cuts all connections and waits for their end.
func (l *Link) Close() error {
	l.mu.Lock()
	var errs []error
	for _, c := range l.close {
		errs = append(errs, c())
	}
	l.mu.Unlock()
	l.wg.Wait()
	return errors.Join(errs...)
}

func (l *Link) accept(ctx context.Context, ln net.Listener, target string) {
	for {
		client, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(time.Millisecond) // out of file descriptors, perhaps: others may end
			continue
		}
		l.conns.Add(1)
		l.wg.Go(func() { l.carry(ctx, client, target) })
	}
}

// carry moves one connection's bytes until an end closes or ctx does.
func (l *Link) carry(ctx context.Context, client net.Conn, target string) {
	defer client.Close()
	var d net.Dialer
	server, err := d.DialContext(ctx, "tcp", target)
	if err != nil {
		return
	}
	defer server.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() {
		client.Close()
		server.Close()
	})
	defer stop()

	var wg sync.WaitGroup
	wg.Go(func() { l.up.copy(server, client, l.rtt) })
	wg.Go(func() {
		l.down.copy(client, server, 0)
		cancel() // the server is done, so nobody needs the client's half
	})
	wg.Wait()
}

// maxQueue is how far ahead of time a connection may book the wire: the
// buffer of a well-kept bottleneck.
const maxQueue = 10 * time.Millisecond

// packet is bytes on the wire and when they arrive.
type packet struct {
	data []byte
	at   time.Time
}

// copy moves src to dst through the pipe, the first bytes late by handshake.
func (p *pipe) copy(dst, src net.Conn, handshake time.Duration) {
	wire := make(chan packet, 256)
	var wg sync.WaitGroup
	wg.Go(func() {
		for pk := range wire {
			time.Sleep(time.Until(pk.at))
			if _, err := dst.Write(pk.data); err != nil {
				src.Close() // so that the reading side ends, too
				break
			}
		}
		for range wire { // drain: the reader must not block on a dead wire
		}
	})
	late := time.Now().Add(handshake)
	for {
		buf := make([]byte, 16<<10)
		n, err := src.Read(buf)
		if n > 0 {
			p.bytes.Add(int64(n))
			left := p.send(n)
			wire <- packet{buf[:n], latest(left, late).Add(p.delay)}
			// The sender feels the queue, as TCP does: nobody can fill the
			// wire with what others then wait behind.
			time.Sleep(time.Until(left.Add(-maxQueue)))
		}
		if err != nil {
			break
		}
	}
	close(wire)
	wg.Wait()
	if c, ok := dst.(*net.TCPConn); ok {
		_ = c.CloseWrite() // fails where the other end has gone: fine
	}
}

// send books n bytes on the wire and returns when the last of them has left.
func (p *pipe) send(n int) time.Time {
	now := time.Now()
	if p.rate == 0 {
		return now
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free = latest(p.free, now).Add(time.Duration(float64(n) / p.rate * float64(time.Second)))
	return p.free
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

var _ io.Closer = (*Link)(nil)
