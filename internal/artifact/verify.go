package artifact

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"

	"sluice/internal/blob"
	"sluice/internal/layer"
	"sluice/oci"
)

// Report is what Verify has verified.
type Report struct {
	Layers  int
	Devices int
	Chunks  int
	Bytes   int64 // of all devices' content
}

// Verify proves that an artifact is what it should be: it reads all blobs,
// recomputes from the chunks each layer's tar and its diff ID, from the tars
// the metadata, and compares everything with what the artifact says. config is
// the image's config; the artifact is as trustworthy as the digest by which the
// caller knows that.
//
// source opens one of the artifact's blobs. Memory is bounded as in
// EncodeLayer, plus the size of the metadata; a layer takes about the time of
// decoding it. The error names what differs.
func Verify(ctx context.Context, m *Manifest, config []byte, source func(oci.Descriptor) blob.Source) (Report, error) {
	var r Report
	in := BuildInput{Config: m.Config, ConfigContent: config}
	table, err := OpenTable(ctx, m.Table, source(m.Table.Blob))
	if err != nil {
		return r, err
	}
	if err := m.CheckTable(table); err != nil {
		return r, err
	}
	for i, l := range m.Layers {
		n, s := m.LayerDevices(i)
		verified, err := verifyLayer(ctx, table, n, s, source)
		if err != nil {
			return r, fmt.Errorf("layer %d (%s): %w", i, l.DiffID, err)
		}
		in.Layers = append(in.Layers, verified)
		r.Layers++
	}
	for _, d := range table.Devices {
		r.Devices++
		r.Chunks += d.Chunks
		r.Bytes += d.ContentSize
	}
	if err := in.check(); err != nil {
		return r, err
	}
	if err := verifyMetadata(ctx, m, in.Layers, source); err != nil {
		return r, err
	}
	if m.BootPack != nil {
		if err := verifyBootPack(ctx, *m.BootPack, table, source(*m.BootPack)); err != nil {
			return r, err
		}
	}
	return r, nil
}

// verifyLayer decodes a layer's devices and returns what it found. sparse is
// -1 if the layer has none.
func verifyLayer(ctx context.Context, t *Table, tar, sparse int, source func(oci.Descriptor) blob.Source) (*Layer, error) {
	d := t.Devices[tar]
	content := newDeviceReader(ctx, d, source(d.Blob))
	defer content.Close()
	expanded := sha256.New()
	tree, err := layer.Read(ctx, content, layer.Options{Sparse: expanded})
	if err != nil {
		return nil, err
	}
	if err := content.verify(); err != nil {
		return nil, err
	}
	l := &Layer{DiffID: d.DiffID, Tree: tree, Tar: DeviceData{DiffID: d.DiffID, Size: d.ContentSize, Blob: d.Blob}}
	if sparse < 0 {
		if tree.SparseSize != 0 {
			return nil, fmt.Errorf("its tar has sparse members of %d bytes, the artifact has no sparse device for them", tree.SparseSize)
		}
		return l, nil
	}
	s := t.Devices[sparse]
	if got := digestOf(expanded); got != s.DiffID || tree.SparseSize != s.ContentSize {
		return nil, fmt.Errorf("its sparse members expand to %d bytes with digest %s, the chunk table says %d and %s", tree.SparseSize, got, s.ContentSize, s.DiffID)
	}
	stored := newDeviceReader(ctx, s, source(s.Blob))
	defer stored.Close()
	if _, err := io.Copy(io.Discard, stored); err != nil {
		return nil, err
	}
	l.Sparse = &DeviceData{DiffID: s.DiffID, Size: s.ContentSize, Blob: s.Blob}
	return l, stored.verify()
}

// deviceReader reads a device's whole content, from its blob in one range.
type deviceReader struct {
	ctx     context.Context // that of the one Verify call it lives in
	d       *Device
	src     blob.Source
	r       io.ReadCloser // the blob; nil before the first read
	hash    io.Writer
	sum     func() oci.Digest
	blobSum func() oci.Digest
	next    int
	frame   []byte
	data    []byte // decoded, with rest being what hasn't been returned
	rest    []byte
}

func newDeviceReader(ctx context.Context, d *Device, src blob.Source) *deviceReader {
	content, stored := sha256.New(), sha256.New()
	return &deviceReader{
		ctx: ctx, d: d, src: &hashSource{src, stored}, hash: content,
		sum:     func() oci.Digest { return digestOf(content) },
		blobSum: func() oci.Digest { return digestOf(stored) },
	}
}

