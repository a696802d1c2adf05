package artifact

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"sort"
	"strings"

	"github.com/klauspost/compress/zstd"

	"sluice/internal/blob"
	"sluice/internal/erofs"
	"sluice/internal/layer"
	"sluice/oci"
)

// opaqueXattr is how overlayfs knows a directory that hides the lower one
// (Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories").
const opaqueXattr = "trusted.overlay.opaque"

// deviceID names a device by the layer it belongs to.
type deviceID struct {
	layer  int
	sparse bool
}

// devices returns the image's devices by number.
func imageDevices(layers []*Layer) []deviceID {
	var ids []deviceID
	for i, l := range layers {
		ids = append(ids, deviceID{i, false})
		if l.Sparse != nil {
			ids = append(ids, deviceID{i, true})
		}
	}
	return ids
}

// data returns what the device holds.
func (id deviceID) data(layers []*Layer) *DeviceData {
	if id.sparse {
		return layers[id.layer].Sparse
	}
	return &layers[id.layer].Tar
}

// metadata is a metadata image before it's compressed.
type metadata struct {
	content []byte
	devices []int // device numbers by slot
}

// mergedMetadata makes the EROFS image of the merged tree, on all devices.
func mergedMetadata(merged *layer.Merged, layers []*Layer) (*metadata, error) {
	ids := imageDevices(layers)
	all := make([]int, len(ids))
	for i := range all {
		all[i] = i
	}
	return encodeTree(merged.Tree, layers, ids, all)
}

// layerMetadata makes the EROFS image of layer i alone. Its devices are the
// layer's own and those that its hard links to lower layers' files need.
func layerMetadata(merged *layer.Merged, i int, layers []*Layer) (*metadata, error) {
	tree := merged.Context[i]
	needed := map[deviceID]bool{{i, false}: true}
	if layers[i].Sparse != nil {
		needed[deviceID{i, true}] = true
	}
	seen := make(map[*layer.Node]bool)
	var walk func(n *layer.Node)
	walk = func(n *layer.Node) {
		if seen[n] {
			return
		}
		seen[n] = true
		for _, e := range n.Extents {
			needed[deviceID{e.Layer, e.Sparse}] = true
		}
		for _, child := range n.Children {
			walk(child)
		}
	}
	walk(tree.Root)
	ids := imageDevices(layers)
	var numbers []int
	for n, id := range ids {
		if needed[id] {
			numbers = append(numbers, n)
		}
	}
	return encodeTree(tree, layers, ids, numbers)
}

// encodeTree makes an EROFS image of tree on the devices with the given numbers.
func encodeTree(tree *layer.Tree, layers []*Layer, ids []deviceID, numbers []int) (*metadata, error) {
	c := treeCoder{slots: make(map[deviceID]int), inodes: make(map[*layer.Node]*erofs.Inode)}
	var img erofs.Image
	for slot, n := range numbers {
		data := ids[n].data(layers)
		c.slots[ids[n]] = slot
		// The tag is for people; what a slot is, the manifest says.
		img.Devices = append(img.Devices, erofs.Device{Size: deviceSize(data.Size), Tag: data.DiffID.Encoded()})
	}
	var err error
	if img.Root, err = c.inode(tree.Root); err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if _, err := erofs.Write(&b, img); err != nil {
		return nil, err
	}
	if b.Len() > MaxMetadataSize {
		return nil, fmt.Errorf("metadata has %d bytes, %d are allowed", b.Len(), MaxMetadataSize)
	}
	return &metadata{content: b.Bytes(), devices: numbers}, nil
}

// deviceSize is the size of a device whose content has size bytes.
func deviceSize(size int64) int64 { return (size + 511) &^ 511 }

// treeCoder turns a layer's tree into one for EROFS.
type treeCoder struct {
	slots  map[deviceID]int
	inodes map[*layer.Node]*erofs.Inode // so that hard links stay hard links
}

func (c *treeCoder) inode(n *layer.Node) (*erofs.Inode, error) {
	if i := c.inodes[n]; i != nil {
		return i, nil
	}
	i := &erofs.Inode{
		Mode: n.Mode, UID: n.UID, GID: n.GID, Mtime: n.Mtime, MtimeNsec: n.MtimeNsec,
		Size: n.Size, Major: n.Major, Minor: n.Minor, Target: n.Target,
	}
	c.inodes[n] = i
	for name, value := range n.Xattrs {
		if storable(name) {
			i.Xattrs = append(i.Xattrs, erofs.Xattr{Name: name, Value: value})
		}
	}
	if n.Opaque {
		if _, ok := n.Xattrs[opaqueXattr]; !ok {
			i.Xattrs = append(i.Xattrs, erofs.Xattr{Name: opaqueXattr, Value: "y"})
		}
	}
	for _, e := range n.Extents {
		slot, ok := c.slots[deviceID{e.Layer, e.Sparse}]
		if !ok {
			return nil, fmt.Errorf("file of %d bytes has an extent on a device that isn't there: layer %d, sparse: %t", n.Size, e.Layer, e.Sparse)
		}
		i.Extents = append(i.Extents, erofs.Extent{Device: slot, Offset: e.Offset, Length: e.Length, FileOffset: e.FileOffset})
	}
	for name, child := range n.Children {
		ci, err := c.inode(child)
		if err != nil {
			return nil, fmt.Errorf("%s/%w", name, err)
		}
		i.Entries = append(i.Entries, erofs.Entry{Name: name, Inode: ci})
	}
	// Maps have no order, and determinism shouldn't hang on the writer's
	// sorting alone.
	sort.Slice(i.Entries, func(a, b int) bool { return i.Entries[a].Name < i.Entries[b].Name })
	sort.Slice(i.Xattrs, func(a, b int) bool { return i.Xattrs[a].Name < i.Xattrs[b].Name })
	return i, nil
}

