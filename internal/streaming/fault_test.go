package streaming

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"sync"
	"sync/atomic"
	"testing"

	"sluice/internal/operation"
	"sluice/internal/stored"
	"sluice/oci"
)

// faulty is a registry that does something before each call, which fails if that
// does.
type faulty struct {
	oci.Registry
	before func(call string) error
	repo   func(repo string) // of GetManifest
}

func (f *faulty) call(name string) error {
	if f.before == nil {
		return nil
	}
	return f.before(name)
}

func (f *faulty) GetManifest(ctx context.Context, repo, reference string) (oci.Manifest, error) {
	if f.repo != nil {
		f.repo(repo)
	}
	if err := f.call("GetManifest"); err != nil {
		return oci.Manifest{}, err
	}
	return f.Registry.GetManifest(ctx, repo, reference)
}

func (f *faulty) ResolveManifest(ctx context.Context, repo, reference string) (oci.Descriptor, error) {
	if err := f.call("ResolveManifest"); err != nil {
		return oci.Descriptor{}, err
	}
	return f.Registry.ResolveManifest(ctx, repo, reference)
}

func (f *faulty) Referrers(ctx context.Context, repo string, subject oci.Digest, kind string) iter.Seq2[oci.Descriptor, error] {
	if err := f.call("Referrers"); err != nil {
		return func(yield func(oci.Descriptor, error) bool) { yield(oci.Descriptor{}, err) }
	}
	return f.Registry.Referrers(ctx, repo, subject, kind)
}

func (f *faulty) GetBlob(ctx context.Context, repo string, digest oci.Digest) (oci.BlobReader, error) {
	if err := f.call("GetBlob"); err != nil {
		return nil, err
	}
	return f.Registry.GetBlob(ctx, repo, digest)
}

func (f *faulty) GetBlobRange(ctx context.Context, repo string, digest oci.Digest, offset, length int64) (oci.BlobReader, error) {
	if err := f.call("GetBlobRange"); err != nil {
		return nil, err
	}
	return f.Registry.GetBlobRange(ctx, repo, digest, offset, length)
}

func (f *faulty) ResolveBlob(ctx context.Context, repo string, digest oci.Digest) (oci.Descriptor, error) {
	if err := f.call("ResolveBlob"); err != nil {
		return oci.Descriptor{}, err
	}
	return f.Registry.ResolveBlob(ctx, repo, digest)
}

func (f *faulty) MountBlob(ctx context.Context, from, to string, digest oci.Digest) (oci.Descriptor, error) {
	if err := f.call("MountBlob"); err != nil {
		return oci.Descriptor{}, err
	}
	return f.Registry.MountBlob(ctx, from, to, digest)
}

func (f *faulty) StartUpload(ctx context.Context, repo string) (oci.Upload, error) {
	if err := f.call("StartUpload"); err != nil {
		return nil, err
	}
	u, err := f.Registry.StartUpload(ctx, repo)
	return &faultyUpload{u, f}, err
}

func (f *faulty) PushManifest(ctx context.Context, repo, reference, mediaType string, content []byte) (oci.Descriptor, error) {
	if err := f.call("PushManifest"); err != nil {
		return oci.Descriptor{}, err
	}
	return f.Registry.PushManifest(ctx, repo, reference, mediaType, content)
}

type faultyUpload struct {
	oci.Upload
	f *faulty
}

func (u *faultyUpload) Append(ctx context.Context, offset int64, r io.Reader) error {
	if err := u.f.call("Append"); err != nil {
		return err
	}
	return u.Upload.Append(ctx, offset, r)
}

func (u *faultyUpload) Commit(ctx context.Context, digest oci.Digest) (oci.Descriptor, error) {
	if err := u.f.call("Commit"); err != nil {
		return oci.Descriptor{}, err
	}
	return u.Upload.Commit(ctx, digest)
}

var errDisk = errors.New("no space left on device")

// Every call that a conversion makes fails, in turn: what was converted is
// converted by the next attempt, and nothing half of it was ever seen.
func TestEveryCallFails(t *testing.T) {
	calls := conversionCalls(t)
	if len(calls) < 20 {
		t.Fatalf("a conversion makes %d calls: %q", len(calls), calls)
	}
	for n := range calls {
		t.Run(fmt.Sprintf("%d %s", n, calls[n]), func(t *testing.T) {
			t.Parallel()
			b, s, op := failing(t)
			var count atomic.Int64
			s.generator.(*faulty).before = func(string) error {
				if int(count.Add(1)) == n+1 {
					return errDisk
				}
				return nil
			}
			start(t, s)
			if op = end(t, s, op); op.Status != operation.StatusSucceeded {
				t.Errorf("%+v", op)
			}
			if len(b.artifacts(repo, op.Subject)) != 1 {
				t.Error("there is no artifact")
			}
		})
	}
}

// From one call on, all of them fail: it's given up after a while, with a reason,
// and can be started again.
func TestNothingWorksAnyMore(t *testing.T) {
	calls := conversionCalls(t)
	for n := 0; n < len(calls); n += 3 {
		t.Run(fmt.Sprintf("%d %s", n, calls[n]), func(t *testing.T) {
			t.Parallel()
			b, s, op := failing(t)
			var count atomic.Int64
			broken := int64(n)
			f := s.generator.(*faulty)
			var healed atomic.Bool
			f.before = func(string) error {
				if count.Add(1) > broken && !healed.Load() {
					return errDisk
				}
				return nil
			}
			stop := start(t, s)
			op = end(t, s, op)
			if op.Status != operation.StatusFailed || op.ErrorCode != operation.CodeUnknown || s.ops.Counts.Retried.Load() != operation.MaxFailures-1 {
				t.Fatalf("%+v after %d retries", op, s.ops.Counts.Retried.Load())
			}
			if len(b.artifacts(repo, op.Subject)) != 0 {
				t.Error("there is an artifact of what failed")
			}
			stop()
			healed.Store(true)
			start(t, s)
			succeed(t, s, repo, op.Subject.String())
			if len(b.artifacts(repo, op.Subject)) != 1 {
				t.Error("there is no artifact")
			}
		})
	}
}

func failing(t *testing.T) (*bench, *Service, Operation) {
	b := newBench(t, stored.Options{})
	s := b.service(Options{Layers: 1})
	s.generator = &faulty{Registry: s.generator}
	b.push("v1", image{tars: [][]byte{files("one", noise(3, 100_000)), files("two")}})
	return b, s, must(t, s, repo, "v1")
}

// conversionCalls returns the calls of a conversion that succeeds.
func conversionCalls(t *testing.T) []string {
	t.Helper()
	_, s, op := failing(t)
	var mu sync.Mutex
	var calls []string
	s.generator.(*faulty).before = func(call string) error {
		mu.Lock()
		defer mu.Unlock()
		calls = append(calls, call)
		return nil
	}
	stop := start(t, s)
	if op = end(t, s, op); op.Status != operation.StatusSucceeded {
		t.Fatalf("%+v", op)
	}
	stop()
	return calls
}
