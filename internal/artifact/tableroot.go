package artifact

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"sluice/internal/blob"
	"sluice/oci"
)

// The root of a chunk table, little-endian; see docs/format.md, "Chunk table".
const (
	tableMagic   = "SLUICECT"
	tableVersion = 1

	rootHeaderSize  = 8 + 4 + 4                // magic, version, devices
	deviceEntrySize = 32 + 32 + 8 + 8 + 4 + 4  // diff ID, blob digest, blob size, content size, chunks, flags
	pageEntrySize   = pageKeySize + 8          // what the key covers, offset in the table
	pageKeySize     = 32 + 8 + 8               // digest, first offset in the device, first offset in the blob
	flagSparse      = 1                        // the device holds expanded sparse members
	maxContentSize  = 1 << 46                  // 64 TiB: no sum of offsets can overflow
	keyPrefix       = "sluice device key v1\n" // what a device key hashes first, so that it's the hash of nothing else
)

// TableRef says where a chunk table is and what verifies it.
type TableRef struct {
	// Blob is the table's blob: the root, then the pages.
	Blob oci.Descriptor

	// RootDigest is the SHA-256 of the first RootSize bytes. The pages' digests
	// are in the root, so any part of the table is verified without the rest.
	RootDigest oci.Digest
	RootSize   int64
}

// OpenTable reads the table's root from src, which must have the table's blob,
// and verifies it. A small table is read whole, in one request, and what is good
// of it not again until it's forgotten; other pages are read from src as they are
// needed, for as long as the Table is used.
func OpenTable(ctx context.Context, ref TableRef, src blob.Source) (*Table, error) {
	if err := ref.check(); err != nil {
		return nil, err
	}
	n := ref.RootSize
	if ref.Blob.Size <= wholeTable {
		n = ref.Blob.Size
	}
	content := make([]byte, n)
	if err := blob.ReadFull(ctx, src, content, 0); err != nil {
		return nil, fmt.Errorf("chunk table %s: reading its root: %w", ref.Blob.Digest, err)
	}
	root := content[:ref.RootSize]
	if got := oci.DigestOf(root); got != ref.RootDigest {
		return nil, fmt.Errorf("chunk table %s: its root of %d bytes has digest %s, the manifest says %s", ref.Blob.Digest, len(root), got, ref.RootDigest)
	}
	t, err := parseRoot(root, ref.Blob.Size, src)
	if err != nil {
		return nil, fmt.Errorf("chunk table %s: %w", ref.Blob.Digest, err)
	}
	if n == ref.Blob.Size {
		t.take(content)
	}
	return t, nil
}

// take loads all pages from the table's content. One that isn't good is read
// again, and reported, when it's needed.
func (t *Table) take(content []byte) {
	for _, d := range t.Devices {
		for _, p := range d.pages {
			own := content[p.offset:][:p.n*chunkEntrySize]
			if sha256.Sum256(own) != p.digest {
				continue
			}
			if chunks, err := p.parse(own); err == nil {
				p.chunks.Store(&chunks)
			}
		}
	}
}

// check returns an error if the reference can't be one.
func (ref TableRef) check() error {
	switch {
	case ref.RootDigest.Validate() != nil || ref.RootDigest.Algorithm() != oci.SHA256:
		return fmt.Errorf("chunk table %s: root digest %q is not a sha256 digest", ref.Blob.Digest, ref.RootDigest)
	case ref.RootSize < rootHeaderSize || ref.RootSize > MaxRootSize:
		return fmt.Errorf("chunk table %s: root size %d is not in %d..%d", ref.Blob.Digest, ref.RootSize, rootHeaderSize, MaxRootSize)
	case ref.Blob.Size < ref.RootSize || ref.Blob.Size > MaxTableSize:
		return fmt.Errorf("chunk table %s: size %d is not in %d..%d", ref.Blob.Digest, ref.Blob.Size, ref.RootSize, int64(MaxTableSize))
	}
	return nil
}

// parseRoot parses the root of a table of tableSize bytes. Its pages will be
// read from src.
func parseRoot(root []byte, tableSize int64, src blob.Source) (*Table, error) {
	if len(root) < rootHeaderSize || string(root[:8]) != tableMagic {
		return nil, fmt.Errorf("root doesn't begin with %q", tableMagic)
	}
	if v := binary.LittleEndian.Uint32(root[8:]); v != tableVersion {
		return nil, fmt.Errorf("version %d is unknown, only %d is known: a newer sluice made it", v, tableVersion)
	}
	count := binary.LittleEndian.Uint32(root[12:])
	if count > MaxDevices {
		return nil, fmt.Errorf("root has %d devices, %d are allowed", count, MaxDevices)
	}
	t := &Table{}
	rest := root[rootHeaderSize:]
	for i := range int(count) {
		d, n, err := parseDevice(rest, int64(len(root)), tableSize, src)
		if err != nil {
			return nil, fmt.Errorf("device %d: %w", i, err)
		}
		t.Devices = append(t.Devices, d)
		rest = rest[n:]
	}
	if len(rest) != 0 {
		return nil, fmt.Errorf("root has %d bytes after its last device", len(rest))
	}
	return t, nil
}

