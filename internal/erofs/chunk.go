package erofs

import (
	"cmp"
	"fmt"
	"math/bits"
	"slices"
)

// chunkPlan says how the content of a regular file is cut into chunks.
type chunkPlan struct {
	bits    int // chunk size is BlockSize << bits
	count   int64
	extents []Extent // sorted, neighbours joined, none empty
}

// planChunks checks in's extents and chooses the largest chunk size with
// which no chunk has the end of one extent and the start of another, or of a
// hole, in it; but none larger than is needed to have the fewest chunks.
func planChunks(in *Inode, devices []Device) (chunkPlan, error) {
	if in.Size < 0 {
		return chunkPlan{}, fmt.Errorf("size %d", in.Size)
	}
	extents, err := joinExtents(in, devices)
	if err != nil || in.Size == 0 {
		return chunkPlan{}, err
	}
	// Every place in the file where an extent or a hole begins, or'ed
	// together in blocks: its lowest bit is the alignment of them all.
	var borders uint64
	end := int64(0)
	for _, e := range extents {
		borders |= uint64(end/BlockSize) | uint64(e.FileOffset/BlockSize)
		end = e.FileOffset + e.Length
	}
	if end < in.Size {
		borders |= uint64(end / BlockSize)
	}
	blocks := blocksOf(in.Size)
	p := chunkPlan{extents: extents}
	p.bits = min(maxChunkBits, bits.TrailingZeros64(borders), bits.Len64(uint64(blocks-1)))
	chunk := int64(1) << p.bits
	p.count = (blocks-1)/chunk + 1
	if p.count > maxChunksPerFile {
		return p, fmt.Errorf("a file of %d bytes whose extents and holes are aligned to %d bytes only needs %d chunk indexes; at most %d can be written",
			in.Size, chunk*BlockSize, p.count, maxChunksPerFile)
	}
	return p, nil
}

// joinExtents returns in's extents, checked, sorted, and those that follow
// each other in the file and on the device made one.
func joinExtents(in *Inode, devices []Device) ([]Extent, error) {
	extents := in.Extents
	if !slices.IsSortedFunc(extents, byFileOffset) {
		extents = slices.SortedFunc(slices.Values(extents), byFileOffset)
	}
	var joined []Extent
	end := int64(0)
	for _, e := range extents {
		if err := checkExtent(in, e, devices); err != nil {
			return nil, err
		}
		if e.FileOffset < end {
			return nil, fmt.Errorf("two extents have the file's offset %d", e.FileOffset)
		}
		end = e.FileOffset + e.Length
		if last := len(joined) - 1; last >= 0 {
			l := &joined[last]
			if l.Device == e.Device && l.Offset+l.Length == e.Offset && l.FileOffset+l.Length == e.FileOffset {
				l.Length += e.Length
				continue
			}
		}
		joined = append(joined, e)
	}
	return joined, nil
}

func byFileOffset(a, b Extent) int { return cmp.Compare(a.FileOffset, b.FileOffset) }

func checkExtent(in *Inode, e Extent, devices []Device) error {
	switch {
	case e.Device < 0 || e.Device >= len(devices):
		return fmt.Errorf("an extent is on device %d of %d", e.Device, len(devices))
	case e.Length <= 0 || e.FileOffset < 0 || e.FileOffset > in.Size-e.Length:
		return fmt.Errorf("an extent is %d bytes at the offset %d of a file of %d bytes", e.Length, e.FileOffset, in.Size)
	case e.Offset < 0 || e.Offset > devices[e.Device].Size-e.Length:
		return fmt.Errorf("an extent is %d bytes at the offset %d of device %d, which has %d bytes",
			e.Length, e.Offset, e.Device, devices[e.Device].Size)
	case e.Offset%BlockSize != 0 || e.FileOffset%BlockSize != 0:
		return fmt.Errorf("an extent has the offset %d on device %d and %d in the file; both must be multiples of %d",
			e.Offset, e.Device, e.FileOffset, BlockSize)
	case e.Offset+roundUp(e.Length, BlockSize) > devices[e.Device].Size:
		return fmt.Errorf("the last block of an extent of %d bytes at the offset %d is not wholly on device %d, which has %d bytes: pad the device to a multiple of %d",
			e.Length, e.Offset, e.Device, devices[e.Device].Size, BlockSize)
	case e.Length%BlockSize != 0 && e.FileOffset+e.Length != in.Size:
		return fmt.Errorf("an extent of %d bytes at the offset %d ends inside a block and before the end of the file",
			e.Length, e.FileOffset)
	}
	return nil
}

// encode writes the chunk indexes into p, which has 8 bytes for each.
func (c *chunkPlan) encode(p []byte) {
	chunk := int64(BlockSize) << c.bits
	next := 0
	for i := range c.count {
		at := i * chunk
		for next < len(c.extents) && c.extents[next].FileOffset+c.extents[next].Length <= at {
			next++
		}
		idx := p[i*chunkIndexSize:]
		if next == len(c.extents) || c.extents[next].FileOffset > at {
			le.PutUint32(idx[4:], nullBlock)
			continue
		}
		e := c.extents[next]
		le.PutUint16(idx[2:], uint16(e.Device+1))
		le.PutUint32(idx[4:], uint32((e.Offset+at-e.FileOffset)/BlockSize))
	}
}