// storable reports whether EROFS has a place for the attribute. Others, such as
// system.nfs4_acl, mean nothing outside of the file system they come from.
func storable(name string) bool {
	for _, prefix := range []string{"user.", "trusted.", "security."} {
		if strings.HasPrefix(name, prefix) && len(name) > len(prefix) {
			return true
		}
	}
	return name == "system.posix_acl_access" || name == "system.posix_acl_default"
}

// store compresses the metadata into sink.
func (m *metadata) store(ctx context.Context, sink Sink, mediaType string) (MetadataRef, error) {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedDefault),
		zstd.WithWindowSize(maxWindow), zstd.WithEncoderCRC(false))
	if err != nil {
		return MetadataRef{}, fmt.Errorf("zstd encoder: %w", err)
	}
	desc, err := store(ctx, sink, mediaType, enc.EncodeAll(m.content, nil))
	if err != nil {
		return MetadataRef{}, err
	}
	return MetadataRef{Blob: desc, Digest: oci.DigestOf(m.content), Size: int64(len(m.content)), Devices: m.devices}, nil
}

// store writes a blob of the given parts into sink.
func store(ctx context.Context, sink Sink, mediaType string, parts ...[]byte) (oci.Descriptor, error) {
	w, err := sink.Create(ctx)
	if err != nil {
		return oci.Descriptor{}, fmt.Errorf("creating a blob: %w", err)
	}
	hash := sha256.New()
	desc := oci.Descriptor{MediaType: mediaType}
	for _, p := range parts {
		if _, err := w.Write(p); err != nil {
			w.Cancel()
			return oci.Descriptor{}, fmt.Errorf("writing a blob: %w", err)
		}
		hash.Write(p)
		desc.Size += int64(len(p))
	}
	desc.Digest = digestOf(hash)
	if err := w.Commit(ctx, desc.Digest); err != nil {
		return oci.Descriptor{}, fmt.Errorf("committing blob %s: %w", desc.Digest, err)
	}
	return desc, nil
}

// MetadataFile is what metadata is unpacked into: an *os.File, for instance.
type MetadataFile interface {
	io.Writer
	io.ReaderAt
}

// Unpack reads the metadata's blob from src, writes the EROFS image into the
// empty file f, and checks all there is to check before a kernel may mount it:
// the blob's digest, the image's size and digest, and by erofs.Check its every
// byte. sizes are those of the devices in the image's slots (Table.Devices'
// Size, by ref.Devices: see Table.Sizes).
//
// f never gets more than ref.Size bytes, and is not to be used after an error.
// It isn't synced.
func (ref MetadataRef) Unpack(ctx context.Context, src blob.Source, f MetadataFile, sizes []int64) error {
	if err := ref.unpack(ctx, src, f); err != nil {
		return fmt.Errorf("metadata %s: %w", ref.Blob.Digest, err)
	}
	fs, err := erofs.Open(f, ref.Size)
	if err != nil {
		return fmt.Errorf("metadata %s: %w", ref.Blob.Digest, err)
	}
	if _, err := fs.Check(ctx, erofs.Limits{Size: MaxMetadataSize, Devices: sizes}); err != nil {
		return fmt.Errorf("metadata %s: %w", ref.Blob.Digest, err)
	}
	return nil
}

// unpack decompresses and compares sizes and digests.
func (ref MetadataRef) unpack(ctx context.Context, src blob.Source, w io.Writer) error {
	if ref.Size <= 0 || ref.Size > MaxMetadataSize {
		return fmt.Errorf("size %d is not in 1..%d", ref.Size, MaxMetadataSize)
	}
	r, err := src.ReadRange(ctx, 0, ref.Blob.Size)
	if err != nil {
		return err
	}
	defer r.Close()
	verified := oci.VerifyReader(r, ref.Blob)
	dec, err := zstd.NewReader(verified, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(MaxMetadataSize))
	if err != nil {
		return fmt.Errorf("zstd decoder: %w", err)
	}
	defer dec.Close()
	hash := sha256.New()
	n, err := io.Copy(io.MultiWriter(w, hash), io.LimitReader(dec, ref.Size))
	if err != nil {
		return fmt.Errorf("after %d bytes of the EROFS image: %w", n, err)
	}
	if n != ref.Size {
		return fmt.Errorf("EROFS image has %d bytes, the manifest says %d", n, ref.Size)
	}
	// The decoder's end is the blob's end, and that is where its digest is
	// compared.
	if extra, err := io.Copy(io.Discard, io.LimitReader(dec, 1)); err != nil {
		return err
	} else if extra != 0 {
		return fmt.Errorf("EROFS image has more than the %d bytes that the manifest says", ref.Size)
	}
	if got := digestOf(hash); got != ref.Digest {
		return fmt.Errorf("EROFS image has digest %s, the manifest says %s", got, ref.Digest)
	}
	return nil
}