// parseDevice parses the device that b begins with and returns how long its
// entry is.
func parseDevice(b []byte, rootSize, tableSize int64, src blob.Source) (*Device, int, error) {
	if len(b) < deviceEntrySize {
		return nil, 0, fmt.Errorf("root ends within its entry")
	}
	le := binary.LittleEndian
	contentSize, blobSize := le.Uint64(b[72:]), le.Uint64(b[64:])
	chunks, flags := le.Uint32(b[80:]), le.Uint32(b[84:])
	if contentSize > maxContentSize || blobSize > maxContentSize {
		return nil, 0, fmt.Errorf("content of %d bytes in a blob of %d: %d are allowed", contentSize, blobSize, int64(maxContentSize))
	}
	if flags&^flagSparse != 0 {
		return nil, 0, fmt.Errorf("flags %#x are unknown", flags)
	}
	if chunks > MaxChunks {
		return nil, 0, fmt.Errorf("%d chunks: %d are allowed", chunks, MaxChunks)
	}
	// 64-bit, and bounded by the root's size before anything is allocated.
	pages := (int64(chunks) + ChunksPerPage - 1) / ChunksPerPage
	if pages*pageEntrySize > int64(len(b)-deviceEntrySize) {
		return nil, 0, fmt.Errorf("root ends within its %d pages", pages)
	}
	d := &Device{
		DiffID: oci.Digest(fmt.Sprintf("sha256:%x", b[:32])),
		Sparse: flags&flagSparse != 0,
		Blob: oci.Descriptor{
			MediaType: MediaTypeLayer,
			Digest:    oci.Digest(fmt.Sprintf("sha256:%x", b[32:64])),
			Size:      int64(blobSize),
		},
		ContentSize: int64(contentSize),
		Size:        (int64(contentSize) + 511) &^ 511,
		Chunks:      int(chunks),
		src:         src,
	}
	if d.Sparse {
		d.Blob.MediaType = MediaTypeSparse
	}
	key := sha256.New()
	key.Write([]byte(keyPrefix))
	key.Write(b[:deviceEntrySize])
	for i := range int(pages) {
		e := b[deviceEntrySize+i*pageEntrySize:][:pageEntrySize]
		key.Write(e[:pageKeySize])
		p, err := parsePage(e, min(ChunksPerPage, d.Chunks-i*ChunksPerPage), rootSize, tableSize)
		if err != nil {
			return nil, 0, fmt.Errorf("page %d: %w", i, err)
		}
		p.first = i * ChunksPerPage
		d.pages = append(d.pages, p)
	}
	d.Key = oci.Digest(fmt.Sprintf("sha256:%x", key.Sum(nil)))
	if err := d.adjoin(); err != nil {
		return nil, 0, err
	}
	return d, deviceEntrySize + int(pages)*pageEntrySize, nil
}

// parsePage parses a page entry of n chunks.
func parsePage(e []byte, n int, rootSize, tableSize int64) (*page, error) {
	le := binary.LittleEndian
	begin, blobBegin, offset := le.Uint64(e[32:]), le.Uint64(e[40:]), le.Uint64(e[48:])
	if begin > maxContentSize || blobBegin > maxContentSize {
		return nil, fmt.Errorf("begins at %d of the device and %d of the blob: %d are allowed", begin, blobBegin, int64(maxContentSize))
	}
	size := uint64(n * chunkEntrySize)
	if offset < uint64(rootSize) || offset > uint64(tableSize) || uint64(tableSize)-offset < size {
		return nil, fmt.Errorf("%d bytes at %d are outside the table's pages, %d to %d", size, offset, rootSize, tableSize)
	}
	p := &page{n: n, offset: int64(offset), begin: int64(begin), blobBegin: int64(blobBegin), loading: make(chan struct{}, 1)}
	copy(p.digest[:], e)
	p.loading <- struct{}{}
	return p, nil
}

// adjoin sets each page's ends to the next one's beginnings and checks that
// they follow each other from nothing to the whole device and blob.
func (d *Device) adjoin() error {
	if d.Chunks == 0 && (d.ContentSize != 0 || d.Blob.Size != 0) {
		return fmt.Errorf("no chunks for %d bytes in a blob of %d", d.ContentSize, d.Blob.Size)
	}
	for i, p := range d.pages {
		p.end, p.blobEnd = d.ContentSize, d.Blob.Size
		if i+1 < len(d.pages) {
			p.end, p.blobEnd = d.pages[i+1].begin, d.pages[i+1].blobBegin
		}
		if i == 0 && (p.begin != 0 || p.blobBegin != 0) {
			return fmt.Errorf("its first page begins at %d of the device and %d of the blob", p.begin, p.blobBegin)
		}
		n := int64(p.n)
		if l := p.end - p.begin; l < n || l > n*MaxChunkLength {
			return fmt.Errorf("page %d: %d chunks can't have %d bytes", i, n, l)
		}
		if l := p.blobEnd - p.blobBegin; l < n || l > n*MaxFrameLength {
			return fmt.Errorf("page %d: %d frames can't have %d bytes", i, n, l)
		}
	}
	return nil
}

// parse parses the page's content, whose digest has been verified and whose
// length is p.n entries.
func (p *page) parse(content []byte) ([]chunkEntry, error) {
	chunks := make([]chunkEntry, p.n)
	var end, blobEnd uint32
	for i := range chunks {
		e := content[i*chunkEntrySize:][:chunkEntrySize]
		length, blobLength := binary.LittleEndian.Uint32(e), binary.LittleEndian.Uint32(e[4:])
		if length == 0 || length > MaxChunkLength || blobLength == 0 || blobLength > MaxFrameLength {
			return nil, fmt.Errorf("chunk %d: %d bytes in a frame of %d", p.first+i, length, blobLength)
		}
		end += length
		blobEnd += blobLength
		chunks[i] = chunkEntry{end: end, blobEnd: blobEnd, digest: [sha256.Size]byte(e[8:])}
	}
	if offset, blobOffset := p.begin+int64(end), p.blobBegin+int64(blobEnd); offset != p.end || blobOffset != p.blobEnd {
		return nil, fmt.Errorf("its chunks end at %d of the device and %d of the blob, the root says %d and %d", offset, blobOffset, p.end, p.blobEnd)
	}
	return chunks, nil
}