// Read implements io.Reader.
func (r *deviceReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		if r.next == r.d.Chunks {
			return 0, io.EOF
		}
		if err := r.fill(); err != nil {
			return 0, fmt.Errorf("blob %s, chunk %d: %w", r.d.Blob.Digest, r.next, err)
		}
		r.next++
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// fill reads and decodes the next chunk.
func (r *deviceReader) fill() error {
	var err error
	if r.r == nil {
		if r.r, err = r.src.ReadRange(r.ctx, 0, r.d.Blob.Size); err != nil {
			return err
		}
		r.frame = make([]byte, MaxFrameLength)
	}
	c, err := r.d.Chunk(r.ctx, r.next)
	if err != nil {
		return err
	}
	if _, err := io.ReadFull(r.r, r.frame[:c.BlobLength]); err != nil {
		return noEOF(err)
	}
	if r.data, err = c.Decode(r.data, r.frame[:c.BlobLength]); err != nil {
		return err
	}
	if _, err := r.hash.Write(r.data); err != nil {
		return err
	}
	r.rest = r.data
	return nil
}

// verify compares the digests of what was read, which must have been all.
func (r *deviceReader) verify() error {
	if got := r.sum(); got != r.d.DiffID {
		return &DiffIDError{Want: r.d.DiffID, Got: got}
	}
	if got := r.blobSum(); got != r.d.Blob.Digest {
		return fmt.Errorf("blob has digest %s, the artifact says %s", got, r.d.Blob.Digest)
	}
	return nil
}

// Close implements io.Closer.
func (r *deviceReader) Close() error {
	if r.r == nil {
		return nil
	}
	return r.r.Close()
}

// hashSource hashes what is read of a source.
type hashSource struct {
	blob.Source
	hash io.Writer
}

func (s *hashSource) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	r, err := s.Source.ReadRange(ctx, off, n)
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{io.TeeReader(r, s.hash), r}, nil
}

// verifyMetadata makes the metadata anew and compares it with the artifact's.
func verifyMetadata(ctx context.Context, m *Manifest, layers []*Layer, source func(oci.Descriptor) blob.Source) error {
	trees := make([]*layer.Tree, len(layers))
	for i, l := range layers {
		trees[i] = l.Tree
	}
	merged, err := layer.Merge(trees)
	if err != nil {
		return err
	}
	compare := func(what string, ref MetadataRef, made *metadata) error {
		if got := oci.DigestOf(made.content); got != ref.Digest || int64(len(made.content)) != ref.Size {
			return fmt.Errorf("%s: the layers give an EROFS image of %d bytes with digest %s, the artifact has one of %d bytes with digest %s",
				what, len(made.content), got, ref.Size, ref.Digest)
		}
		if err := ref.unpack(ctx, source(ref.Blob), io.Discard); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		for i, d := range made.devices {
			if i >= len(ref.Devices) || ref.Devices[i] != d || len(ref.Devices) != len(made.devices) {
				return fmt.Errorf("%s: its devices are %v, the artifact says %v", what, made.devices, ref.Devices)
			}
		}
		return nil
	}
	made, err := mergedMetadata(merged, layers)
	if err != nil {
		return err
	}
	if err := compare("merged metadata", m.Metadata, made); err != nil {
		return err
	}
	for i := range layers {
		if made, err = layerMetadata(merged, i, layers); err != nil {
			return err
		}
		if err := compare(fmt.Sprintf("metadata of layer %d", i), m.Layers[i].Metadata, made); err != nil {
			return err
		}
	}
	return nil
}

// verifyBootPack decodes every frame of a boot pack.
func verifyBootPack(ctx context.Context, desc oci.Descriptor, t *Table, src blob.Source) error {
	r, err := src.ReadRange(ctx, 0, desc.Size)
	if err != nil {
		return err
	}
	defer r.Close()
	verified := oci.VerifyReader(r, desc)
	var data []byte
	err = ReadBootPack(ctx, verified, t, nil, func(_ ChunkRef, c Chunk, frame []byte) (err error) {
		data, err = c.Decode(data, frame)
		return err
	})
	if err != nil {
		return err
	}
	n, err := io.Copy(io.Discard, verified)
	if err != nil {
		return fmt.Errorf("boot pack %s: after its last frame: %w", desc.Digest, err)
	}
	if n != 0 {
		return fmt.Errorf("boot pack %s: %d bytes follow its last frame", desc.Digest, n)
	}
	return nil
}
