package smb

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// patience is what nothing here takes longer than, on a busy machine.
const patience = 20 * time.Second

// listen has serve talk to everybody who connects.
func listen(t *testing.T, serve func(c net.Conn)) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, c)
			mu.Unlock()
			wg.Go(func() {
				defer c.Close()
				serve(c)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return l.Addr().String()
}

// try reads from a server as somebody who doesn't know what it is.
func try(t *testing.T, address string, timeout time.Duration) error {
	t.Helper()
	c := NewClient(Options{
		Login: func(context.Context, string) (Login, error) {
			return Login{Server: address, Share: "share", Username: "user", Password: "password"}, nil
		},
		Timeout: timeout,
	})
	began := time.Now()
	_, err := c.ReadFile(t.Context(), "file", 1<<20)
	if cerr := c.Close(); cerr != nil {
		t.Errorf("Close: %v", cerr)
	}
	if took := time.Since(began); took > patience {
		t.Errorf("it took %v, and ended with %v", took, err)
	}
	return err
}

// frame is a message as it goes over the wire.
func frame(message []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(message))), message...)
}

// request reads a request.
func request(r io.Reader) ([]byte, error) {
	var n [4]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		return nil, err
	}
	message := make([]byte, binary.BigEndian.Uint32(n[:])&0xffffff)
	_, err := io.ReadFull(r, message)
	return message, err
}

// answer returns a message with a body that answers a request.
func answer(to []byte, status uint32, body []byte) []byte {
	message := make([]byte, smbHeader, smbHeader+len(body))
	copy(message, plainMagic)
	binary.LittleEndian.PutUint16(message[4:], smbHeader)
	binary.LittleEndian.PutUint32(message[8:], status)
	copy(message[12:14], to[12:14])                   // command
	binary.LittleEndian.PutUint16(message[14:], 100)  // credits
	binary.LittleEndian.PutUint32(message[16:], 1)    // from the server
	copy(message[24:32], to[24:32])                   // message
	binary.LittleEndian.PutUint64(message[40:], 4711) // session
	return append(message, body...)
}

// negotiated is the body of an answer to NEGOTIATE (MS-SMB2, section 2.2.4).
func negotiated(dialect uint16) []byte {
	body := make([]byte, 64)
	binary.LittleEndian.PutUint16(body, 65)
	binary.LittleEndian.PutUint16(body[2:], 3)
	binary.LittleEndian.PutUint16(body[4:], dialect)
	binary.LittleEndian.PutUint16(body[6:], 2)
	binary.LittleEndian.PutUint32(body[24:], 0x44) // large requests, encryption
	for _, at := range []int{28, 32, 36} {
		binary.LittleEndian.PutUint32(body[at:], 8<<20)
	}
	binary.LittleEndian.PutUint16(body[56:], smbHeader+64)
	binary.LittleEndian.PutUint32(body[60:], smbHeader+64)
	hash := append([]byte{1, 0, 38, 0, 0, 0, 0, 0, 1, 0, 32, 0, 1, 0}, make([]byte, 32)...)
	hash = append(hash, 0, 0) // to a multiple of 8
	cipher := []byte{2, 0, 4, 0, 0, 0, 0, 0, 1, 0, 2, 0}
	return append(append(body, hash...), cipher...)
}

// tooLate is part of the error of what was waited for in vain.
const tooLate = "nothing came of it"

