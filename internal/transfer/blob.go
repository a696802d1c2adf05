package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"sluice/oci"
)

// maxBackoff is the longest pause between two attempts.
const maxBackoff = 10 * time.Second

// blobs brings the plan's blobs to the target, a few at a time. The first error
// ends them all.
func (c *copier) blobs(ctx context.Context, p *plan) error {
	c.total.Blobs = len(p.blobs)
	c.result.Blobs = make([]Blob, len(p.blobs))
	for i, desc := range p.blobs {
		c.total.Size += desc.Size
		c.result.Blobs[i].Descriptor = desc
	}
	c.report(Progress{Stage: StageBlobs, Number: -1})

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	next := make(chan int)
	var workers sync.WaitGroup
	for range min(c.opts.Jobs, len(p.blobs)) {
		workers.Go(func() {
			for i := range next {
				if err := c.blob(ctx, i); err != nil {
					cancel(err) // the first stays the cause
				}
			}
		})
	}
	for i := range p.blobs {
		select {
		case next <- i:
		case <-ctx.Done():
		}
	}
	close(next)
	workers.Wait()
	return context.Cause(ctx)
}

// blob brings one blob to the target.
func (c *copier) blob(ctx context.Context, i int) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	b := &c.result.Blobs[i]
	s, err := c.bring(ctx, i, b.Descriptor)
	if err != nil {
		return fmt.Errorf("blob %s of %d bytes: %w", b.Digest, b.Size, err)
	}
	b.State = s
	c.report(Progress{Stage: StageBlobs, Blob: b.Descriptor, Number: i, State: s, Done: b.Size})
	return nil
}

func (c *copier) bring(ctx context.Context, i int, desc oci.Descriptor) (State, error) {
	switch there, err := c.dst.Registry.ResolveBlob(ctx, c.dst.Repo, desc.Digest); {
	case err == nil && there.Size != desc.Size:
		return Waiting, oci.ErrSizeInvalid.Withf("the target has it with %d bytes", there.Size)
	case err == nil:
		c.state.forget(desc.Digest)
		return Skipped, nil
	case !errors.Is(err, oci.ErrBlobUnknown) && !errors.Is(err, oci.ErrNameUnknown):
		return Waiting, fmt.Errorf("looking for it in the target: %w", err)
	}
	if c.opts.SameRegistry {
		if c.opts.DryRun {
			return Mounted, nil
		}
		_, err := c.dst.Registry.MountBlob(ctx, c.src.Repo, c.dst.Repo, desc.Digest)
		if err == nil {
			return Mounted, nil
		}
		c.opts.Log.DebugContext(ctx, "blob can't be mounted and is copied", "digest", desc.Digest, "error", err)
	}
	if c.opts.DryRun {
		return Copied, nil
	}
	s := &stream{desc: desc}
	s.open = func(offset int64) (oci.BlobReader, error) {
		if offset == 0 {
			return c.src.Registry.GetBlob(ctx, c.src.Repo, desc.Digest)
		}
		return c.src.Registry.GetBlobRange(ctx, c.src.Repo, desc.Digest, offset, -1)
	}
	s.report = func(done int64) {
		c.report(Progress{Stage: StageBlobs, Blob: desc, Number: i, State: Copying, Done: done})
	}
	defer s.close()
	s.report(0)
	if desc.Size > wholeSize {
		return Copied, c.upload(ctx, s)
	}
	return Copied, c.push(ctx, s)
}

// push sends a blob in one piece, and again if that fails.
func (c *copier) push(ctx context.Context, s *stream) error {
	for failed := 1; ; failed++ {
		s.seek(0)
		_, err := c.dst.Registry.PushBlob(ctx, c.dst.Repo, s.desc, &wholeStream{s, oci.VerifyReader(s, s.desc)})
		if err == nil {
			return nil
		}
		if err = s.explain(err); failed >= c.opts.Attempts || final(ctx, err) {
			return err
		}
		c.pause(ctx, s.desc.Digest, failed, err)
	}
}

