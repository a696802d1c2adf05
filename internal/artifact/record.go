package artifact

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"

	"sluice/internal/layer"
	"sluice/oci"
)

// recordMagic begins a record. Its number changes with the record's form, and
// whenever EncodeLayer makes other blobs of a tar than before.
const recordMagic = "sluice layer 1\n"

// Bounds of a record. The tree's are those of layer.Limits.
const (
	maxRecordNodes   = 4<<20 + 1 // the root
	maxRecordStrings = 512 << 20 // bytes of all strings
	maxRecordString  = 64 << 10
	maxRecordDepth   = 2048 + 1
	maxRecordDevice  = 1 << 46 // bytes of a device, decoded or not
)

// WriteLayer writes a record of a converted layer, from which ReadLayer makes it
// again without its tar. The record depends on the layer alone. It takes about
// 40 bytes per chunk and a few dozen per file.
func WriteLayer(w io.Writer, l *Layer) error {
	z, err := zstd.NewWriter(w, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithWindowSize(1<<20), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return err
	}
	e := &recordWriter{w: bufio.NewWriter(z), ids: make(map[*layer.Node]uint64)}
	e.raw(recordMagic)
	e.text(l.DiffID.String())
	e.number(uint64(l.Tree.Entries))
	e.device(&l.Tar)
	e.flag(l.Sparse != nil)
	if l.Sparse != nil {
		e.device(l.Sparse)
	}
	e.node(l.Tree.Root)
	return errors.Join(e.err, e.w.Flush(), z.Close())
}

// recordWriter writes the parts of a record, until one can't be written.
type recordWriter struct {
	w   *bufio.Writer
	ids map[*layer.Node]uint64 // of the nodes written, from 1
	err error
}

func (e *recordWriter) raw(s string) {
	if e.err == nil {
		_, e.err = e.w.WriteString(s)
	}
}

func (e *recordWriter) number(n uint64) {
	e.raw(string(binary.AppendUvarint(nil, n)))
}

func (e *recordWriter) flag(b bool) {
	if b {
		e.number(1)
	} else {
		e.number(0)
	}
}

func (e *recordWriter) text(s string) {
	e.number(uint64(len(s)))
	e.raw(s)
}

func (e *recordWriter) device(d *DeviceData) {
	e.text(d.DiffID.String())
	e.number(uint64(d.Size))
	e.text(d.Blob.Digest.String())
	e.number(uint64(d.Blob.Size))
	e.number(uint64(d.Chunks()))
	if e.err == nil {
		_, e.err = e.w.Write(d.Entries)
	}
}

// node writes a node with all below it.
func (e *recordWriter) node(n *layer.Node) {
	e.ids[n] = uint64(len(e.ids) + 1)
	e.flag(n.Implicit)
	e.flag(n.Opaque)
	for _, v := range []uint64{
		uint64(n.Mode), uint64(n.UID), uint64(n.GID), uint64(n.Mtime), uint64(n.MtimeNsec), uint64(n.Size), uint64(n.Major), uint64(n.Minor),
	} {
		e.number(v)
	}
	e.text(n.Target)
	e.text(n.LowerLink)
	e.number(uint64(len(n.Xattrs)))
	for _, name := range slices.Sorted(maps.Keys(n.Xattrs)) {
		e.text(name)
		e.text(n.Xattrs[name])
	}
	e.number(uint64(len(n.Extents)))
	for _, x := range n.Extents {
		e.flag(x.Sparse)
		e.number(uint64(x.Offset))
		e.number(uint64(x.Length))
		e.number(uint64(x.FileOffset))
	}
	e.number(uint64(len(n.Children)))
	for _, name := range n.Names() {
		child := n.Children[name]
		e.text(name)
		e.number(e.ids[child]) // 0: it follows
		if e.ids[child] == 0 {
			e.node(child)
		}
	}
}

// ReadLayer reads what WriteLayer wrote, to the end. Content that WriteLayer
// can't have written is an error, and so is damage, of which the record has a
// checksum: not against somebody who wants to deceive.
func ReadLayer(r io.Reader) (*Layer, error) {
	z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return nil, err
	}
	defer z.Close()
	d := &recordReader{r: bufio.NewReader(z)}
	l := d.layer()
	if d.err == nil {
		if _, err := d.r.ReadByte(); err != io.EOF { // where the checksum is compared
			d.fail("it goes on after its end: %v", err)
		}
	}
	if d.err != nil {
		return nil, fmt.Errorf("record of a converted layer: %w", d.err)
	}
	return l, nil
}

// recordReader reads the parts of a record. After an error it reads zeros.
type recordReader struct {
	r       *bufio.Reader
	nodes   []*layer.Node // by id, less 1
	strings int
	tar     int64 // sizes of the devices
	sparse  int64
	err     error
}

func (d *recordReader) fail(format string, args ...any) {
	if d.err == nil {
		d.err = fmt.Errorf(format, args...)
	}
}

func (d *recordReader) number(most uint64) uint64 {
	if d.err != nil {
		return 0
	}
	n, err := binary.ReadUvarint(d.r)
	if err != nil {
		d.fail("%w", err)
		return 0
	}
	if n > most {
		d.fail("%d where at most %d can be", n, most)
		return 0
	}
	return n
}

func (d *recordReader) flag() bool { return d.number(1) == 1 }

func (d *recordReader) text() string {
	n := int(d.number(maxRecordString))
	if d.strings += n; d.strings > maxRecordStrings {
		d.fail("more than %d bytes of text", maxRecordStrings)
	}
	return string(d.bytes(n))
}

