package artifact

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// A boot pack, little-endian: magic, version, count, then count pairs of
// device and chunk index, then their frames. See docs/format.md, "Boot pack".
const (
	bootMagic      = "SLUICEBP"
	bootVersion    = 1
	bootHeaderSize = 8 + 4 + 4

	// MaxBootChunks bounds the chunks of a boot pack.
	MaxBootChunks = 1 << 16
)

// ChunkRef names a chunk of an image.
type ChunkRef struct {
	Device int // device number
	Index  int // of the chunk in the device
}

// ParseBootPackHeader reads the header of a boot pack from r and returns the
// chunks whose frames follow, in that order, which is the order in which
// starting the image reads them. It reads no further, allocates no more than
// was read, and doesn't check that the chunks exist.
func ParseBootPackHeader(r io.Reader) ([]ChunkRef, error) {
	var b [bootHeaderSize]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return nil, fmt.Errorf("boot pack: reading its header: %w", noEOF(err))
	}
	if string(b[:8]) != bootMagic {
		return nil, fmt.Errorf("boot pack doesn't begin with %q", bootMagic)
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v != bootVersion {
		return nil, fmt.Errorf("boot pack: version %d is unknown, only %d is known", v, bootVersion)
	}
	count := binary.LittleEndian.Uint32(b[12:])
	if count > MaxBootChunks {
		return nil, fmt.Errorf("boot pack has %d chunks, %d are allowed", count, MaxBootChunks)
	}
	var refs []ChunkRef
	for i := range count {
		if _, err := io.ReadFull(r, b[:8]); err != nil {
			return nil, fmt.Errorf("boot pack: reading entry %d of %d: %w", i, count, noEOF(err))
		}
		device, index := binary.LittleEndian.Uint32(b[:]), binary.LittleEndian.Uint32(b[4:])
		if device >= MaxDevices || index > 1<<31-1 {
			return nil, fmt.Errorf("boot pack: entry %d is chunk %d of device %d", i, index, device)
		}
		refs = append(refs, ChunkRef{Device: int(device), Index: int(index)})
	}
	return refs, nil
}

// ReadBootPack reads a boot pack from r. It calls announce, unless that's nil,
// once, with all chunks that will come, in order and all of devices that the
// image has; then it gives each chunk's frame to put, in order, as soon as it
// has arrived. The frames' lengths are those of the table; put must verify a
// frame before it uses it, which Chunk.Decode and everything built on it does.
// frame is overwritten after put has returned.
//
// It ends with the boot pack's last frame, or with the first error, of announce
// and put, too. What put was given before an error is as good as without it: a
// boot pack only saves time.
func ReadBootPack(ctx context.Context, r io.Reader, t *Table, announce func([]ChunkRef) error,
	put func(ref ChunkRef, c Chunk, frame []byte) error) error {
	refs, err := ParseBootPackHeader(r)
	if err != nil {
		return err
	}
	for i, ref := range refs {
		if ref.Device >= len(t.Devices) {
			return fmt.Errorf("boot pack: entry %d is of device %d, the image has %d", i, ref.Device, len(t.Devices))
		}
	}
	if announce != nil {
		if err := announce(refs); err != nil {
			return err
		}
	}
	frame := make([]byte, MaxFrameLength)
	for i, ref := range refs {
		c, err := t.Devices[ref.Device].Chunk(ctx, ref.Index)
		if err != nil {
			return fmt.Errorf("boot pack: entry %d: %w", i, err)
		}
		if _, err := io.ReadFull(r, frame[:c.BlobLength]); err != nil {
			return fmt.Errorf("boot pack: reading entry %d of %d: %w", i, len(refs), noEOF(err))
		}
		if err := put(ref, c, frame[:c.BlobLength]); err != nil {
			return fmt.Errorf("boot pack: entry %d, chunk %d of device %d: %w", i, ref.Index, ref.Device, err)
		}
	}
	return nil
}

// encodeBootPackHeader returns the header of a boot pack of refs.
func encodeBootPackHeader(refs []ChunkRef) []byte {
	b := make([]byte, 0, bootHeaderSize+8*len(refs))
	b = append(b, bootMagic...)
	b = binary.LittleEndian.AppendUint32(b, bootVersion)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(refs)))
	for _, ref := range refs {
		b = binary.LittleEndian.AppendUint32(b, uint32(ref.Device))
		b = binary.LittleEndian.AppendUint32(b, uint32(ref.Index))
	}
	return b
}

// noEOF makes an end of input where more was due unmistakable.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