// pause waits before another attempt.
func (c *copier) pause(ctx context.Context, digest oci.Digest, failed int, err error) {
	level := slog.LevelInfo // a lost connection is nothing to worry about
	if failed > 1 {
		level = slog.LevelWarn
	}
	c.opts.Log.Log(ctx, level, "transfer of a blob failed, trying again", "digest", digest, "failures", failed, "error", err)
	d := min(c.opts.MinBackoff<<min(failed-1, 10), maxBackoff)
	t := time.NewTimer(d - rand.N(d/2+1))
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// final reports whether an error will be the answer next time too.
func final(ctx context.Context, err error) bool {
	if ctx.Err() != nil {
		return true
	}
	for _, e := range []error{
		oci.ErrUnauthorized, oci.ErrDenied, oci.ErrBlobUnknown, oci.ErrNameUnknown, oci.ErrNameInvalid,
		oci.ErrDigestInvalid, oci.ErrSizeInvalid, oci.ErrUnsupported,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// progressStep is how many bytes pass between two reports.
const progressStep = 256 << 10

// stream reads a blob of the source, from any offset on, and verifies what of it
// has been read without a gap. One goroutine at a time uses it.
type stream struct {
	desc   oci.Descriptor
	open   func(offset int64) (oci.BlobReader, error)
	report func(done int64)

	r        oci.BlobReader // nil when not open
	at       int64          // offset of the next byte
	verified int64          // the verifier has seen the bytes up to here
	verifier interface {
		io.Writer
		Verified() bool
	}
	reported int64
	err      error // the last that the source had
}

// seek makes offset what is read next.
func (s *stream) seek(offset int64) {
	if s.at != offset || s.err != nil {
		s.close()
		s.at, s.reported = offset, offset
	}
	s.err = nil
}

// Read implements io.Reader. It never yields more than the blob's size.
func (s *stream) Read(p []byte) (int, error) {
	if s.at >= s.desc.Size {
		return 0, io.EOF
	}
	if s.r == nil {
		r, err := s.open(s.at)
		if err == nil && r.Descriptor().Size != s.desc.Size {
			r.Close()
			err = oci.ErrSizeInvalid.Withf("it has %d bytes there", r.Descriptor().Size)
		}
		if err != nil {
			s.err = err
			return 0, err
		}
		s.r = r
	}
	n, err := s.r.Read(p[:min(int64(len(p)), s.desc.Size-s.at)])
	s.verify(p[:n])
	s.at += int64(n)
	if s.at-s.reported >= progressStep {
		s.reported = s.at
		s.report(s.at)
	}
	if err == io.EOF && s.at < s.desc.Size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// verify shows the verifier the bytes b, which are at s.at, unless it has seen
// them or others before them are missing.
func (s *stream) verify(b []byte) {
	if s.verifier == nil {
		s.verifier = s.desc.Digest.Verifier()
	}
	end := s.at + int64(len(b))
	if s.at <= s.verified && end > s.verified {
		s.verifier.Write(b[s.verified-s.at:])
		s.verified = end
	}
}

// check returns an error if all of the blob was read and is another one.
func (s *stream) check() error {
	if s.verified == s.desc.Size && s.verifier != nil && !s.verifier.Verified() {
		return oci.ErrDigestInvalid.Withf("the source has another content under this digest")
	}
	return nil
}

// explain says whose an error of a transfer is.
func (s *stream) explain(err error) error {
	if s.err != nil {
		return fmt.Errorf("reading it from the source: %w", s.err)
	}
	return fmt.Errorf("sending it to the target: %w", err)
}

func (s *stream) close() {
	if s.r != nil {
		s.r.Close()
		s.r = nil
	}
}

// wholeStream is a stream that doesn't end where it has the wrong content, which
// is the source's error.
type wholeStream struct {
	s        *stream
	verified io.Reader
}

func (w *wholeStream) Read(p []byte) (int, error) {
	n, err := w.verified.Read(p)
	if err != nil && err != io.EOF {
		w.s.err = err
	}
	return n, err
}

// readBounded reads all of r, which yields size bytes or an error; more than
// limit it doesn't.
func readBounded(r io.Reader, size, limit int64) ([]byte, error) {
	if size > limit {
		return nil, oci.ErrSizeInvalid.Withf("%d bytes are too many: %d are allowed", size, limit)
	}
	return io.ReadAll(io.LimitReader(r, limit+1))
}
