package teleport

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/blob"
	"sluice/internal/blob/blobtest"
	"sluice/internal/node/smb"
	"sluice/oci"
)

// patience is what no read takes longer than, whatever the server does, on a busy
// machine, and within which all is well again: after a refusal it takes a minute.
const patience = 2 * time.Minute

// readDisk reads the disk that is content, and checks that the bytes are right, if they
// come, and that it doesn't take too long.
func readDisk(t *testing.T, share smb.Share, content []byte) error {
	t.Helper()
	got := make([]byte, len(content))
	began := time.Now()
	err := blob.ReadFull(t.Context(), share.Open("disk", int64(len(content)), oci.DigestOf(content)), got, 0)
	if took := time.Since(began); took > patience {
		t.Errorf("after %v: %v", took, err)
	}
	if err == nil && !bytes.Equal(got, content) {
		t.Error("wrong bytes")
	}
	return err
}

// untilRead reads until it can be done.
func untilRead(t *testing.T, share smb.Share, content []byte) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		if err := readDisk(t, share, content); err == nil {
			return
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// A server that has stopped, and whose connections stand, is given up; when it goes on,
// so do reads.
func TestShareOfSilentServer(t *testing.T) {
	eachClient(t, time.Hour, func(t *testing.T, start func(t *testing.T) *shareServer) { silence(t, start(t)) })
}

func silence(t *testing.T, s *shareServer) {
	content := blobtest.Content(4 << 20)
	s.Put("disk", content)
	share := s.Share(smb.Options{Login: always(s), Timeout: 5 * time.Second})
	defer share.Close()
	if err := readDisk(t, share, content); err != nil {
		t.Fatal(err)
	}
	group := -s.samba.Pid() // smbd's own
	s.check(unix.Kill(group, unix.SIGSTOP))
	for range 2 { // over the connection that there is, and a new one
		if err := readDisk(t, share, content); !errors.Is(err, smb.ErrUnreachable) || blob.Final(err) {
			t.Errorf("it says nothing: %v", err)
		}
	}
	s.check(unix.Kill(group, unix.SIGCONT))
	untilRead(t, share, content)
}

// Credentials that have expired are renewed while there are reads: before a connection
// is made, if they are known to have, and when the server refuses them, if not.
func TestShareCredentialsExpire(t *testing.T) {
	const lifetime = 5 * time.Second // of at least; twice as long at most
	eachClient(t, lifetime, func(t *testing.T, start func(t *testing.T) *shareServer) {
		s := start(t)
		ctx, cancel := context.WithCancel(t.Context())
		kept := make(chan struct{})
		go func() { defer close(kept); s.keeper.Run(ctx) }()
		defer func() { cancel(); <-kept }()
		t.Run("told", func(t *testing.T) { expire(t, s, true) })
		t.Run("not told", func(t *testing.T) { expire(t, s, false) })
	})
}

// expire reads until credentials have expired, and on; told says whether the client is
// told when they do.
func expire(t *testing.T, s *shareServer, told bool) {
	content := blobtest.Content(1 << 20)
	s.Put("disk", content)
	var asked, refused atomic.Int32
	var first atomic.Pointer[smb.Login]
	share := s.Share(smb.Options{Timeout: 4 * time.Second, Login: func(_ context.Context, old string) (smb.Login, error) {
		asked.Add(1)
		if old != "" {
			refused.Add(1)
		}
		given := s.Login()
		l := given
		first.CompareAndSwap(nil, &given)
		if !told {
			l.Expires = time.Time{}
		}
		return l, nil
	}})
	defer share.Close()
	// A session stays open when its credentials expire.
	for {
		if err := readDisk(t, share, content); err != nil {
			t.Fatalf("over a connection that stands: %v", err)
		}
		if time.Now().After(first.Load().Expires) {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if s.Login().Password == first.Load().Password { // if not, smbd's files have forgotten that
		t.Error("nothing has expired")
	}
	s.Stop()
	s.Start()
	untilRead(t, share, content)
	if asked.Load() < 2 || told != (refused.Load() == 0) {
		t.Errorf("asked %d times, after %d refusals", asked.Load(), refused.Load())
	}
}

// meddler is between a client and a server, and meddles with what the server says.
type meddler struct {
	address string
	wg      sync.WaitGroup
	mu      sync.Mutex
	conns   []net.Conn
	meddle  func(nth int, frame []byte) []byte // of a connection; header included
}

func newMeddler(t *testing.T, server string) *meddler {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m := &meddler{address: l.Addr().String(), meddle: func(_ int, frame []byte) []byte { return frame }}
	keep := func(c net.Conn) {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.conns = append(m.conns, c)
	}
	m.wg.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			keep(client)
			up, err := net.Dial("tcp", server)
			if err != nil {
				client.Close()
				continue
			}
			keep(up)
			m.wg.Go(func() { _, _ = io.Copy(up, client); up.Close() })
			m.wg.Go(func() { m.copy(client, up); client.Close() })
		}
	})
	t.Cleanup(func() {
		l.Close()
		m.mu.Lock()
		for _, c := range m.conns {
			c.Close()
		}
		m.mu.Unlock()
		m.wg.Wait()
	})
	return m
}

