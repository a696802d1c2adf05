package artifact

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/blob"
	"sluice/oci"
)

// fakeDevice returns a device of n chunks whose lengths and digests are made up.
func fakeDevice(seed uint64, n int, mediaType string) *DeviceData {
	r := rand.New(rand.NewPCG(seed, 1))
	d := &DeviceData{
		DiffID: oci.DigestOf(fmt.Appendf(nil, "diff %d", seed)),
		Blob:   oci.Descriptor{MediaType: mediaType, Digest: oci.DigestOf(fmt.Appendf(nil, "blob %d", seed))},
	}
	for i := range n {
		c := Chunk{
			Length: 1 + r.Uint32N(MaxChunkLength), BlobLength: 1 + r.Uint32N(MaxFrameLength),
			Digest: sha256.Sum256(fmt.Appendf(nil, "%d %d", seed, i)),
		}
		d.Entries = appendChunkEntry(d.Entries, c)
		d.Size += int64(c.Length)
		d.Blob.Size += int64(c.BlobLength)
	}
	return d
}

// encodedTable returns a table's blob and the reference to it.
func encodedTable(t testing.TB, devices ...*DeviceData) ([]byte, TableRef) {
	t.Helper()
	root, pages, err := encodeTable(devices)
	if err != nil {
		t.Fatal(err)
	}
	content := append(bytes.Clone(root), pages...)
	return content, refOf(content, len(root))
}

// refOf returns the reference to a table with a root of the given size.
func refOf(content []byte, rootSize int) TableRef {
	return TableRef{
		Blob:       oci.Descriptor{MediaType: MediaTypeTable, Digest: oci.DigestOf(content), Size: int64(len(content))},
		RootDigest: oci.DigestOf(content[:min(rootSize, len(content))]),
		RootSize:   int64(rootSize),
	}
}

func TestTableSaysWhatWasEncoded(t *testing.T) {
	// The last makes the table too big to be fetched whole.
	for _, sizes := range [][]int{{0}, {1}, {ChunksPerPage}, {ChunksPerPage + 1, 0, 3*ChunksPerPage - 1}, {20000, 5}} {
		t.Run(fmt.Sprint(sizes), func(t *testing.T) {
			var devices []*DeviceData
			for i, n := range sizes {
				devices = append(devices, fakeDevice(uint64(i), n, []string{MediaTypeLayer, MediaTypeSparse}[i%2]))
			}
			content, ref := encodedTable(t, devices...)
			table, err := OpenTable(t.Context(), ref, blob.FromBytes(content))
			if err != nil {
				t.Fatal(err)
			}
			if len(table.Devices) != len(devices) {
				t.Fatalf("got %d devices, want %d", len(table.Devices), len(devices))
			}
			for i, d := range table.Devices {
				checkDevice(t, d, devices[i])
			}
		})
	}
}

// checkDevice compares a device with what it was encoded from.
func checkDevice(t *testing.T, got *Device, want *DeviceData) {
	t.Helper()
	ctx := t.Context()
	if got.DiffID != want.DiffID || got.ContentSize != want.Size || got.Chunks != want.Chunks() ||
		got.Sparse != (want.Blob.MediaType == MediaTypeSparse) {
		t.Fatalf("got %+v, want %+v", got, want)
	}
	if diff := cmp.Diff(want.Blob, got.Blob); diff != "" {
		t.Error(diff)
	}
	if got.Size%512 != 0 || got.Size < got.ContentSize || got.Size >= got.ContentSize+512 {
		t.Errorf("size %d for %d bytes", got.Size, got.ContentSize)
	}
	var offset, blobOffset int64
	for i := range got.Chunks {
		c, err := got.Chunk(ctx, i)
		if err != nil {
			t.Fatal(err)
		}
		if entry := appendChunkEntry(nil, c); !bytes.Equal(entry, want.Entries[i*chunkEntrySize:][:chunkEntrySize]) || c.Offset != offset || c.BlobOffset != blobOffset {
			t.Fatalf("chunk %d is %+v, want it at %d and %d with entry %x", i, c, offset, blobOffset, want.Entries[i*chunkEntrySize:][:chunkEntrySize])
		}
		for _, off := range []int64{c.Offset, c.Offset + int64(c.Length) - 1} {
			if found, err := got.Find(ctx, off); found != i || err != nil {
				t.Fatalf("Find(%d) = %d, %v, want %d", off, found, err, i)
			}
		}
		offset += int64(c.Length)
		blobOffset += int64(c.BlobLength)
	}
	for _, off := range []int64{-1, got.ContentSize, got.ContentSize + 1<<40} {
		if i, err := got.Find(ctx, off); err == nil {
			t.Errorf("Find(%d) = %d, want an error", off, i)
		}
	}
	for _, i := range []int{-1, got.Chunks} {
		if c, err := got.Chunk(ctx, i); err == nil {
			t.Errorf("Chunk(%d) = %v, want an error", i, c)
		}
	}
}

