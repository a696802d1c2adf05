package pulled

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"sluice/internal/artifact"
	"sluice/internal/convert"
	"sluice/internal/durable"
	"sluice/internal/human"
	"sluice/internal/layer"
	"sluice/oci"
)

// ErrNoSpace: an image needs more of the disk than it may have.
var ErrNoSpace = errors.New("there isn't enough space for the image")

// Names in a layer's directory.
const (
	fileTar    = "tar"
	fileSparse = "sparse"
	fileLayer  = "layer.json"
)

// record is layer.json.
type record struct {
	DiffID oci.Digest `json:"diffID"`
	Size   int64      `json:"size"` // of the tar, without padding

	// Of what sparse members expand to; 0 and empty if there are none.
	SparseSize   int64      `json:"sparseSize,omitempty"`
	SparseDigest oci.Digest `json:"sparseDigest,omitempty"`
}

// layer returns a layer, from the disk if it is here. left is how many bytes the
// image's layers may still have.
func (s *Store) layer(ctx context.Context, src convert.LayerSource, left *atomic.Int64) (l *artifact.Layer, here bool, err error) {
	give, err := s.locks.take(ctx, "layer/"+src.DiffID.String())
	if err != nil {
		return nil, false, err
	}
	defer give()
	l, err = s.readLayer(ctx, src.DiffID)
	if err == nil {
		left.Add(-l.Tree.Size - l.Tree.SparseSize)
		return l, true, nil
	}
	if ctx.Err() != nil {
		return nil, false, context.Cause(ctx)
	}
	if !errors.Is(err, os.ErrNotExist) {
		s.log.WarnContext(ctx, "a layer is damaged on the disk, and is fetched again", "diffID", src.DiffID, "error", err)
	}
	if err := s.discard(s.layerDir(src.DiffID)); err != nil {
		return nil, false, err
	}
	l, err = s.fetchLayer(ctx, src, left)
	return l, false, err
}

// readLayer reads a layer that is here, and verifies it.
func (s *Store) readLayer(ctx context.Context, diffID oci.Digest) (*artifact.Layer, error) {
	dir := s.layerDir(diffID)
	var rec record
	if err := readJSON(filepath.Join(dir, fileLayer), &rec); err != nil {
		return nil, err
	}
	tar, err := os.Open(filepath.Join(dir, fileTar))
	if err != nil {
		return nil, err
	}
	defer tar.Close()
	var sparse io.ReaderAt = bytes.NewReader(nil)
	if rec.SparseSize > 0 {
		f, err := os.Open(filepath.Join(dir, fileSparse))
		if err != nil {
			return nil, err
		}
		defer f.Close()
		sparse = f
	}
	sum := sha256.New()
	in := bufio.NewReaderSize(io.NewSectionReader(tar, 0, rec.Size), 1<<20)
	tree, err := layer.Read(ctx, io.TeeReader(in, sum), layer.Options{Sparse: &comparer{r: io.NewSectionReader(sparse, 0, rec.SparseSize)}})
	if err != nil {
		return nil, err
	}
	if got := digestOf(sum); got != diffID || tree.SparseSize != rec.SparseSize {
		return nil, fmt.Errorf("the disk has %s and %d bytes of sparse content instead of %s and %d", got, tree.SparseSize, diffID, rec.SparseSize)
	}
	rec.DiffID = diffID
	return rec.layer(tree), nil
}

// layer returns the layer with the record's devices.
func (rec record) layer(tree *layer.Tree) *artifact.Layer {
	l := &artifact.Layer{DiffID: rec.DiffID, Tree: tree, Tar: artifact.DeviceData{DiffID: rec.DiffID, Size: rec.Size}}
	if rec.SparseSize > 0 {
		l.Sparse = &artifact.DeviceData{DiffID: rec.SparseDigest, Size: rec.SparseSize}
	}
	return l
}

// comparer takes what r has, and nothing else.
type comparer struct {
	r   io.Reader
	buf []byte
}

func (c *comparer) Write(p []byte) (int, error) {
	if len(c.buf) < len(p) {
		c.buf = make([]byte, len(p))
	}
	if _, err := io.ReadFull(c.r, c.buf[:len(p)]); err != nil {
		return 0, fmt.Errorf("what sparse files expand to, on the disk: %w", err)
	}
	if !bytes.Equal(c.buf[:len(p)], p) {
		return 0, errors.New("what sparse files expand to is damaged on the disk")
	}
	return len(p), nil
}

