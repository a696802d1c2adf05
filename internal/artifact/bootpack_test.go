package artifact

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/blob"
	"sluice/oci"
)

// packed is a table of two devices, their contents and a boot pack of three of
// their chunks.
type packed struct {
	table *Table
	want  map[ChunkRef][]byte
	order []ChunkRef
	pack  []byte
}

func newPacked(t testing.TB) *packed {
	t.Helper()
	p := &packed{want: make(map[ChunkRef][]byte), order: []ChunkRef{{1, 2}, {0, 0}, {1, 0}}}
	var devices []*DeviceData
	frames := make(map[ChunkRef][]byte)
	for n := range 2 {
		d := &DeviceData{DiffID: oci.DigestOf(nil), Blob: oci.Descriptor{MediaType: MediaTypeLayer, Digest: oci.DigestOf(nil)}}
		for i := range 3 {
			content := words(uint64(10*n+i), 1000+i*500)
			c, frame := frameOf(t, content)
			d.Entries = appendChunkEntry(d.Entries, c)
			d.Size += int64(len(content))
			d.Blob.Size += int64(len(frame))
			p.want[ChunkRef{n, i}], frames[ChunkRef{n, i}] = content, frame
		}
		devices = append(devices, d)
	}
	content, ref := encodedTable(t, devices...)
	var err error
	if p.table, err = OpenTable(t.Context(), ref, blob.FromBytes(content)); err != nil {
		t.Fatal(err)
	}
	p.pack = encodeBootPackHeader(p.order)
	for _, ref := range p.order {
		p.pack = append(p.pack, frames[ref]...)
	}
	return p
}

// read reads a boot pack and checks that what it gives is right.
func (p *packed) read(t *testing.T, content io.Reader) ([]ChunkRef, error) {
	t.Helper()
	var got []ChunkRef
	var announced []ChunkRef
	announce := func(refs []ChunkRef) error {
		announced = append(announced, refs...)
		return nil
	}
	err := ReadBootPack(t.Context(), content, p.table, announce, func(ref ChunkRef, c Chunk, frame []byte) error {
		data, err := c.Decode(nil, frame)
		if err != nil {
			return err
		}
		if !bytes.Equal(data, p.want[ref]) {
			t.Errorf("chunk %v isn't what it was", ref)
		}
		got = append(got, ref)
		return nil
	})
	if len(announced) < len(got) || !slices.Equal(announced[:len(got)], got) {
		t.Errorf("announced %v, gave %v", announced, got)
	}
	return got, err
}

func TestBootPackGivesItsChunksInOrder(t *testing.T) {
	p := newPacked(t)
	got, err := p.read(t, bytes.NewReader(p.pack))
	if err != nil || !cmp.Equal(got, p.order) {
		t.Errorf("got %v, %v", got, err)
	}
}

// What has arrived of a boot pack that breaks off is of use.
func TestBootPackThatBreaksOff(t *testing.T) {
	p := newPacked(t)
	for n := range p.pack {
		got, err := p.read(t, bytes.NewReader(p.pack[:n]))
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("%d of %d bytes: %v", n, len(p.pack), err)
		}
		if n == len(p.pack)-1 && len(got) != 2 {
			t.Errorf("all but a byte gave %v", got)
		}
	}
}

func TestBootPackNoticesEveryByte(t *testing.T) {
	p := newPacked(t)
	for i := range p.pack {
		bad := bytes.Clone(p.pack)
		bad[i] ^= 1 << (i % 8)
		// A header that names fewer or other chunks of the same lengths is only
		// less useful.
		got, err := p.read(t, bytes.NewReader(bad))
		if err == nil && len(got) == len(p.order) && i >= bootHeaderSize {
			t.Fatalf("byte %d is wrong, and nobody noticed", i)
		}
	}
}

func TestBootPackRefuses(t *testing.T) {
	p := newPacked(t)
	for what, pack := range map[string][]byte{
		"nothing":      nil,
		"html":         []byte("<html><body>not found</body></html>"),
		"version":      append([]byte("SLUICEBP\x02\x00\x00\x00"), p.pack[12:]...),
		"many chunks":  []byte("SLUICEBP\x01\x00\x00\x00\xff\xff\xff\xff"),
		"other device": encodeBootPackHeader([]ChunkRef{{2, 0}}),
		"huge device":  encodeBootPackHeader([]ChunkRef{{1<<32 - 1, 0}}),
		"other chunk":  encodeBootPackHeader([]ChunkRef{{0, 3}}),
		"huge chunk":   encodeBootPackHeader([]ChunkRef{{0, 1<<32 - 1}}),
	} {
		if got, err := p.read(t, bytes.NewReader(pack)); err == nil || len(got) > 0 {
			t.Errorf("%s: %v, %v", what, got, err)
		} else if !strings.Contains(err.Error(), "boot pack") {
			t.Errorf("%s: %v doesn't say what of", what, err)
		}
	}
}

func FuzzBootPack(f *testing.F) {
	p := newPacked(f)
	f.Add(p.pack)
	f.Add(encodeBootPackHeader([]ChunkRef{{0, 0}, {9, 9}}))
	f.Fuzz(func(t *testing.T, content []byte) {
		_, _ = p.read(t, bytes.NewReader(content)) // only must not panic, nor give anything wrong
	})
}