func TestDeviceKeyIsOfTheDeviceAlone(t *testing.T) {
	a, b := fakeDevice(1, 3000, MediaTypeLayer), fakeDevice(2, 2000, MediaTypeLayer)
	keys := func(devices ...*DeviceData) []oci.Digest {
		content, ref := encodedTable(t, devices...)
		table, err := OpenTable(t.Context(), ref, blob.FromBytes(content))
		if err != nil {
			t.Fatal(err)
		}
		var keys []oci.Digest
		for _, d := range table.Devices {
			keys = append(keys, d.Key)
		}
		return keys
	}
	alone, both, twice := keys(a), keys(b, a), keys(a, a)
	if both[1] != alone[0] || twice[0] != alone[0] || twice[1] != alone[0] {
		t.Errorf("the same device has keys %v, %v, %v", alone, both, twice)
	}
	changed := *a
	changed.Entries = bytes.Clone(a.Entries)
	changed.Entries[2999*chunkEntrySize+chunkEntrySize-1] ^= 1 // one bit of the last digest
	relabelled := *a
	relabelled.DiffID = b.DiffID
	sparse := *a
	sparse.Blob.MediaType = MediaTypeSparse
	seen := map[oci.Digest]bool{alone[0]: true}
	for _, d := range []*DeviceData{b, &changed, &relabelled, &sparse} {
		if k := keys(d)[0]; seen[k] {
			t.Errorf("different devices have the key %s", k)
		} else {
			seen[k] = true
		}
	}
}

// A layer that an image has twice costs its pages once.
func TestEqualPagesAreStoredOnce(t *testing.T) {
	a := fakeDevice(1, 3000, MediaTypeLayer)
	_, once := encodedTable(t, a)
	_, twice := encodedTable(t, a, a)
	if extra, want := twice.Blob.Size-once.Blob.Size, int64(deviceEntrySize+3*pageEntrySize); extra != want {
		t.Errorf("the second time costs %d bytes, want %d", extra, want)
	}
}

