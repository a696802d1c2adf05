package artifact

import (
	"context"
	"crypto/sha256"
	"fmt"
	"slices"
	"sort"
	"sync/atomic"

	"sluice/internal/blob"
	"sluice/oci"
)

// Limits of a chunk table. They bound memory; an image that needs more is
// refused at conversion, and a table that claims more is refused at opening.
const (
	// MaxDevices bounds the devices of an image: every layer has one or two.
	MaxDevices = 1024

	// MaxChunks bounds the chunks of a device: 512 GiB at the least. It's also
	// what ends the conversion of a layer that never stops decompressing.
	MaxChunks = 1 << 22

	// ChunksPerPage is how many chunks a full page has. Every page of a
	// device is full but the last.
	ChunksPerPage = 1024

	// MaxRootSize bounds the root, in bytes: 2 TiB of image at the least. A
	// root is all that it takes to claim chunks, and a node reserves some bytes
	// of memory and disk for each before it has seen one, so this also bounds
	// what a hostile artifact can make it reserve: 19 million chunks.
	MaxRootSize = 1 << 20

	// MaxTableSize bounds the chunk table's blob, in bytes: more than the pages
	// of the largest root.
	MaxTableSize = 1 << 30

	// wholeTable is up to what size a table is fetched in one request.
	wholeTable = 512 << 10
)

// Table is an opened chunk table. It may be used concurrently.
type Table struct {
	// Devices are the image's data devices, by device number: each layer's
	// tar and directly after it the layer's sparse device if it has one.
	Devices []*Device
}

// Device is one data device: content that is cut into chunks which lie in a
// blob. It may be used concurrently.
type Device struct {
	// Key identifies the content: two devices of any two artifacts that have
	// the same Key have the same chunks, bit for bit, because it's the SHA-256
	// of everything the root says of the device, page digests included, but not
	// where in the table the pages lie.
	Key oci.Digest

	// DiffID is the SHA-256 of the ContentSize decoded bytes. For a layer's tar
	// that is the layer's diff ID. It's what the artifact claims; who trusts
	// the image config compares.
	DiffID oci.Digest

	// Sparse tells a device of expanded sparse members from a tar.
	Sparse bool

	// Blob has the media type, digest and size of the blob with the chunks.
	Blob oci.Descriptor

	// ContentSize is how many bytes the chunks decode to. Size, the size of
	// the device, is the same rounded up to a multiple of 512; the bytes
	// between, which no chunk has, are zero.
	ContentSize int64
	Size        int64

	// Chunks is how many chunks there are; zero for an empty device.
	Chunks int

	pages []*page
	src   blob.Source
}

// page is a page of the chunk table, loaded when needed.
type page struct {
	digest     [sha256.Size]byte
	offset     int64 // in the table's blob
	first, n   int   // the chunks it has
	begin, end int64 // their part of the device
	blobBegin  int64 // their part of the blob
	blobEnd    int64
	stored     bool          // Chunk.Stored of all its chunks
	loading    chan struct{} // holds a token while nobody loads the page
	chunks     atomic.Pointer[[]chunkEntry]
}

// chunkEntry is a chunk of a page in memory, in no more bytes than the table has for
// it: a node has the tables of all its images. The chunk begins where the one
// before it ends.
type chunkEntry struct {
	end, blobEnd uint32 // from where the page begins; ChunksPerPage of the longest fit
	digest       [sha256.Size]byte
}

// chunk returns chunk i, counted from the page's first, of the page's chunks.
func (p *page) chunk(chunks []chunkEntry, i int) Chunk {
	var begin, blobBegin uint32
	if i > 0 {
		begin, blobBegin = chunks[i-1].end, chunks[i-1].blobEnd
	}
	c := &chunks[i]
	return Chunk{
		Offset: p.begin + int64(begin), Length: c.end - begin,
		BlobOffset: p.blobBegin + int64(blobBegin), BlobLength: c.blobEnd - blobBegin,
		Digest: c.digest, Stored: p.stored,
	}
}

// Sizes returns the sizes of the devices with the given numbers, which must
// exist.
func (t *Table) Sizes(numbers []int) []int64 {
	sizes := make([]int64, len(numbers))
	for i, n := range numbers {
		sizes[i] = t.Devices[n].Size
	}
	return sizes
}

