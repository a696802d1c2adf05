package artifact

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// MaxChunkLength bounds the decoded length of a chunk, in bytes.
const MaxChunkLength = 256 << 10

// maxFrameOverhead is how much longer than its content a zstd frame can be
// when nothing compresses: RFC 8878 allows a frame header of 18 bytes, 3 bytes
// per block of up to 128 KiB, and a checksum of 4. Rounded up generously.
const maxFrameOverhead = 1 << 10

// MaxFrameLength bounds the length of a chunk's zstd frame, in bytes.
const MaxFrameLength = MaxChunkLength + maxFrameOverhead

// Chunk says where a chunk is, in its device and in its blob. It comes from a
// verified page of the chunk table, so within it all bounds hold: see
// Device.Chunk.
type Chunk struct {
	// Offset and Length are the chunk's place in the device's decoded
	// content; 0 < Length <= MaxChunkLength.
	Offset int64
	Length uint32

	// BlobOffset and BlobLength are the place of its frame in the blob, of zstd
	// unless it's Stored;
	// 0 < BlobLength <= MaxFrameLength.
	BlobOffset int64
	BlobLength uint32

	// Digest is the SHA-256 of the frame, before decompression.
	Digest [sha256.Size]byte

	// Stored: the frame is the content, as it is: that of a StoredDevice.
	Stored bool
}

// chunkEntrySize is the size of a chunk's entry in a page of the chunk table:
// Length, BlobLength, Digest. Offsets are sums of what precedes.
const chunkEntrySize = 4 + 4 + sha256.Size

// appendChunkEntry appends the entry of c to a page.
func appendChunkEntry(b []byte, c Chunk) []byte {
	b = binary.LittleEndian.AppendUint32(b, c.Length)
	b = binary.LittleEndian.AppendUint32(b, c.BlobLength)
	return append(b, c.Digest[:]...)
}

// newDecoder makes the one zstd decoder of the process on first use. It holds
// no state between calls of DecodeAll, which may be concurrent.
var newDecoder = sync.OnceValues(func() (*zstd.Decoder, error) {
	return zstd.NewReader(nil,
		zstd.WithDecoderConcurrency(0),       // as many at once as there are processors
		zstd.WithDecoderMaxMemory(1<<30),     // the capacity limit below is what binds
		zstd.WithDecodeAllCapLimit(true),     // never beyond the capacity of dst
		zstd.WithDecoderMaxWindow(maxWindow), // streams only
		zstd.IgnoreChecksum(true))            // the SHA-256 has been checked
})

// maxWindow bounds the memory of a streaming zstd decoder.
const maxWindow = 8 << 20

// Decode verifies that frame is the chunk's frame and returns the c.Length
// bytes it decodes to, in dst's memory, which is not the frame's, if its capacity
// suffices (dst's content is overwritten). Not one byte is decoded unless the SHA-256 matches. An error
// means that frame is not what the chunk table promised, and nothing may be
// made of it.
//
// It may be called concurrently.
func (c Chunk) Decode(dst, frame []byte) ([]byte, error) {
	if len(frame) != int(c.BlobLength) {
		return nil, fmt.Errorf("chunk at %d: frame has %d bytes, the chunk table says %d", c.Offset, len(frame), c.BlobLength)
	}
	if got := sha256.Sum256(frame); got != c.Digest {
		return nil, fmt.Errorf("chunk at %d: frame has SHA-256 %x, the chunk table says %x", c.Offset, got, c.Digest)
	}
	if c.Length == 0 || c.Length > MaxChunkLength {
		return nil, fmt.Errorf("chunk at %d: length %d is not in 1..%d", c.Offset, c.Length, MaxChunkLength)
	}
	if cap(dst) < int(c.Length) {
		dst = make([]byte, 0, c.Length)
	}
	if c.Stored {
		if c.BlobLength != c.Length {
			return nil, fmt.Errorf("chunk at %d: %d stored bytes can't be %d", c.Offset, c.BlobLength, c.Length)
		}
		return append(dst[:0:c.Length], frame...), nil
	}
	dec, err := newDecoder()
	if err != nil {
		return nil, fmt.Errorf("zstd decoder: %w", err)
	}
	// The capacity limit makes a frame that is too long an error instead of an
	// allocation.
	out, err := dec.DecodeAll(frame, dst[:0:c.Length])
	if err != nil {
		return nil, fmt.Errorf("chunk at %d: its frame of %d bytes doesn't decode to %d: %w", c.Offset, c.BlobLength, c.Length, err)
	}
	if len(out) != int(c.Length) {
		return nil, fmt.Errorf("chunk at %d: decoded to %d bytes, the chunk table says %d", c.Offset, len(out), c.Length)
	}
	return out, nil
}