// bytes reads n bytes, and takes no more memory than there are.
func (d *recordReader) bytes(n int) []byte {
	if d.err != nil || n == 0 {
		return nil
	}
	var b []byte
	for len(b) < n && d.err == nil {
		at := len(b)
		b = append(b, make([]byte, min(n-at, 1<<20))...)
		if _, err := io.ReadFull(d.r, b[at:]); err != nil {
			d.fail("%w", err)
		}
	}
	return b
}

func (d *recordReader) digest() oci.Digest {
	digest := oci.Digest(d.text())
	if _, err := rawDigest(digest); err != nil && d.err == nil {
		d.err = err
	}
	return digest
}

func (d *recordReader) layer() *Layer {
	if magic := d.bytes(len(recordMagic)); d.err == nil && string(magic) != recordMagic {
		d.fail("it begins with %q, not with %q: another version wrote it", magic, recordMagic)
	}
	l := &Layer{DiffID: d.digest(), Tree: new(layer.Tree)}
	l.Tree.Entries = int(d.number(1 << 40))
	l.Tar = d.device(MediaTypeLayer)
	l.Tree.Size, d.tar = l.Tar.Size, l.Tar.Size
	if d.flag() {
		sparse := d.device(MediaTypeSparse)
		l.Sparse = &sparse
		l.Tree.SparseSize, d.sparse = sparse.Size, sparse.Size
	}
	l.Tree.Root = d.node(0)
	if d.err == nil && (!l.Tree.Root.IsDir() || l.DiffID != l.Tar.DiffID) {
		d.fail("its root is no directory, or its diff IDs differ")
	}
	return l
}

func (d *recordReader) device(mediaType string) DeviceData {
	dev := DeviceData{DiffID: d.digest(), Size: int64(d.number(maxRecordDevice))}
	dev.Blob = oci.Descriptor{MediaType: mediaType, Digest: d.digest(), Size: int64(d.number(maxRecordDevice))}
	dev.Entries = d.bytes(int(d.number(MaxChunks)) * chunkEntrySize)
	var size, blob int64
	for rest := dev.Entries; len(rest) >= chunkEntrySize && d.err == nil; rest = rest[chunkEntrySize:] {
		size += int64(binary.LittleEndian.Uint32(rest))
		blob += int64(binary.LittleEndian.Uint32(rest[4:]))
	}
	if d.err == nil && (size != dev.Size || blob != dev.Blob.Size) {
		d.fail("chunks of %d bytes in %d, of a device of %d in %d", size, blob, dev.Size, dev.Blob.Size)
	}
	return dev
}

func (d *recordReader) node(depth int) *layer.Node {
	n := new(layer.Node)
	if d.nodes = append(d.nodes, n); len(d.nodes) > maxRecordNodes || depth > maxRecordDepth {
		d.fail("more than %d files, or %d directories deep", maxRecordNodes, maxRecordDepth)
	}
	n.Implicit, n.Opaque = d.flag(), d.flag()
	const word = 1<<32 - 1
	n.Mode, n.UID, n.GID = uint32(d.number(word)), uint32(d.number(word)), uint32(d.number(word))
	n.Mtime, n.MtimeNsec = int64(d.number(1<<63-1)), uint32(d.number(1e9-1))
	n.Size = int64(d.number(1<<63 - 1))
	n.Major, n.Minor = uint32(d.number(1<<12-1)), uint32(d.number(1<<20-1))
	n.Target, n.LowerLink = d.text(), d.text()
	for range d.number(maxRecordString) {
		if n.Xattrs == nil {
			n.Xattrs = make(map[string]string)
		}
		name := d.text()
		if n.Xattrs[name] = d.text(); d.err != nil {
			return n
		}
	}
	d.extents(n)
	d.children(n, depth)
	return n
}

func (d *recordReader) extents(n *layer.Node) {
	end := int64(0)
	for range d.number(maxRecordDevice / 512) {
		x := layer.Extent{Sparse: d.flag(), Offset: int64(d.number(maxRecordDevice)), Length: int64(d.number(maxRecordDevice)), FileOffset: int64(d.number(1<<63 - 1))}
		device := d.tar
		if x.Sparse {
			device = d.sparse
		}
		if d.err != nil {
			return
		}
		if x.Length <= 0 || x.Offset%512 != 0 || x.FileOffset%512 != 0 || x.FileOffset < end || x.Length > n.Size-x.FileOffset || x.Length > device-x.Offset {
			d.fail("an extent %+v of a file of %d bytes on a device of %d", x, n.Size, device)
			return
		}
		end = x.FileOffset + x.Length
		n.Extents = append(n.Extents, x)
	}
}

func (d *recordReader) children(n *layer.Node, depth int) {
	count := d.number(maxRecordNodes)
	if count > 0 && !n.IsDir() {
		d.fail("something in what is no directory")
		return
	}
	for range count {
		name, id := d.text(), d.number(uint64(len(d.nodes)))
		if d.err != nil {
			return
		}
		if name == "" || name == "." || name == ".." || len(name) > 255 || strings.ContainsAny(name, "/\x00") || n.Children[name] != nil {
			d.fail("the name %.300q, which can't be one, or is there twice", name)
			return
		}
		var child *layer.Node
		if id == 0 {
			child = d.node(depth + 1)
		} else if child = d.nodes[id-1]; child.IsDir() {
			d.fail("a second name of a directory")
		}
		if n.Children == nil {
			n.Children = make(map[string]*layer.Node)
		}
		n.Children[name] = child
	}
}
