package holder

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// lasting is a Kind whose descriptor is always of use.
type lasting struct{}

func (lasting) Over(Held) bool                 { return false }
func (lasting) AnswerBystanders(Held) error    { return nil }
func (lasting) AnswerOrphans(Held, bool) error { return nil }

// A daemon that ends while it replaces its holder doesn't wait for the end of the
// new one.
func TestLeaveWhileReplacing(t *testing.T) {
	dir := t.TempDir()
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socketPath(dir), Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	k := NewKeeper(dir, []string{"/bin/sh", "-c", "exec sleep 1000"}, slog.New(slog.DiscardHandler))
	held := Held{FD: 0, Session: json.RawMessage(`{}`)}
	accepted := make(chan *net.UnixConn)
	go func() {
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				close(accepted)
				return
			}
			accepted <- c
		}
	}()
	// takes receives what the keeper gives, as a holder.
	takes := func() *net.UnixConn {
		c := <-accepted
		_, fd, err := receive(c)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
		return c
	}
	put := make(chan error, 1)
	go func() { put <- k.Put(t.Context(), held) }()
	first := takes()
	if err := send(first, message{Op: opPut}, -1); err != nil {
		t.Fatal(err)
	}
	if err := <-put; err != nil {
		t.Fatal(err)
	}
	k.Watch(held)
	first.Close() // it dies

	second := takes()
	defer second.Close()
	left := make(chan struct{})
	go func() {
		k.Leave()
		close(left)
	}()
	<-k.stop // Leave has begun, and there is no connection that it could end
	if err := send(second, message{Op: opPut}, -1); err != nil {
		t.Fatal(err)
	}
	select {
	case <-left:
	case <-time.After(time.Minute):
		t.Fatal("Leave waits for the new holder's end")
	}
}

// A daemon that is killed may have just started a holder, which comes up while
// the next daemon starts one. There is one in the end.
func TestAnotherHolderWasFaster(t *testing.T) {
	dir := t.TempDir()
	ctx, stop := context.WithCancel(t.Context())
	var first sync.WaitGroup
	first.Go(func() {
		h := &holder{kind: lasting{}, held: Held{FD: -1}, quit: make(chan struct{}), since: time.Now(), conns: map[*net.UnixConn]*client{}}
		if err := h.run(ctx, socketPath(dir)); err != nil {
			t.Error(err)
		}
	})
	defer first.Wait()
	defer stop()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if c, err := dialShort(socketPath(dir)); err == nil {
			c.Close()
			break
		}
	}

	pid := filepath.Join(dir, "pid")
	k := NewKeeper(dir, []string{"/bin/sh", "-c", "echo $$ >" + pid + "; exec sleep 1000"}, slog.New(slog.DiscardHandler))
	defer k.Leave()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if err := k.Put(t.Context(), Held{FD: int(r.Fd()), Session: json.RawMessage(`{}`)}); err != nil {
		t.Fatal(err)
	}
	if k.child != nil {
		t.Error("the keeper takes the holder that it started for the one that it talks to")
	}
	text, err := os.ReadFile(pid)
	if errors.Is(err, os.ErrNotExist) || len(text) == 0 {
		return // it didn't get that far
	}
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(n, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("the holder that is of no use: %v, want it gone", err)
	}
}

// A daemon that is stopped right after Beat is known to be one that beats.
func TestBeatsAtOnce(t *testing.T) {
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ends[1])
	f := os.NewFile(uintptr(ends[0]), "socket")
	conn, err := net.FileConn(f)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	k := &Keeper{conn: conn.(*net.UnixConn), beats: true, stop: make(chan struct{})}
	k.Beat(time.Hour)
	defer k.Leave()
	var m message
	b := make([]byte, maxMessage)
	n, _, err := unix.Recvfrom(ends[1], b, unix.MSG_DONTWAIT)
	if err == nil {
		err = json.Unmarshal(b[:n], &m)
	}
	if err != nil || m.Op != opAlive {
		t.Errorf("the holder hears %+v, %v", m, err)
	}
}
