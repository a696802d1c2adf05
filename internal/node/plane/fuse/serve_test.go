package fuse

import (
	"context"
	"log/slog"
	"os"
	"testing"
	"time"

	"sluice/internal/node/plane"
	"sluice/internal/node/plane/internal/supply"
)

// deafServer answers to /dev/null.
func deafServer(t testing.TB) *server {
	t.Helper()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { null.Close() })
	s := &server{
		fd: int(null.Fd()), table: newTable(), log: slog.New(slog.DiscardHandler),
		patience: supply.Patience{Read: time.Second, Adopt: time.Millisecond}, lost: make(chan struct{}),
	}
	s.base, s.cancel = context.WithCancel(context.Background())
	t.Cleanup(s.cancel)
	return s
}

// contentDevice is d as the first device.
func contentDevice(t testing.TB, d plane.Device) *device {
	t.Helper()
	source, err := supply.NewSource(d)
	if err != nil {
		t.Fatal(err)
	}
	dev := &device{supply.New(d.Name, d.Size, true), firstNode}
	dev.Add(source)
	return dev
}

func readRequest(node, off uint64, size uint32) request {
	body := make([]byte, 40)
	ne.PutUint64(body[8:], off)
	ne.PutUint32(body[16:], size)
	return request{op: opRead, unique: 2, node: node, body: body}
}

func encode(req request) []byte {
	msg := make([]byte, inHeaderSize, inHeaderSize+len(req.body))
	ne.PutUint32(msg, uint32(inHeaderSize+len(req.body)))
	ne.PutUint32(msg[4:], req.op)
	ne.PutUint64(msg[8:], req.unique)
	ne.PutUint64(msg[16:], req.node)
	return append(msg, req.body...)
}

// FuzzServe: no message makes the server panic, write past a buffer or ask
// content for what lies outside its device.
func FuzzServe(f *testing.F) {
	f.Add(make([]byte, inHeaderSize)) // says that it is shorter than its header
	f.Add(encode(readRequest(firstNode, 0, 4096)))
	f.Add(encode(readRequest(firstNode, 1<<63, 1<<20)))
	f.Add(encode(readRequest(firstNode, 9_999, 1<<31)))
	for _, op := range []uint32{opLookup, opGetattr, opOpen, opReaddir, opStatfs, opForget, opInterrupt, opBatchForget, 99} {
		f.Add(encode(request{op: op, node: rootNode, body: []byte("name\x00")}))
		f.Add(encode(request{op: op, node: firstNode}))
	}
	s := deafServer(f)
	s.table.add(contentDevice(f, plane.Device{Name: "name", Size: 10_000, Content: bounded{f, 10_000}}))
	f.Fuzz(func(t *testing.T, msg []byte) {
		w := &worker{}
		if req, ok := parseRequest(msg); ok {
			s.serve(w, req)
		}
	})
}

// bounded is content that must not be asked for what it doesn't have.
type bounded struct {
	t    testing.TB
	size int64
}

func (b bounded) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	if len(p) == 0 || off < 0 || off+int64(len(p)) > b.size {
		b.t.Errorf("asked for %d bytes at %d of %d", len(p), off, b.size)
	}
	return len(p), nil
}

func TestInit(t *testing.T) {
	body := make([]byte, 64)
	ne.PutUint32(body[0:], 7)
	ne.PutUint32(body[4:], 45)
	ne.PutUint32(body[12:], initMaxPages|initExt|initAsyncDIO|1<<3)
	out := make([]byte, initOutSize)
	if n, ok := answerInit(body, out, 10, wantFlags); !ok || n.Flags&initHasResend != 0 {
		t.Errorf("of a kernel without FUSE_HAS_RESEND: %+v, %v", n, ok)
	}
	const resend = initHasResend >> 32
	ne.PutUint32(body[16:], resend|1<<30)
	n, ok := answerInit(body, out, 10, wantFlags)
	if !ok || n.Flags != initMaxPages|initExt|initAsyncDIO|initHasResend {
		t.Errorf("got %+v, %v", n, ok)
	}
	if ne.Uint32(out[32:]) != resend || ne.Uint16(out[28:]) != maxPages || ne.Uint32(out[4:]) != 40 {
		t.Errorf("reply % x", out)
	}
	if n, ok := answerInit(body, out, 10, wantFlags&^initHasResend); !ok || n.Flags&initHasResend != 0 || ne.Uint32(out[32:]) != 0 {
		t.Errorf("not asked for resending, but got %+v, %v", n, ok)
	}
	if _, ok := answerInit(body[:8], out, 10, wantFlags); ok {
		t.Error("half a request was accepted")
	}
	ne.PutUint32(body[12:], initMaxPages|initExt)
	if n, ok := answerInit(body, out, 10, wantFlags); ok {
		t.Errorf("a kernel without FUSE_ASYNC_DIO was accepted: %+v", n)
	}
}
