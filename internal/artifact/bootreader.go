package artifact

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"sluice/internal/blob"
	"sluice/internal/layer"
)

// Bounds of making a boot pack.
const (
	// bootBudget is how many bytes of frames a boot pack has at most. At 200
	// Mbit/s it's 1.3 s. Starting Java or node reads about 22 MB.
	bootBudget = 32 << 20

	// What finding out what start-up reads may cost at most, because the image
	// may be hostile: bytes of frames read and kept in memory, bytes decoded
	// and searched, names looked up in directories, and steps through a file.
	maxInspectedFrames = 32 << 20
	maxInspectedBytes  = 512 << 20
	maxLookups         = 4 << 20
	maxSteps           = 16 << 20 // from one extent or chunk to the next

	// maxInspected bounds a file that is read whole for inspection, such as a
	// script.
	maxInspected = 1 << 20
)

// bootFiles gives access to the files of an image whose layers have been
// converted, and gathers the chunks of those that start-up reads. It's used by
// one goroutine.
type bootFiles struct {
	ctx     context.Context // that of the one call it lives in
	root    *layer.Node
	table   *Table
	number  func(layer.Extent) int // an extent's device
	sources []blob.Source          // by device number

	frames                             map[ChunkRef][]byte // verified; what inspection has read
	framesLeft, bytesLeft, lookupsLeft int64               // until inspection has cost enough
	stepsLeft                          int64
	decoded                            map[ChunkRef][]byte // a few of them

	planned []*plannedFile
	byNode  map[*layer.Node]*plannedFile
	order   []ChunkRef // the boot pack
	packed  map[ChunkRef]bool
	size    int64 // of the boot pack's frames

	// err is the first error of a source. Unlike anything odd about a file,
	// which only means that something isn't packed, it must fail the build: the
	// same input must give the same artifact.
	err error
}

// plannedFile is a file of the plan that is being made.
type plannedFile struct {
	BootFile
	chunks map[ChunkRef]bool
}

func openBootFiles(ctx context.Context, root *layer.Node, t *Table, number func(layer.Extent) int, sources []blob.Source) *bootFiles {
	return &bootFiles{
		ctx: ctx, root: root, table: t, number: number, sources: sources,
		frames: make(map[ChunkRef][]byte), decoded: make(map[ChunkRef][]byte),
		packed: make(map[ChunkRef]bool), byNode: make(map[*layer.Node]*plannedFile),
		framesLeft: maxInspectedFrames, bytesLeft: maxInspectedBytes, lookupsLeft: maxLookups, stepsLeft: maxSteps,
	}
}

// newBootFiles is openBootFiles for layers that have just been converted.
func newBootFiles(ctx context.Context, root *layer.Node, t *Table, layers []*Layer, sources []LayerSource) *bootFiles {
	numbers := make(map[deviceID]int)
	var all []blob.Source
	for n, id := range imageDevices(layers) {
		numbers[id] = n
		src := sources[id.layer].Tar
		if id.sparse {
			src = sources[id.layer].Sparse
		}
		all = append(all, src)
	}
	return openBootFiles(ctx, root, t, func(e layer.Extent) int { return numbers[deviceID{e.Layer, e.Sparse}] }, all)
}

// files returns the plan's files.
func (b *bootFiles) files() []BootFile {
	var all []BootFile
	for _, f := range b.planned {
		all = append(all, f.BootFile)
	}
	return all
}

// resolved is a file by its real name.
type resolved struct {
	*layer.Node
	path string // absolute, without symbolic links
}

// lookup finds the file at an absolute path, following symbolic links inside
// the image as the kernel does in a container.
func (b *bootFiles) lookup(name string) (resolved, bool) {
	at := resolved{b.root, "/"}
	var parents []resolved
	rest := strings.Split(name, "/")
	for links := 0; len(rest) > 0; {
		part := rest[0]
		rest = rest[1:]
		switch {
		case part == "" || part == ".":
			continue
		case part == "..":
			if len(parents) > 0 {
				at, parents = parents[len(parents)-1], parents[:len(parents)-1]
			}
			continue
		}
		n := at.Children[part]
		if b.lookupsLeft--; n == nil || b.lookupsLeft < 0 {
			return resolved{}, false
		}
		if n.Type() != layer.TypeSymlink {
			parents = append(parents, at)
			at = resolved{n, path.Join(at.path, part)}
			continue
		}
		if links++; links > 40 { // as in Linux
			return resolved{}, false
		}
		if strings.HasPrefix(n.Target, "/") {
			at, parents = resolved{b.root, "/"}, nil
		}
		rest = append(strings.Split(n.Target, "/"), rest...)
		if len(rest) > 4096 {
			return resolved{}, false
		}
	}
	return at, true
}

