package transfer_test

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"

	"sluice/oci"
)

// faulty is a registry behind a line that fails as its fields say.
type faulty struct {
	oci.Registry

	flip oci.Digest // this blob has a wrong byte

	cut     int64        // connections to read a blob end after so many bytes; 0: never
	opened  atomic.Int64 // how often a blob was opened, without configs' first
	read    atomic.Int64 // bytes of blobs
	open    atomic.Int64
	most    atomic.Int64 // blobs open at once
	mu      sync.Mutex
	stop    func() // called once when so many bytes have been read
	stopAt  int64
	appends func(n int64) error // decides about every piece appended; nil: all succeed
	sent    atomic.Int64        // bytes appended
	started atomic.Int64        // uploads
	single  atomic.Int64        // PushBlob calls
	noChunk bool                // appending isn't supported
}

var errCut = errors.New("connection reset")

func (f *faulty) GetBlob(ctx context.Context, repo string, digest oci.Digest) (oci.BlobReader, error) {
	r, err := f.Registry.GetBlob(ctx, repo, digest)
	return f.line(r, 0, err)
}

func (f *faulty) GetBlobRange(ctx context.Context, repo string, digest oci.Digest, offset, length int64) (oci.BlobReader, error) {
	r, err := f.Registry.GetBlobRange(ctx, repo, digest, offset, length)
	return f.line(r, offset, err)
}

func (f *faulty) line(r oci.BlobReader, offset int64, err error) (oci.BlobReader, error) {
	if err != nil {
		return nil, err
	}
	if r.Descriptor().Digest == f.flip {
		f.opened.Add(1)
	}
	n := f.open.Add(1)
	for most := f.most.Load(); n > most && !f.most.CompareAndSwap(most, n); most = f.most.Load() {
	}
	return &line{BlobReader: r, f: f, at: offset}, nil
}

type line struct {
	oci.BlobReader
	f    *faulty
	at   int64
	here int64 // bytes of this connection
}

func (l *line) Read(p []byte) (int, error) {
	if cut := l.f.cut; cut > 0 {
		if l.here >= cut {
			return 0, errCut
		}
		p = p[:min(int64(len(p)), cut-l.here)]
	}
	n, err := l.BlobReader.Read(p)
	if n > 0 && l.Descriptor().Digest == l.f.flip && l.at <= 500 && l.at+int64(n) > 500 {
		p[500-l.at] ^= 1
	}
	l.at += int64(n)
	l.here += int64(n)
	total := l.f.read.Add(int64(n))
	l.f.mu.Lock()
	defer l.f.mu.Unlock()
	if l.f.stop != nil && total >= l.f.stopAt {
		l.f.stop()
		l.f.stop = nil
	}
	return n, err
}

func (l *line) Close() error {
	l.f.open.Add(-1)
	return l.BlobReader.Close()
}

func (f *faulty) PushBlob(ctx context.Context, repo string, desc oci.Descriptor, r io.Reader) (oci.Descriptor, error) {
	f.single.Add(1)
	return f.Registry.PushBlob(ctx, repo, desc, r)
}

func (f *faulty) StartUpload(ctx context.Context, repo string) (oci.Upload, error) {
	f.started.Add(1)
	u, err := f.Registry.StartUpload(ctx, repo)
	return &faultyUpload{u, f}, err
}

func (f *faulty) ResumeUpload(ctx context.Context, repo, id string) (oci.Upload, error) {
	u, err := f.Registry.ResumeUpload(ctx, repo, id)
	if err != nil {
		return nil, err
	}
	return &faultyUpload{u, f}, nil
}

type faultyUpload struct {
	oci.Upload
	f *faulty
}

func (u *faultyUpload) Append(ctx context.Context, offset int64, r io.Reader) error {
	if u.f.noChunk {
		return oci.ErrUnsupported.Withf("no chunks here")
	}
	return u.Upload.Append(ctx, offset, readerFunc(func(p []byte) (int, error) {
		n, err := r.Read(p)
		if n > 0 && u.f.appends != nil {
			if aerr := u.f.appends(int64(n)); aerr != nil {
				return 0, aerr // what was under way is lost
			}
		}
		u.f.sent.Add(int64(n))
		return n, err
	}))
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
