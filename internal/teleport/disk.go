package teleport

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"path/filepath"

	"sluice/internal/artifact"
	"sluice/internal/convert"
	"sluice/internal/durable"
	"sluice/internal/layer"
	"sluice/internal/vhd"
	"sluice/oci"
)

// Why an image can't be expanded, besides the codes of package convert.
var (
	ErrTooLarge = &oci.Error{Code: "EXPANSION_LIMIT_EXCEEDED", Message: "the image is too large to be expanded"}
	ErrLayer    = &oci.Error{Code: "UNSUPPORTED_LAYER", Message: "a layer can't be a disk of its own"}
)

// spool is a layer's tar, as it was read, on its way to a disk.
type spool struct {
	tar, sparse *durable.File
	tree        *layer.Tree
}

func (p *spool) discard() {
	p.tar.Discard()
	p.sparse.Discard()
}

// read spools a layer's tar, of at most limit bytes with what its sparse members
// expand to.
func (s *Service) read(ctx context.Context, src convert.LayerSource, limit int64) (*spool, error) {
	p := &spool{}
	var err error
	if p.tar, err = durable.Create(s.share.pool(), 0o600); err != nil {
		return nil, err
	}
	if p.sparse, err = durable.Create(s.share.pool(), 0o600); err != nil {
		p.tar.Discard()
		return nil, err
	}
	err = src.Read(ctx, func(ctx context.Context, tar io.Reader) error {
		for _, f := range []*durable.File{p.tar, p.sparse} { // of an attempt that failed
			if _, err := f.Seek(0, io.SeekStart); err != nil {
				return convert.Refuse(err)
			}
			if err := f.Truncate(0); err != nil {
				return convert.Refuse(err)
			}
		}
		left := limit
		p.tree, err = layer.Read(ctx, io.TeeReader(tar, s.bounded(p.tar, &left)), layer.Options{Sparse: s.bounded(p.sparse, &left)})
		return err
	})
	if err != nil {
		p.discard()
		return nil, err
	}
	return p, nil
}

// bounded writes to a file until nothing is left of what may be written, or of what
// the share has room for.
type bounded struct {
	file  *durable.File
	left  *int64
	room  func(n int64) error
	until int64 // it is asked again; bytes
}

func (s *Service) bounded(f *durable.File, left *int64) *bounded {
	return &bounded{file: f, left: left, room: s.share.room}
}

func (b *bounded) Write(p []byte) (int, error) {
	if *b.left -= int64(len(p)); *b.left < 0 {
		return 0, convert.Refuse(ErrTooLarge)
	}
	if b.until -= int64(len(p)); b.until <= 0 {
		b.until = 1 << 20
		if err := b.room(int64(len(p))); err != nil {
			return 0, convert.Refuse(err)
		}
	}
	n, err := b.file.Write(p)
	if err != nil {
		err = convert.Refuse(err) // which isn't about the layer; the operation is tried again
	}
	return n, err
}

// treeOf reads a layer for its tree only.
func treeOf(ctx context.Context, src convert.LayerSource) (tree *layer.Tree, err error) {
	err = src.Read(ctx, func(ctx context.Context, tar io.Reader) error {
		tree, err = layer.Read(ctx, tar, layer.Options{Sparse: io.Discard})
		return err
	})
	return tree, err
}

// write makes a disk of a spooled layer and puts it into the pool. trees are those
// of the layers below, if they matter, and the layer's own.
func (s *Service) write(src convert.LayerSource, p *spool, trees []*layer.Tree, name string) (Disk, error) {
	meta, err := artifact.DiskMetadata(trees, src.DiffID)
	if err != nil {
		return Disk{}, ErrLayer.Withf("layer %s can't be a disk of its own: %v: the image can be pulled the ordinary way", src.Blob.Digest, err)
	}
	size := int64(len(meta)) + roundUp(p.tree.Size) + roundUp(p.tree.SparseSize)
	if err := s.share.room(size); err != nil {
		return Disk{}, fmt.Errorf("disk of layer %s: %w", src.Blob.Digest, err)
	}
	out, err := durable.Create(s.share.pool(), 0o644)
	if err != nil {
		return Disk{}, err
	}
	defer out.Discard()
	w := &summer{w: out, whole: sha256.New(), block: sha256.New()}
	footer := vhd.Footer{Size: vhd.Capacity(size), ID: vhd.ID(src.Blob.Digest)}
	sector, err := footer.Encode()
	if err != nil {
		return Disk{}, err
	}
	parts := []io.Reader{
		bytes.NewReader(meta),
		io.NewSectionReader(p.tar, 0, p.tree.Size), zeros(roundUp(p.tree.Size) - p.tree.Size),
		io.NewSectionReader(p.sparse, 0, p.tree.SparseSize), zeros(roundUp(p.tree.SparseSize) - p.tree.SparseSize),
		zeros(footer.Size - size), bytes.NewReader(sector),
	}
	n, err := io.Copy(w, io.MultiReader(parts...))
	if err == nil && n != footer.Size+vhd.FooterSize {
		err = fmt.Errorf("it has %d bytes, not %d: somebody has changed what was spooled", n, footer.Size+vhd.FooterSize)
	}
	if err != nil {
		return Disk{}, fmt.Errorf("disk of layer %s: %w", src.Blob.Digest, err)
	}
	sums := w.end()
	d := Disk{
		Layer: src.Blob.Digest, DiffID: src.DiffID, Name: name, Size: n,
		Digest: digestOf(w.whole), SumsDigest: oci.DigestOf(sums), BlockSize: BlockSize,
	}
	return d, s.publish(out, d, sums)
}

// publish gives a disk its names in the pool.
func (s *Service) publish(out *durable.File, d Disk, sums []byte) error {
	record, err := json.Marshal(d)
	if err != nil {
		return err
	}
	if err := remove(s.share.pool(), d.Name); err != nil {
		return err
	}
	base := filepath.Join(s.share.pool(), d.Name)
	if err := durable.WriteFile(base+".json", record, 0o644); err != nil {
		return err
	}
	if err := durable.WriteFile(base+sumsSuffix, sums, 0o644); err != nil {
		return err
	}
	return out.Commit(base + diskSuffix)
}

// summer writes and takes digests of the whole and of each block.
type summer struct {
	w            io.Writer
	whole, block hash.Hash
	filled       int // of the block
	sums         []byte
}

func (s *summer) Write(p []byte) (int, error) {
	n, err := s.w.Write(p)
	s.whole.Write(p[:n])
	for rest := p[:n]; len(rest) > 0; {
		k := min(len(rest), BlockSize-s.filled)
		s.block.Write(rest[:k])
		s.filled += k
		rest = rest[k:]
		if s.filled == BlockSize {
			s.end()
		}
	}
	return n, err
}

// end ends a block, and returns the sums so far.
func (s *summer) end() []byte {
	if s.filled > 0 {
		s.sums = s.block.Sum(s.sums)
		s.block.Reset()
		s.filled = 0
	}
	return s.sums
}

func digestOf(h hash.Hash) oci.Digest {
	return oci.Digest(fmt.Sprintf("%s:%x", oci.SHA256, h.Sum(nil)))
}

// zeros returns a reader of n zero bytes.
func zeros(n int64) io.Reader { return io.LimitReader(zeroReader{}, n) }

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func roundUp(n int64) int64 { return (n + vhd.SectorSize - 1) / vhd.SectorSize * vhd.SectorSize }

// makePool makes the pool's directory.
func (s share) makePool() error { return durable.MkdirAll(s.pool(), 0o755) }