// names returns the names in a directory, sorted, if that isn't too much to ask.
func (b *bootFiles) names(dir resolved) []string {
	if b.lookupsLeft -= int64(len(dir.Children)); b.lookupsLeft < 0 {
		return nil
	}
	return dir.Names()
}

// file is lookup for regular files.
func (b *bootFiles) file(name string) (resolved, bool) {
	f, ok := b.lookup(name)
	return f, ok && f.Type() == layer.TypeRegular
}

// why says what a file is planned for.
type why struct {
	rule BootRule
	by   string // the path of what named it
}

// pageSize is what the kernel reads devices in: of a file's first and last page
// it also reads what lies in the tar beside the file, which may be another chunk.
const pageSize = 4 << 10

// pack adds the chunks of n bytes of a file at off to the boot pack, until
// that is full.
func (b *bootFiles) pack(f resolved, w why, off, n int64) {
	if b.stepsLeft -= int64(len(f.Extents)); b.stepsLeft < 0 {
		return
	}
	for _, e := range f.Extents {
		from, to := max(off, e.FileOffset), min(off+n, e.FileOffset+e.Length)
		if from >= to {
			continue
		}
		number := b.number(e)
		at := (e.Offset + from - e.FileOffset) &^ (pageSize - 1)
		end := (e.Offset + to - e.FileOffset + pageSize - 1) &^ (pageSize - 1)
		for at < end {
			ref, c, ok := b.chunkAt(number, at)
			if b.stepsLeft--; !ok || b.full() {
				break
			}
			b.note(f, w, ref, c, e)
			at = c.Offset + int64(c.Length)
		}
	}
}

// note puts a chunk into the plan, for one of the extents of a file.
func (b *bootFiles) note(f resolved, w why, ref ChunkRef, c Chunk, e layer.Extent) {
	p := b.byNode[f.Node]
	if p == nil {
		p = &plannedFile{BootFile: BootFile{Path: f.path, Rule: w.rule, For: w.by, Size: f.Size}, chunks: make(map[ChunkRef]bool)}
		b.byNode[f.Node] = p
		b.planned = append(b.planned, p)
	}
	if p.chunks[ref] {
		return
	}
	p.chunks[ref] = true
	p.Chunks++
	p.Planned += max(0, min(e.Offset+e.Length, c.Offset+int64(c.Length))-max(e.Offset, c.Offset))
	if !b.packed[ref] {
		b.packed[ref] = true
		b.order = append(b.order, ref)
		b.size += int64(c.BlobLength)
		p.Added += int64(c.BlobLength)
	}
}

// packAll adds a whole file.
func (b *bootFiles) packAll(f resolved, w why) { b.pack(f, w, 0, f.Size) }

// packEnds adds a file, or of one that is too large for that what lies at its
// ends: where formats have their indexes.
func (b *bootFiles) packEnds(f resolved, w why, whole, head, tail int64) {
	if f.Size <= whole {
		b.packAll(f, w)
		return
	}
	b.pack(f, w, 0, head)
	b.pack(f, w, f.Size-min(tail, f.Size), tail)
}

// full reports whether there may be no room for another chunk.
func (b *bootFiles) full() bool {
	return b.size+MaxFrameLength > bootBudget || len(b.order) >= MaxBootChunks || b.stepsLeft < 0 || b.err != nil
}

// chunkAt returns the chunk that has a device's byte.
func (b *bootFiles) chunkAt(device int, off int64) (ChunkRef, Chunk, bool) {
	d := b.table.Devices[device]
	if off < 0 || off >= d.ContentSize {
		return ChunkRef{}, Chunk{}, false // a file of a tar that was cut
	}
	i, err := d.Find(b.ctx, off)
	if err != nil {
		b.err = cmp.Or(b.err, err) // a page of the table can't be had
		return ChunkRef{}, Chunk{}, false
	}
	c, err := d.Chunk(b.ctx, i)
	return ChunkRef{device, i}, c, err == nil
}