// Find returns the index of the chunk that has the device's byte off. Beyond
// ContentSize there's none, which is an error. It loads one page if that
// hasn't been loaded yet.
func (d *Device) Find(ctx context.Context, off int64) (int, error) {
	if off < 0 || off >= d.ContentSize {
		return 0, fmt.Errorf("device %s: offset %d is outside its content of %d bytes", d.Key, off, d.ContentSize)
	}
	p := d.pages[sort.Search(len(d.pages), func(i int) bool { return d.pages[i].end > off })]
	chunks, err := d.load(ctx, p)
	if err != nil {
		return 0, err
	}
	i := sort.Search(len(chunks), func(i int) bool { return p.begin+int64(chunks[i].end) > off })
	return p.first + i, nil
}

// read reads a page's content and verifies it. What arrives damaged is asked for
// once more, elsewhere if the source knows of elsewhere. That isn't done for what
// the source finds wrong before it has any content: it has asked elsewhere itself
// then, and to repeat it here would double the requests to a registry in trouble.
func (d *Device) read(ctx context.Context, p *page) ([]byte, error) {
	content := make([]byte, p.n*chunkEntrySize)
	var got [sha256.Size]byte
	for range 2 {
		if err := blob.ReadFull(ctx, d.src, content, p.offset); err != nil {
			return nil, fmt.Errorf("chunk table of device %s: reading its page at %d: %w", d.Key, p.offset, err)
		}
		if got = sha256.Sum256(content); got == p.digest {
			return content, nil
		}
		ctx = blob.Doubt(ctx)
	}
	return nil, oci.ErrDigestInvalid.Withf("chunk table of device %s: page at %d has SHA-256 %x, the root says %x", d.Key, p.offset, got, p.digest)
}

// Chunk returns chunk i, 0 <= i < Chunks. It loads one page of the table if
// that hasn't been loaded yet; the context bounds that. A page that isn't what
// the root promises is an error, and is asked for again the next time.
//
// Consecutive chunks adjoin in the device and in the blob: the first begins at
// 0 of both, the last ends at ContentSize and at Blob.Size.
func (d *Device) Chunk(ctx context.Context, i int) (Chunk, error) {
	if i < 0 || i >= d.Chunks {
		return Chunk{}, fmt.Errorf("device %s: chunk %d is outside its %d chunks", d.Key, i, d.Chunks)
	}
	p := d.pages[i/ChunksPerPage]
	chunks, err := d.load(ctx, p)
	if err != nil {
		return Chunk{}, err
	}
	return p.chunk(chunks, i-p.first), nil
}

// Loaded reports whether all of the device's pages are in memory, so that its
// source isn't read, unless they are forgotten.
func (d *Device) Loaded() bool {
	return !slices.ContainsFunc(d.pages, func(p *page) bool { return p.chunks.Load() == nil })
}

// Load loads all pages, so that Find and Chunk don't wait, unless the pages are
// forgotten.
func (d *Device) Load(ctx context.Context) error {
	for _, p := range d.pages {
		if _, err := d.load(ctx, p); err != nil {
			return err
		}
	}
	return nil
}

// Forget gives back the memory of all pages, which are read and verified again
// when they are needed: that takes 0.1 to 0.2 ms each where the table is on a local
// disk.
func (t *Table) Forget() {
	for _, d := range t.Devices {
		for _, p := range d.pages {
			p.chunks.Store(nil)
		}
	}
}

// load returns the chunks of p. One caller reads; if it fails or is canceled,
// the next one tries.
func (d *Device) load(ctx context.Context, p *page) ([]chunkEntry, error) {
	if c := p.chunks.Load(); c != nil {
		return *c, nil
	}
	if ctx.Err() != nil { // of who asks only for what is loaded
		return nil, fmt.Errorf("chunk table of device %s: its page at %d isn't loaded: %w", d.Key, p.offset, context.Cause(ctx))
	}
	select {
	case <-p.loading:
		defer func() { p.loading <- struct{}{} }()
	case <-ctx.Done():
		return nil, fmt.Errorf("chunk table of device %s: waiting for its page at %d: %w", d.Key, p.offset, context.Cause(ctx))
	}
	if c := p.chunks.Load(); c != nil {
		return *c, nil
	}
	content, err := d.read(ctx, p)
	if err != nil {
		return nil, err
	}
	chunks, err := p.parse(content)
	if err != nil {
		return nil, fmt.Errorf("chunk table of device %s: page at %d: %w", d.Key, p.offset, err)
	}
	p.chunks.Store(&chunks)
	return chunks, nil
}