func TestServersThatAreNone(t *testing.T) {
	before := runtime.NumGoroutine()
	for name, tt := range map[string]struct {
		serve func(c net.Conn)
		says  string // of the error
	}{
		"says nothing": {func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }, tooLate},
		"hangs up":     {func(net.Conn) {}, ""},
		"drips": {func(c net.Conn) {
			for {
				if _, err := c.Write([]byte{0}); err != nil {
					return
				}
				time.Sleep(time.Millisecond)
			}
		}, ""},
		"garbage": {func(c net.Conn) {
			p := make([]byte, 1<<16)
			rng := rand.NewChaCha8([32]byte{2})
			for {
				_, _ = rng.Read(p)
				if _, err := c.Write(p); err != nil {
					return
				}
			}
		}, ""},
		"HTTP": {func(c net.Conn) {
			_, _ = io.WriteString(c, "HTTP/1.1 400 Bad Request\r\n\r\n"+strings.Repeat("x", 100))
		}, ""},
		"large": {func(c net.Conn) {
			_, _ = c.Write(append([]byte{0, 0xff, 0xff, 0xff}, plainMagic...))
			_, _ = io.Copy(io.Discard, c)
		}, "at once"},
		"SMB 2.1": {func(c net.Conn) {
			to, err := request(c)
			if err != nil {
				return
			}
			_, _ = c.Write(frame(answer(to, 0, negotiated(0x0210))))
			_, _ = io.Copy(io.Discard, c)
		}, "SMB 3.1.1"},
		"SMB 2, again and again": {func(c net.Conn) {
			for {
				to, err := request(c)
				if err != nil {
					return
				}
				_, _ = c.Write(frame(answer(to, 0, negotiated(0x02ff))))
			}
		}, "SMB 3.1.1"},
	} {
		t.Run(name, func(t *testing.T) {
			address, timeout := listen(t, tt.serve), patience
			if tt.says == tooLate { // nobody waits for the others
				timeout = 500 * time.Millisecond
			}
			if err := try(t, address, timeout); !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), tt.says) || !strings.Contains(err.Error(), address) {
				t.Errorf("%v", err)
			}
		})
	}
	awaitGoroutines(t, before)
}

// awaitGoroutines waits until what was started has ended, what the library started
// included.
func awaitGoroutines(t *testing.T, before int) {
	t.Helper()
	for deadline := time.Now().Add(patience); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			stacks := make([]byte, 1<<20)
			t.Fatalf("%d goroutines, before %d:\n%s", runtime.NumGoroutine(), before, stacks[:runtime.Stack(stacks, true)])
		}
	}
}

// A server that speaks SMB for a while and then says anything.
func TestRandomAnswers(t *testing.T) {
	before := runtime.NumGoroutine()
	var mu sync.Mutex
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	n := func(n int) int {
		mu.Lock()
		defer mu.Unlock()
		return rng.IntN(n)
	}
	random := func(size int) []byte {
		p := make([]byte, size)
		for i := range p {
			p[i] = byte(n(256))
		}
		return p
	}
	address := listen(t, func(c net.Conn) {
		to, err := request(c)
		if err != nil {
			return
		}
		hello := negotiated(dialect)
		if n(4) == 0 {
			hello[n(len(hello))] ^= byte(1 << n(8))
		}
		_, _ = c.Write(frame(answer(to, 0, hello)))
		for {
			to, err := request(c)
			if err != nil {
				return
			}
			// More to come, as it should be; success; anything.
			status := []uint32{0xC0000016, 0, uint32(n(1 << 30))}[n(3)]
			body := random(n(300))
			if len(body) >= 8 && n(4) > 0 { // a SESSION_SETUP's (section 2.2.6)
				copy(body, []byte{9, 0, byte(n(4)), 0, smbHeader + 8, 0, byte(len(body) - 8), 0})
			}
			message := answer(to, status, body)
			if n(8) == 0 {
				message[n(len(message))] ^= byte(1 << n(8))
			}
			_, _ = c.Write(frame(message))
		}
	})
	reasons := map[string]int{}
	for range 1000 {
		err := try(t, address, 100*time.Millisecond)
		if err == nil {
			t.Fatal("a file of a server that has none")
		}
		reasons[err.Error()]++
	}
	if len(reasons) < 3 {
		t.Errorf("too few answers were looked at: %v", reasons)
	}
	awaitGoroutines(t, before+1) // the listener's
}

// What isn't encrypted neither comes nor goes once it has to be.
func TestSealed(t *testing.T) {
	ours, theirs := net.Pipe()
	defer ours.Close()
	defer theirs.Close()
	g := newGuard(ours)
	g.sealed.Store(true)
	message := append(bytes.Clone(plainMagic), make([]byte, 100)...)
	if _, err := g.Write(frame(message)[:frameHeader]); err != nil {
		t.Error(err)
	}
	if _, err := g.Write(message); err == nil || !strings.Contains(err.Error(), "encrypt") {
		t.Errorf("written in the clear: %v", err)
	}
	go func() { _, _ = theirs.Write(frame(message)) }() // ends with the pipe
	if n, err := g.Read(make([]byte, frameHeader)); err == nil || !strings.Contains(err.Error(), "encrypt") {
		t.Errorf("%d bytes read in the clear: %v", n, err)
	}
}

func TestCallingSurvivesPanics(t *testing.T) {
	_, err := calling(func() (int, error) { panic("index out of range") })
	if !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "index out of range") {
		t.Errorf("%v", err)
	}
}
