package artifact

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"sluice/oci"
)

// storedPrefix is what the key of a stored device hashes first: no device of a
// chunk table has the same one.
const storedPrefix = "sluice stored device key v1\n"

// storedUnit is what the blocks of a stored device are multiples of, in bytes.
const storedUnit = 512

// StoredDevice returns the device that a file is, as it is: size bytes with the
// SHA-256 digest, which is both its blob's and its content's. sums are the SHA-256
// of each blockSize bytes of it, 32 bytes each, the last of what is left; they
// become its chunks. blockSize is a multiple of 512, MaxChunkLength at most.
//
// All of it may come from a stranger: what doesn't fit together is an error, and
// nothing is allocated for a file that sums don't cover. That sums are the right
// ones is for the caller to know. The key is made of all that is given.
func StoredDevice(size int64, digest oci.Digest, blockSize int64, sums []byte) (*Device, error) {
	switch {
	case digest.Validate() != nil || digest.Algorithm() != oci.SHA256:
		return nil, fmt.Errorf("stored device: %.80q is not a sha256 digest", digest.String())
	case size <= 0 || size > maxContentSize:
		return nil, fmt.Errorf("stored device %s: size %d is not in 1..%d", digest, size, int64(maxContentSize))
	case blockSize <= 0 || blockSize > MaxChunkLength || blockSize%storedUnit != 0:
		return nil, fmt.Errorf("stored device %s: blocks of %d bytes: multiples of %d up to %d are allowed", digest, blockSize, storedUnit, MaxChunkLength)
	}
	chunks := (size + blockSize - 1) / blockSize
	switch {
	case chunks > MaxChunks:
		return nil, fmt.Errorf("stored device %s: %d blocks: %d are allowed", digest, chunks, MaxChunks)
	case int64(len(sums)) != chunks*sha256.Size:
		return nil, fmt.Errorf("stored device %s: %d bytes of sums, its %d blocks have %d", digest, len(sums), chunks, chunks*sha256.Size)
	}
	key := sha256.New()
	key.Write([]byte(storedPrefix))
	key.Write([]byte(digest.String()))
	key.Write(binary.LittleEndian.AppendUint64(nil, uint64(size)))
	key.Write(binary.LittleEndian.AppendUint64(nil, uint64(blockSize)))
	key.Write(sums)
	d := &Device{
		Key:         digestOf(key),
		DiffID:      digest,
		Blob:        oci.Descriptor{MediaType: mediaTypeStored, Digest: digest, Size: size},
		ContentSize: size,
		Size:        deviceSize(size),
		Chunks:      int(chunks),
	}
	for first := 0; first < d.Chunks; first += ChunksPerPage {
		d.pages = append(d.pages, storedPage(first, min(ChunksPerPage, d.Chunks-first), size, blockSize, sums))
	}
	return d, nil
}

// mediaTypeStored is that of a stored device's blob, which isn't a registry's.
const mediaTypeStored = "application/octet-stream"

// storedPage returns the page of n chunks from the given one on, with its chunks.
func storedPage(first, n int, size, blockSize int64, sums []byte) *page {
	begin := int64(first) * blockSize
	end := min(begin+int64(n)*blockSize, size)
	p := &page{first: first, n: n, begin: begin, end: end, blobBegin: begin, blobEnd: end, stored: true}
	chunks := make([]chunkEntry, n)
	for i := range chunks {
		end := uint32(min(int64(i+1)*blockSize, size-begin))
		chunks[i] = chunkEntry{end: end, blobEnd: end, digest: [sha256.Size]byte(sums[(first+i)*sha256.Size:])}
	}
	p.chunks.Store(&chunks)
	return p
}
