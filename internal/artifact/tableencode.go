package artifact

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"

	"sluice/oci"
)

// DeviceData is a device as EncodeLayer left it: what the chunk table and the
// manifest say of it. It's plain data, so that a converted layer can be
// remembered.
type DeviceData struct {
	// DiffID is the SHA-256 of the Size decoded bytes.
	DiffID oci.Digest
	Size   int64

	// Blob is the blob that holds the chunks, with its media type.
	Blob oci.Descriptor

	// Entries are the chunks in order, as they are in the chunk table: 40 bytes
	// each.
	Entries []byte
}

// Chunks returns how many chunks the device has.
func (d *DeviceData) Chunks() int { return len(d.Entries) / chunkEntrySize }

// encodeTable returns a chunk table: the root and the pages. Equal pages, of
// layers that an image has twice, are there once.
func encodeTable(devices []*DeviceData) (root, pages []byte, err error) {
	if len(devices) > MaxDevices {
		return nil, nil, fmt.Errorf("image has %d devices, %d are allowed", len(devices), MaxDevices)
	}
	rootSize := rootHeaderSize
	for _, d := range devices {
		n := (d.Chunks() + ChunksPerPage - 1) / ChunksPerPage
		rootSize += deviceEntrySize + n*pageEntrySize
	}
	if rootSize > MaxRootSize {
		return nil, nil, fmt.Errorf("chunk table's root has %d bytes, %d are allowed", rootSize, MaxRootSize)
	}
	root = append(root, tableMagic...)
	root = binary.LittleEndian.AppendUint32(root, tableVersion)
	root = binary.LittleEndian.AppendUint32(root, uint32(len(devices)))
	at := make(map[[sha256.Size]byte]int)
	for i, d := range devices {
		if root, err = appendDevice(root, d); err != nil {
			return nil, nil, fmt.Errorf("device %d: %w", i, err)
		}
		var offset, blobOffset uint64
		for rest := d.Entries; len(rest) > 0; {
			page := rest[:min(len(rest), ChunksPerPage*chunkEntrySize)]
			rest = rest[len(page):]
			digest := sha256.Sum256(page)
			if _, ok := at[digest]; !ok {
				at[digest] = rootSize + len(pages)
				pages = append(pages, page...)
			}
			root = append(root, digest[:]...)
			root = binary.LittleEndian.AppendUint64(root, offset)
			root = binary.LittleEndian.AppendUint64(root, blobOffset)
			root = binary.LittleEndian.AppendUint64(root, uint64(at[digest]))
			for ; len(page) > 0; page = page[chunkEntrySize:] {
				offset += uint64(binary.LittleEndian.Uint32(page))
				blobOffset += uint64(binary.LittleEndian.Uint32(page[4:]))
			}
		}
	}
	return root, pages, nil
}

// appendDevice appends a device's own part of the root.
func appendDevice(root []byte, d *DeviceData) ([]byte, error) {
	var flags uint32
	if d.Blob.MediaType == MediaTypeSparse {
		flags |= flagSparse
	}
	for _, digest := range []oci.Digest{d.DiffID, d.Blob.Digest} {
		raw, err := rawDigest(digest)
		if err != nil {
			return nil, err
		}
		root = append(root, raw...)
	}
	root = binary.LittleEndian.AppendUint64(root, uint64(d.Blob.Size))
	root = binary.LittleEndian.AppendUint64(root, uint64(d.Size))
	root = binary.LittleEndian.AppendUint32(root, uint32(d.Chunks()))
	return binary.LittleEndian.AppendUint32(root, flags), nil
}

// rawDigest returns the 32 bytes of a sha256 digest.
func rawDigest(d oci.Digest) ([]byte, error) {
	if d.Validate() != nil || d.Algorithm() != oci.SHA256 {
		return nil, fmt.Errorf("%q is not a sha256 digest", d)
	}
	return hex.DecodeString(d.Encoded())
}
