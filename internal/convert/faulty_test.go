package convert

import (
	"bytes"
	"context"
	"errors"
	"io"
	"iter"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"sluice/oci"
)

// faulty is a registry that fails now and then.
type faulty struct {
	oci.Registry
	denyWrites  bool         // every write is denied
	denyUploads bool         // every upload is denied
	failing     atomic.Int64 // how many of the next writes to uploads fail halfway
	cutting     atomic.Int64 // how many of the next reads of blobs break off
	corrupt     oci.Digest   // a blob that arrives damaged

	mu      sync.Mutex
	uploads []string // what happened to uploads and manifests, in order
}

var errNetwork = errors.New("connection reset by peer")

func (f *faulty) note(s string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.uploads = append(f.uploads, s)
}

func (f *faulty) StartUpload(ctx context.Context, repo string) (oci.Upload, error) {
	if f.denyWrites || f.denyUploads {
		return nil, oci.ErrDenied
	}
	u, err := f.Registry.StartUpload(ctx, repo)
	return &faultyUpload{u, f}, err
}

func (f *faulty) PushManifest(ctx context.Context, repo, reference, mediaType string, content []byte) (oci.Descriptor, error) {
	if f.denyWrites {
		return oci.Descriptor{}, oci.ErrDenied
	}
	f.note("manifest")
	return f.Registry.PushManifest(ctx, repo, reference, mediaType, content)
}

func (f *faulty) GetBlobRange(ctx context.Context, repo string, digest oci.Digest, offset, length int64) (oci.BlobReader, error) {
	r, err := f.Registry.GetBlobRange(ctx, repo, digest, offset, length)
	if err != nil {
		return nil, err
	}
	if digest == f.corrupt {
		return &damaged{BlobReader: r}, nil
	}
	if f.cutting.Add(-1) >= 0 {
		return &cut{BlobReader: r, left: length / 2}, nil
	}
	return r, nil
}

// cut is a blob whose connection breaks.
type cut struct {
	oci.BlobReader
	left int64
}

func (c *cut) Read(p []byte) (int, error) {
	if c.left <= 0 {
		return 0, errNetwork
	}
	n, err := c.BlobReader.Read(p[:min(int64(len(p)), c.left)])
	c.left -= int64(n)
	return n, err
}

// damaged is a blob with a wrong byte in its middle.
type damaged struct {
	oci.BlobReader
	at int64
}

func (d *damaged) Read(p []byte) (int, error) {
	n, err := d.BlobReader.Read(p)
	if i := d.Descriptor().Size/2 - d.at; i >= 0 && i < int64(n) {
		p[i] ^= 1
	}
	d.at += int64(n)
	return n, err
}

type faultyUpload struct {
	oci.Upload
	f *faulty
}

func (u *faultyUpload) Append(ctx context.Context, offset int64, r io.Reader) error {
	if u.f.failing.Add(-1) < 0 {
		return u.Upload.Append(ctx, offset, r)
	}
	half, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	if err := u.Upload.Append(ctx, offset, bytes.NewReader(half[:len(half)/2])); err != nil {
		return err
	}
	return errNetwork
}

func (u *faultyUpload) Commit(ctx context.Context, digest oci.Digest) (oci.Descriptor, error) {
	u.f.note("blob")
	return u.Upload.Commit(ctx, digest)
}

// An index of referrers that is kept in a tag may list what was deleted.
func TestConvertPassesOverDeletedReferrers(t *testing.T) {
	f := newFixture(t)
	subject := f.image(linux("amd64", layers(t)...))
	r, err := Convert(t.Context(), staleListing{f}, repo, subject.Digest.String(), Options{})
	if err != nil || r.Existed() {
		t.Fatalf("%+v, %v", r, err)
	}
	r, err = Convert(t.Context(), staleListing{f}, repo, subject.Digest.String(), Options{})
	if err != nil || !r.Existed() {
		t.Errorf("the second time: %+v, %v", r, err)
	}
}

// staleListing lists a referrer first that isn't there.
type staleListing struct{ oci.Registry }

func (l staleListing) Referrers(ctx context.Context, repo string, subject oci.Digest, kind string) iter.Seq2[oci.Descriptor, error] {
	return func(yield func(oci.Descriptor, error) bool) {
		gone := oci.Descriptor{MediaType: oci.MediaTypeImageManifest, Digest: oci.DigestOf([]byte("gone")), Size: 4, ArtifactType: oci.ArtifactTypeStreaming}
		if yield(gone, nil) {
			l.Registry.Referrers(ctx, repo, subject, kind)(yield)
		}
	}
}

// A registry that keeps the type to itself says so before the work, not after.
func TestConvertAsksFirst(t *testing.T) {
	f := newFixture(t)
	subject := f.image(linux("amd64", layers(t)...))
	r := &reserved{faulty: &faulty{Registry: f}}
	_, err := Convert(t.Context(), r, repo, subject.Digest.String(), Options{Ask: true})
	if !errors.Is(err, oci.ErrDenied) || !strings.Contains(err.Error(), "takes no streaming artifacts") {
		t.Errorf("got %v", err)
	}
	if r.started != 0 || r.pushed != 1 {
		t.Errorf("%d uploads and %d manifests before it was told", r.started, r.pushed)
	}
	if _, err := Convert(t.Context(), &faulty{Registry: f}, repo, subject.Digest.String(), Options{Ask: true}); err != nil {
		t.Errorf("where it's allowed: %v", err)
	}
}

type reserved struct {
	*faulty
	started, pushed int
}

func (r *reserved) StartUpload(ctx context.Context, repo string) (oci.Upload, error) {
	r.started++
	return r.faulty.StartUpload(ctx, repo)
}

func (r *reserved) PushManifest(ctx context.Context, repo, reference, mediaType string, content []byte) (oci.Descriptor, error) {
	r.pushed++
	return oci.Descriptor{}, oci.ErrDenied
}