func (m *meddler) set(meddle func(nth int, frame []byte) []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.meddle = meddle
}

func (m *meddler) copy(client io.Writer, server io.Reader) {
	for nth := 0; ; nth++ {
		header := make([]byte, 4)
		if _, err := io.ReadFull(server, header); err != nil {
			return
		}
		frame := append(header, make([]byte, binary.BigEndian.Uint32(header))...)
		if _, err := io.ReadFull(server, frame[4:]); err != nil {
			return
		}
		m.mu.Lock()
		frame = m.meddle(nth, frame)
		m.mu.Unlock()
		if _, err := client.Write(frame); err != nil {
			return
		}
	}
}

// What a server says, with something wrong in one message of a connection, at every
// step of signing in and of reading: right bytes or an error, in time, and right bytes
// when it's over. (Without the key of the session, nobody can alter what is said later
// without being noticed.)
func TestShareOfHostileServer(t *testing.T) {
	s := newShareServer(t, time.Hour)
	content := blobtest.Content(1 << 20)
	s.Put("disk", content)
	m := newMeddler(t, s.samba.Address())
	login := func(context.Context, string) (smb.Login, error) {
		l := s.Login()
		l.Server = m.address
		return l, nil
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	faults := map[string]func(frame []byte) []byte{
		"bits": func(frame []byte) []byte {
			for range 1 + rng.IntN(8) {
				frame[4+rng.IntN(min(len(frame)-4, 300))] ^= byte(1 << rng.IntN(8))
			}
			return frame
		},
		"noise": func(frame []byte) []byte {
			from := 4 + rng.IntN(len(frame)-4)
			for i := from; i < len(frame); i++ {
				frame[i] = byte(rng.Uint32())
			}
			return frame
		},
		"shorter": func(frame []byte) []byte {
			frame = frame[:4+rng.IntN(len(frame)-4)]
			binary.BigEndian.PutUint32(frame, uint32(len(frame)-4))
			return frame
		},
		"longer": func(frame []byte) []byte {
			frame = append(frame, make([]byte, rng.IntN(200))...)
			binary.BigEndian.PutUint32(frame, uint32(len(frame)-4))
			return frame
		},
		"length":    func(frame []byte) []byte { binary.BigEndian.PutUint32(frame, rng.Uint32()); return frame },
		"twice":     func(frame []byte) []byte { return append(bytes.Clone(frame), frame...) },
		"not":       func([]byte) []byte { return nil },
		"something": func(frame []byte) []byte { return append(frame[:4], "\xfeSMB is great"...) },
	}
	failed := map[string]int{}
	end := time.Now().Add(8 * time.Second)
	for round := 0; round < 10 || time.Now().Before(end); round++ {
		for name, fault := range faults {
			at := rng.IntN(7)
			m.set(func(nth int, frame []byte) []byte {
				if nth != at {
					return frame
				}
				return fault(frame)
			})
			share := s.Share(smb.Options{Login: login, Timeout: 300 * time.Millisecond})
			if readDisk(t, share, content) != nil {
				failed[name]++
			}
			m.set(func(_ int, frame []byte) []byte { return frame })
			untilRead(t, share, content)
			if err := share.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		}
	}
	t.Logf("reads that failed: %v", failed)
	if len(failed) < len(faults)/2 {
		t.Error("few faults were noticed")
	}
}