func TestTablePagesAreReadOnceWhenNeeded(t *testing.T) {
	content, ref := encodedTable(t, fakeDevice(1, 20000, MediaTypeLayer))
	var n blob.Counter
	table, err := OpenTable(t.Context(), ref, blob.Count(blob.FromBytes(content), &n))
	if err != nil {
		t.Fatal(err)
	}
	if got := n.Bytes.Load(); got != ref.RootSize {
		t.Errorf("opening a big table read %d bytes, want the root's %d", got, ref.RootSize)
	}
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if _, err := table.Devices[0].Chunk(t.Context(), 5000); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got, want := n.Bytes.Load(), ref.RootSize+ChunksPerPage*chunkEntrySize; got != want {
		t.Errorf("16 readers of one page made %d bytes, want %d", got, want)
	}
	if err := table.Devices[0].Load(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := n.Bytes.Load(); got != ref.Blob.Size {
		t.Errorf("all pages made %d bytes, want the table's %d", got, ref.Blob.Size)
	}
}

// What was forgotten is read again when it's needed, and not before.
func TestForgottenPagesAreReadAgain(t *testing.T) {
	data := fakeDevice(1, 3000, MediaTypeLayer)
	content, ref := encodedTable(t, data)
	var n blob.Counter
	table, err := OpenTable(t.Context(), ref, blob.Count(blob.FromBytes(content), &n))
	if err != nil {
		t.Fatal(err)
	}
	d := table.Devices[0]
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	table.Forget()
	before := n.Bytes.Load()
	if _, err := d.Chunk(canceled, 2000); !errors.Is(err, context.Canceled) || d.Loaded() {
		t.Errorf("nobody has read the page again, and its chunk gives %v", err)
	}
	if _, err := d.Chunk(t.Context(), 2000); err != nil {
		t.Error(err)
	}
	if _, err := d.Chunk(canceled, 2001); err != nil {
		t.Errorf("a chunk of a page that has been read again: %v", err)
	}
	if got := n.Bytes.Load() - before; got != ChunksPerPage*chunkEntrySize {
		t.Errorf("%d bytes were read again, a page has %d", got, ChunksPerPage*chunkEntrySize)
	}
	checkDevice(t, d, data)
}

// A page that arrives damaged is an error, and right the next time.
func TestTablePageIsAskedForAgain(t *testing.T) {
	content, ref := encodedTable(t, fakeDevice(1, 20000, MediaTypeLayer))
	damaged := bytes.Clone(content)
	table, err := OpenTable(t.Context(), ref, blob.FromBytes(damaged))
	if err != nil {
		t.Fatal(err)
	}
	damaged[len(damaged)-1] ^= 0x10
	if _, err = table.Devices[0].Chunk(t.Context(), 19999); err == nil || !strings.Contains(err.Error(), "SHA-256") {
		t.Errorf("a damaged page gives %v", err)
	}
	if _, err := table.Devices[0].Chunk(t.Context(), 0); err != nil {
		t.Errorf("another page: %v", err)
	}
	damaged[len(damaged)-1] ^= 0x10
	if _, err := table.Devices[0].Chunk(t.Context(), 19999); err != nil {
		t.Errorf("the page, mended: %v", err)
	}
}

// A source that sends a page wrong is asked once more, and told so.
func TestTablePageOfALiar(t *testing.T) {
	content, ref := encodedTable(t, fakeDevice(1, 20000, MediaTypeLayer))
	damaged := bytes.Clone(content)
	damaged[len(damaged)-1] ^= 0x10
	table, err := OpenTable(t.Context(), ref, liar{blob.FromBytes(damaged), blob.FromBytes(content)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := table.Devices[0].Chunk(t.Context(), 19999); err != nil {
		t.Error(err)
	}
}

// A source that finds out by itself that it is answered with another blob is
// asked once: it has asked elsewhere then.
func TestTablePageOfAnotherBlob(t *testing.T) {
	content, ref := encodedTable(t, fakeDevice(1, 20000, MediaTypeLayer))
	src := &another{Source: blob.FromBytes(content)}
	table, err := OpenTable(t.Context(), ref, src)
	if err != nil {
		t.Fatal(err)
	}
	src.asked, src.wrong = 0, true
	if _, err := table.Devices[0].Chunk(t.Context(), 19999); !errors.Is(err, oci.ErrDigestInvalid) {
		t.Errorf("a page of another blob gives %v", err)
	}
	if src.asked != 1 {
		t.Errorf("the source was asked %d times, want once", src.asked)
	}
}

// another is a source that may be answered with another blob.
type another struct {
	blob.Source
	asked int
	wrong bool
}

func (a *another) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	a.asked++
	if a.wrong {
		return nil, oci.ErrDigestInvalid.Withf("the answer is about another blob")
	}
	return a.Source.ReadRange(ctx, off, n)
}

// liar is a source that tells the truth to those who doubt.
type liar struct {
	blob.Source
	truth blob.Source
}

func (l liar) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	if blob.Doubted(ctx) {
		return l.truth.ReadRange(ctx, off, n)
	}
	return l.Source.ReadRange(ctx, off, n)
}

func TestTableWaitsNoLongerThanTheContext(t *testing.T) {
	content, ref := encodedTable(t, fakeDevice(1, 20000, MediaTypeLayer))
	table, err := OpenTable(t.Context(), ref, blob.FromBytes(content))
	if err != nil {
		t.Fatal(err)
	}
	<-table.Devices[0].pages[0].loading // somebody loads the page, for ever
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := table.Devices[0].Chunk(ctx, 0); err == nil {
		t.Error("got a chunk of a page that nobody could load")
	}
}

// Whatever bit of a table is wrong, somebody notices.
func TestTableNoticesEveryBit(t *testing.T) {
	content, ref := encodedTable(t, fakeDevice(1, 30, MediaTypeLayer), fakeDevice(2, 1, MediaTypeSparse))
	for i := range len(content) * 8 {
		bad := bytes.Clone(content)
		bad[i/8] ^= 1 << (i % 8)
		if err := readTable(t.Context(), bad, ref); err == nil {
			t.Fatalf("bit %d of byte %d is wrong, and nobody noticed", i%8, i/8)
		}
	}
	for i := range content {
		if err := readTable(t.Context(), content[:i], ref); err == nil {
			t.Fatalf("a table of %d bytes was taken for %d", i, len(content))
		}
	}
}

// readTable opens a table and looks at every chunk.
func readTable(ctx context.Context, content []byte, ref TableRef) error {
	table, err := OpenTable(ctx, ref, blob.FromBytes(content))
	if err != nil {
		return err
	}
	for _, d := range table.Devices {
		var offset, blobOffset int64
		for i := range d.Chunks {
			c, err := d.Chunk(ctx, i)
			if err != nil {
				return err
			}
			if c.Offset != offset || c.BlobOffset != blobOffset || c.Length == 0 || c.Length > MaxChunkLength || c.BlobLength == 0 || c.BlobLength > MaxFrameLength {
				panic(fmt.Sprintf("chunk %d is %+v", i, c))
			}
			offset += int64(c.Length)
			blobOffset += int64(c.BlobLength)
		}
		if offset != d.ContentSize || blobOffset != d.Blob.Size {
			panic(fmt.Sprintf("chunks end at %d and %d of %+v", offset, blobOffset, d))
		}
	}
	return nil
}

// A liar can make the root's digest right, but not have his numbers believed.
func TestTableChecksTheRootsNumbers(t *testing.T) {
	content, ref := encodedTable(t, fakeDevice(1, ChunksPerPage+7, MediaTypeLayer))
	const device, page = rootHeaderSize, rootHeaderSize + deviceEntrySize
	le := binary.LittleEndian
	for what, lie := range map[string]func(b []byte){
		"magic":                  func(b []byte) { b[0] = 'X' },
		"version":                func(b []byte) { b[8] = 2 },
		"more devices":           func(b []byte) { b[12] = 2 },
		"no devices":             func(b []byte) { b[12] = 0 },
		"2^32-1 devices":         func(b []byte) { le.PutUint32(b[12:], 1<<32-1) },
		"blob size":              func(b []byte) { le.PutUint64(b[device+64:], 5) },
		"negative blob size":     func(b []byte) { le.PutUint64(b[device+64:], 1<<63) },
		"content size":           func(b []byte) { le.PutUint64(b[device+72:], 1<<45) },
		"negative content size":  func(b []byte) { le.PutUint64(b[device+72:], 1<<64-1) },
		"no chunks":              func(b []byte) { le.PutUint32(b[device+80:], 0) },
		"2^32-1 chunks":          func(b []byte) { le.PutUint32(b[device+80:], 1<<32-1) },
		"2^22+1 chunks":          func(b []byte) { le.PutUint32(b[device+80:], MaxChunks+1) },
		"a page of too many":     func(b []byte) { le.PutUint32(b[device+80:], 2*ChunksPerPage) },
		"flags":                  func(b []byte) { b[device+84] = 2 },
		"first page's offset":    func(b []byte) { b[page+32] = 1 },
		"second page's offset":   func(b []byte) { le.PutUint64(b[page+pageEntrySize+32:], 0) },
		"page beyond the device": func(b []byte) { le.PutUint64(b[page+pageEntrySize+32:], 1<<44) },
		"page beyond 2^63":       func(b []byte) { le.PutUint64(b[page+pageEntrySize+32:], 1<<63) },
		"blob offset":            func(b []byte) { le.PutUint64(b[page+pageEntrySize+40:], 1<<44) },
		"page in the root":       func(b []byte) { le.PutUint64(b[page+48:], 0) },
		"page beyond the table":  func(b []byte) { le.PutUint64(b[page+48:], uint64(len(content)-1)) },
		"page at 2^64-1":         func(b []byte) { le.PutUint64(b[page+48:], 1<<64-1) },
		"pages swapped": func(b []byte) {
			le.PutUint64(b[page+48:], le.Uint64(b[page+48:])+8)
		},
	} {
		t.Run(what, func(t *testing.T) {
			bad := bytes.Clone(content)
			lie(bad)
			err := readTable(t.Context(), bad, refOf(bad, int(ref.RootSize)))
			if err == nil {
				t.Fatal("believed")
			}
			t.Log(err)
		})
	}
}

func TestTableRefIsChecked(t *testing.T) {
	content, good := encodedTable(t, fakeDevice(1, 3, MediaTypeLayer))
	for what, change := range map[string]func(*TableRef){
		"digest":        func(r *TableRef) { r.RootDigest = "sha256:00" },
		"no digest":     func(r *TableRef) { r.RootDigest = "" },
		"other digest":  func(r *TableRef) { r.RootDigest = oci.DigestOf(nil) },
		"zero root":     func(r *TableRef) { r.RootSize = 0 },
		"negative root": func(r *TableRef) { r.RootSize = -1 },
		"huge root":     func(r *TableRef) { r.RootSize, r.Blob.Size = 1<<40, 1<<41 },
		"small blob":    func(r *TableRef) { r.Blob.Size = r.RootSize - 1 },
		"large blob":    func(r *TableRef) { r.Blob.Size++ },
	} {
		ref := good
		change(&ref)
		if _, err := OpenTable(t.Context(), ref, blob.FromBytes(content)); err == nil {
			t.Errorf("%s: no error", what)
		}
	}
}

// What a root alone can make a node reserve, see MaxRootSize; and the largest
// table that it can describe.
func TestLimitsOfRootAndTableFit(t *testing.T) {
	const pages = MaxRootSize / pageEntrySize
	if chunks := pages * ChunksPerPage; chunks > 20e6 || chunks*minChunkLength < 2<<40 {
		t.Errorf("the largest root claims %d chunks", chunks)
	}
	if size := MaxRootSize + pages*ChunksPerPage*chunkEntrySize; size > MaxTableSize {
		t.Errorf("the largest table has %d bytes, %d are allowed", size, MaxTableSize)
	}
	for what, change := range map[string]func(*TableRef){
		"root":  func(r *TableRef) { r.RootSize, r.Blob.Size = MaxRootSize+1, MaxTableSize },
		"table": func(r *TableRef) { r.Blob.Size = MaxTableSize + 1 },
	} {
		_, ref := encodedTable(t, fakeDevice(1, 3, MediaTypeLayer))
		change(&ref)
		if ref.check() == nil {
			t.Errorf("a %s over its limit was taken", what)
		}
	}
}

func TestEncodeTableRefusesWhatItCantSay(t *testing.T) {
	bad := fakeDevice(1, 1, MediaTypeLayer)
	bad.DiffID = "sha512:" + oci.Digest(strings.Repeat("0", 128))
	if _, _, err := encodeTable([]*DeviceData{bad}); err == nil {
		t.Error("a diff ID that isn't sha256 was encoded")
	}
	if _, _, err := encodeTable(make([]*DeviceData, MaxDevices+1)); err == nil {
		t.Error("too many devices were encoded")
	}
}

func FuzzOpenTable(f *testing.F) {
	for _, devices := range [][]*DeviceData{{}, {fakeDevice(1, 3, MediaTypeLayer)}, {fakeDevice(1, 1025, MediaTypeLayer), fakeDevice(2, 0, MediaTypeSparse)}} {
		content, ref := encodedTable(f, devices...)
		f.Add(content, int(ref.RootSize))
	}
	f.Fuzz(func(t *testing.T, content []byte, rootSize int) {
		if rootSize < 0 || rootSize > len(content) {
			rootSize = len(content)
		}
		_ = readTable(t.Context(), content, refOf(content, rootSize)) // only must not panic
	})
}
