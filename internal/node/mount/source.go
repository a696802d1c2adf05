package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync/atomic"

	"sluice/internal/blob"
	"sluice/oci"
)

// origins is a blob that lies in the repositories where an image was found.
// They are asked in turn, the newest first: an image that was pulled again
// from another registry, or with other credentials, goes on with what works.
type origins struct {
	size int64
	list func() []origin
	open func(o origin) (blob.Source, error)
}

func (s *origins) Size() int64 { return s.size }

func (s *origins) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	var errs []error
	list := s.list()
	if blob.Doubted(ctx) && len(list) > 1 { // the first sent something else
		list = slices.Concat(list[1:], list[:1])
	}
	for _, o := range list {
		src, err := s.open(o)
		if err == nil {
			var r io.ReadCloser
			if r, err = src.ReadRange(ctx, off, n); err == nil {
				return r, nil
			}
		}
		errs = append(errs, fmt.Errorf("%s/%s: %w", o.Registry, o.Repository, err))
		if ctx.Err() != nil {
			break
		}
	}
	if len(errs) == 0 {
		return nil, errors.New("the image has no origin")
	}
	return nil, errors.Join(errs...)
}

// source returns the blob of one of the image's descriptors.
func (m *Manager) source(img *image, desc oci.Descriptor) blob.Source {
	if len(desc.Data) > 0 { // verified by ParseManifest
		return blob.FromBytes(desc.Data)
	}
	list := func() []origin {
		m.mu.Lock()
		defer m.mu.Unlock()
		return slices.Clone(img.origins)
	}
	s := &origins{
		size: desc.Size,
		list: list,
		open: func(o origin) (blob.Source, error) {
			reg, err := m.opts.Registry(o.Registry, o.Repository)
			if err != nil {
				return nil, err
			}
			return blob.FromRegistry(reg, o.Repository, desc), nil
		},
	}
	// What is slow to answer is asked again elsewhere, if there's elsewhere.
	second := &origins{size: s.size, open: s.open, list: func() []origin {
		all := list()
		if len(all) < 2 {
			return all
		}
		return append(all[1:], all[0])
	}}
	count := func(s blob.Source) blob.Source { return blob.Count(blob.Count(s, &img.counter), &m.counter) }
	hedged := blob.Hedge(count(s), count(second), &m.hedger)
	return blob.Retry(hedged, m.opts.Retry)
}

// tableSource is a chunk table's blob: what is local of it, and the registry
// for the rest.
type tableSource struct {
	remote blob.Source
	root   []byte                     // verified; the blob begins with it
	local  atomic.Pointer[localTable] // the whole blob, once it's here
}

// localTable is a table's whole blob on this machine.
type localTable struct {
	blob.Source
	disk bool // which may have changed it since it was verified
}

func (s *tableSource) Size() int64 { return s.remote.Size() }

// ReadRange asks the registry for what the disk lost: whole, not while it's read,
// because a page of the table is small. What the disk changed is found by who
// verifies it, and then doubts it; while nothing is on the disk, a doubt is about
// what another host of the registry sent.
func (s *tableSource) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	if local := s.local.Load(); local != nil && n >= 0 && !(local.disk && blob.Doubted(ctx)) {
		content := make([]byte, n)
		if err := blob.ReadFull(ctx, local, content, off); err == nil {
			return io.NopCloser(bytes.NewReader(content)), nil
		}
	}
	if end := int64(len(s.root)); off >= 0 && n >= 0 && off <= end && n <= end-off {
		return io.NopCloser(bytes.NewReader(s.root[off : off+n])), nil
	}
	return s.remote.ReadRange(ctx, off, n)
}

// useFile makes the whole table's file the source. The file stays open as long
// as the image is known: a table is read at any time, also after its directory
// was removed.
func (s *tableSource) useFile(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	fi, err := f.Stat()
	if err == nil && fi.Size() != s.Size() {
		err = fmt.Errorf("%s has %d bytes, not %d", name, fi.Size(), s.Size())
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	s.local.Store(&localTable{Source: blob.FromFile(f, fi.Size()), disk: true})
	return nil
}

// spool copies a whole blob to w and verifies its digest.
func spool(ctx context.Context, src blob.Source, desc oci.Descriptor, w io.Writer) error {
	r, err := src.ReadRange(ctx, 0, desc.Size)
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = io.Copy(w, oci.VerifyReader(r, desc))
	return err
}

// readRoot reads the first n bytes of a blob and verifies their SHA-256.
func readRoot(ctx context.Context, src blob.Source, n int64, digest oci.Digest) ([]byte, error) {
	root := make([]byte, n)
	if err := blob.ReadFull(ctx, src, root, 0); err != nil {
		return nil, err
	}
	if got := oci.DigestOf(root); got != digest {
		return nil, oci.ErrDigestInvalid.Withf("root of %d bytes has digest %s, the manifest says %s", n, got, digest)
	}
	return root, nil
}