// fetchLayer brings a layer here. The caller has its lock.
func (s *Store) fetchLayer(ctx context.Context, src convert.LayerSource, left *atomic.Int64) (*artifact.Layer, error) {
	dir, err := os.MkdirTemp(s.layersDir(), durable.TempPrefix)
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir) // unless it got its name
	tar, err := s.create(filepath.Join(dir, fileTar), left)
	if err != nil {
		return nil, err
	}
	defer tar.Close()
	sparse, err := s.create(filepath.Join(dir, fileSparse), left)
	if err != nil {
		return nil, err
	}
	defer sparse.Close()
	sparse.sum = sha256.New()
	var tree *layer.Tree
	err = src.Read(ctx, func(ctx context.Context, r io.Reader) (err error) {
		// Of an attempt that failed there may be something.
		if err := errors.Join(tar.reset(), sparse.reset()); err != nil {
			return convert.Refuse(err)
		}
		if tree, err = layer.Read(ctx, io.TeeReader(r, tar), layer.Options{Sparse: sparse}); err != nil {
			return err
		}
		if err := errors.Join(tar.finish(), sparse.finish()); err != nil {
			return convert.Refuse(err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	rec := record{DiffID: src.DiffID, Size: tar.n}
	if sparse.n > 0 {
		rec.SparseSize, rec.SparseDigest = sparse.n, digestOf(sparse.sum)
	} else if err := os.Remove(sparse.Name()); err != nil {
		return nil, err
	}
	content, err := json.Marshal(rec)
	if err != nil {
		return nil, err
	}
	if err := durable.WriteFile(filepath.Join(dir, fileLayer), content, 0o600); err != nil {
		return nil, err
	}
	if err := durable.Rename(dir, s.layerDir(src.DiffID)); err != nil {
		return nil, err
	}
	return rec.layer(tree), nil
}

// file is a file of a layer under way. Its writes fail before there's no space
// any more, in a way that isn't tried again.
type file struct {
	*os.File
	buf  *bufio.Writer
	sum  hash.Hash     // nil: somebody else knows the digest
	n    int64         // bytes written
	left *atomic.Int64 // that the image may still have
	free func() (int64, error)
	keep int64 // bytes of the disk
	look int64 // n at which to look at the disk again
}

func (s *Store) create(name string, left *atomic.Int64) (*file, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return &file{
		File: f, buf: bufio.NewWriterSize(f, 1<<20), left: left, keep: s.opts.KeepFree,
		free: func() (int64, error) {
			var st unix.Statfs_t
			err := unix.Fstatfs(int(f.Fd()), &st)
			return int64(st.Bavail) * st.Bsize, err
		},
	}, nil
}

// lookEvery is how many bytes of a file are written between two looks at the disk.
const lookEvery = 16 << 20

// Write implements io.Writer.
func (f *file) Write(p []byte) (int, error) {
	if f.left.Add(-int64(len(p))) < 0 {
		f.left.Add(int64(len(p)))
		return 0, convert.Refuse(fmt.Errorf("%w: its layers are too large, decompressed", ErrNoSpace))
	}
	f.n += int64(len(p))
	if f.n >= f.look && f.keep > 0 {
		f.look = f.n + lookEvery
		free, err := f.free()
		if err != nil {
			return 0, convert.Refuse(err)
		}
		if free < f.keep {
			return 0, convert.Refuse(fmt.Errorf("%w: the file system of %s has %s left, of which %s are to stay free: remove images or other files",
				ErrNoSpace, f.Name(), human.Bytes(free), human.Bytes(f.keep)))
		}
	}
	if f.sum != nil {
		f.sum.Write(p)
	}
	if n, err := f.buf.Write(p); err != nil {
		return n, convert.Refuse(noSpace(err))
	}
	return len(p), nil
}

// noSpace says of an error of writing that there's no space, if that's why.
func noSpace(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	return err
}

// reset makes the file empty.
func (f *file) reset() error {
	f.left.Add(f.n)
	f.buf.Reset(f.File)
	if f.sum != nil {
		f.sum.Reset()
	}
	f.n, f.look = 0, 0
	_, err := f.Seek(0, io.SeekStart)
	return errors.Join(err, f.Truncate(0))
}

// finish pads the file to whole blocks, and makes it durable.
func (f *file) finish() error {
	if err := f.buf.Flush(); err != nil {
		return noSpace(err)
	}
	if err := f.Truncate(roundUp(f.n)); err != nil {
		return noSpace(err)
	}
	return noSpace(f.Sync())
}

func digestOf(h hash.Hash) oci.Digest {
	return oci.Digest(fmt.Sprintf("%s:%x", oci.SHA256, h.Sum(nil)))
}