// readAt reads a file's content, from the layers' blobs.
func (b *bootFiles) readAt(f *layer.Node, p []byte, off int64) (int, error) {
	if off < 0 || off >= f.Size {
		return 0, io.EOF
	}
	if b.stepsLeft -= int64(len(f.Extents)); b.stepsLeft < 0 {
		return 0, errInspected
	}
	n := int(min(int64(len(p)), f.Size-off))
	clear(p[:n]) // holes
	for _, e := range f.Extents {
		from, to := max(off, e.FileOffset), min(off+int64(n), e.FileOffset+e.Length)
		for at := from; at < to; {
			ref, c, ok := b.chunkAt(b.number(e), e.Offset+at-e.FileOffset)
			if !ok {
				return 0, io.ErrUnexpectedEOF
			}
			data, err := b.chunk(ref, c)
			if err != nil {
				return 0, err
			}
			k := copy(p[at-off:to-off], data[e.Offset+at-e.FileOffset-c.Offset:])
			at += int64(k)
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// chunk returns a chunk's content.
func (b *bootFiles) chunk(ref ChunkRef, c Chunk) ([]byte, error) {
	if data := b.decoded[ref]; data != nil {
		return data, nil
	}
	frame, err := b.frame(ref, c)
	if err != nil {
		return nil, err
	}
	if b.bytesLeft -= int64(c.Length); b.bytesLeft < 0 {
		return nil, errInspected
	}
	data, err := c.Decode(nil, frame)
	if err != nil {
		return nil, b.fail(err)
	}
	if len(b.decoded) >= 32 { // 8 MiB
		clear(b.decoded)
	}
	b.decoded[ref] = data
	return data, nil
}

// errInspected says that finding out what start-up reads has cost enough.
var errInspected = errors.New("enough has been inspected")

// frame returns a chunk's frame, verified, for inspection.
func (b *bootFiles) frame(ref ChunkRef, c Chunk) ([]byte, error) {
	if frame := b.frames[ref]; frame != nil {
		return frame, nil
	}
	if b.err != nil {
		return nil, b.err
	}
	if b.framesLeft -= int64(c.BlobLength); b.framesLeft < 0 {
		return nil, errInspected
	}
	frame := make([]byte, c.BlobLength)
	if err := blob.ReadFull(b.ctx, b.sources[ref.Device], frame, c.BlobOffset); err != nil {
		return nil, b.fail(err)
	}
	if sha256.Sum256(frame) != c.Digest {
		return nil, b.fail(fmt.Errorf("chunk %d of device %d isn't what was stored", ref.Index, ref.Device))
	}
	b.frames[ref] = frame
	return frame, nil
}

func (b *bootFiles) fail(err error) error {
	if b.err == nil {
		b.err = fmt.Errorf("reading a converted layer back: %w", err)
	}
	return b.err
}

// text returns a file's content if it's not too large, or nothing.
func (b *bootFiles) text(f *layer.Node) string {
	if f.Size > maxInspected {
		return ""
	}
	if b.bytesLeft -= f.Size; b.bytesLeft < 0 {
		return ""
	}
	p := make([]byte, f.Size)
	if _, err := b.readAt(f, p, 0); err != nil {
		return ""
	}
	return string(p)
}

// prefetch reads the boot pack's frames that inspection hasn't read, adjacent
// ones together.
func (b *bootFiles) prefetch() error {
	missing := slices.DeleteFunc(slices.Clone(b.order), func(ref ChunkRef) bool { return b.frames[ref] != nil })
	slices.SortFunc(missing, func(x, y ChunkRef) int { return cmp.Or(x.Device-y.Device, x.Index-y.Index) })
	for len(missing) > 0 {
		n := 1
		for n < len(missing) && missing[n].Device == missing[0].Device && missing[n].Index == missing[0].Index+n {
			n++
		}
		if err := b.fetch(missing[:n]); err != nil {
			return b.fail(err)
		}
		missing = missing[n:]
	}
	return nil
}

// fetch reads adjacent frames in one range.
func (b *bootFiles) fetch(refs []ChunkRef) error {
	d := b.table.Devices[refs[0].Device]
	first, err := d.Chunk(b.ctx, refs[0].Index)
	if err != nil {
		return err
	}
	last, err := d.Chunk(b.ctx, refs[len(refs)-1].Index)
	if err != nil {
		return err
	}
	content := make([]byte, last.BlobOffset+int64(last.BlobLength)-first.BlobOffset)
	if err := blob.ReadFull(b.ctx, b.sources[refs[0].Device], content, first.BlobOffset); err != nil {
		return err
	}
	for _, ref := range refs {
		c, err := d.Chunk(b.ctx, ref.Index)
		if err != nil {
			return err
		}
		frame := content[c.BlobOffset-first.BlobOffset:][:c.BlobLength]
		if sha256.Sum256(frame) != c.Digest {
			return fmt.Errorf("chunk %d of device %d isn't what was stored", ref.Index, ref.Device)
		}
		b.frames[ref] = frame
	}
	return nil
}
