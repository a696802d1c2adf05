package cache

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"sluice/internal/artifact"
	"sluice/oci"
)

// The state file of a layer, little-endian:
//
//	 0  8   magic "SLUICEC1"
//	 8  32  SHA-256 of the device key's spelling
//	40  8   size of the device
//	48  8   size of its content
//	56  4   chunks
//	60  4   CRC-32C of bytes 0..60
//	64      one entry of 8 bytes per chunk: zeros if the chunk isn't on disk,
//	        otherwise CRC-32C of the chunk's decoded bytes, and a check over
//	        header, chunk number and that CRC
//
// It is what other designs call the bitmap. An entry vouches for itself: one
// that was torn, or that belongs to another file or place, fails its check
// and counts as absent; one whose chunk isn't on disk as it was fails against
// the data. So nothing a crash or a disk does to this file can make the cache
// serve a wrong byte, it can only make it fetch a chunk again.
const (
	stateMagic      = "SLUICEC1"
	stateHeaderSize = 64
	stateEntrySize  = 8
)

// CRC-32C has instructions of its own on amd64 and arm64.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// shape is what a device's key implies, and what the files of a cached layer
// must fit.
type shape struct {
	key    oci.Digest
	size   int64 // of the device
	length int64 // of its content, which chunks have; what follows is zero
	count  int   // of chunks
}

// shapeOf returns the shape of a device, or an error if the device can't be
// cached. It has been verified by package artifact; this keeps a mistake there
// from becoming a path or an allocation here.
func shapeOf(d *artifact.Device) (shape, error) {
	s := shape{key: d.Key, size: d.Size, length: d.ContentSize, count: d.Chunks}
	if k, err := oci.ParseDigest(d.Key.String()); err != nil || k.Algorithm() != oci.SHA256 {
		return s, fmt.Errorf("device key %q is not a sha256 digest", d.Key)
	}
	if _, err := oci.ParseDigest(d.DiffID.String()); err != nil {
		return s, fmt.Errorf("device %s: diff ID %q is not a digest", s.key, d.DiffID)
	}
	switch {
	case s.length < 0 || s.size < s.length || s.size-s.length >= artifact.MaxChunkLength:
		return s, fmt.Errorf("device %s: size %d doesn't fit its content of %d bytes", s.key, s.size, s.length)
	case s.count < 0 || s.count > artifact.MaxChunks || int64(s.count) > s.length:
		return s, fmt.Errorf("device %s: %d chunks don't fit its content of %d bytes", s.key, s.count, s.length)
	case (s.count == 0) != (s.length == 0):
		return s, fmt.Errorf("device %s: %d chunks for %d bytes", s.key, s.count, s.length)
	}
	return s, nil
}

// fileSize is the exact size of the state file.
func (s shape) fileSize() int64 { return stateHeaderSize + int64(s.count)*stateEntrySize }

// header returns the state file's header.
func (s shape) header() []byte {
	b := append(make([]byte, 0, stateHeaderSize), stateMagic...)
	key := sha256.Sum256([]byte(s.key))
	b = append(b, key[:]...)
	b = binary.LittleEndian.AppendUint64(b, uint64(s.size))
	b = binary.LittleEndian.AppendUint64(b, uint64(s.length))
	b = binary.LittleEndian.AppendUint32(b, uint32(s.count))
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// emptyState returns the state file of a layer of which nothing is on disk.
func (s shape) emptyState() []byte {
	return append(s.header(), make([]byte, s.count*stateEntrySize)...)
}

// entry returns the entry that says that chunk i, whose decoded bytes have the
// given CRC, is on disk.
func (s shape) entry(i int, crc uint32) [stateEntrySize]byte {
	var e [stateEntrySize]byte
	binary.LittleEndian.PutUint32(e[:4], crc)
	binary.LittleEndian.PutUint32(e[4:], s.check(i, crc))
	return e
}

// check computes an entry's check. Its last bit is set, so that no entry is
// all zeros.
func (s shape) check(i int, crc uint32) uint32 {
	var b [40]byte
	copy(b[:32], s.key.Encoded()) // half of it, which is as good as all
	binary.LittleEndian.PutUint32(b[32:], uint32(i))
	binary.LittleEndian.PutUint32(b[36:], crc)
	return crc32.Checksum(b[:], castagnoli) | 1
}

// recorded is a chunk that a state file says is on disk.
type recorded struct {
	chunk int
	crc   uint32 // of its decoded bytes
}

// parse reads a state file. An error means that the whole file is not one of
// this shape. damaged counts entries that fail their check.
func (s shape) parse(file []byte) (present []recorded, damaged int, err error) {
	if int64(len(file)) != s.fileSize() {
		return nil, 0, fmt.Errorf("state file has %d bytes, want %d", len(file), s.fileSize())
	}
	if string(file[:stateHeaderSize]) != string(s.header()) {
		return nil, 0, fmt.Errorf("state file has a damaged header, or another layer's")
	}
	for i := range s.count {
		e := file[stateHeaderSize+i*stateEntrySize:][:stateEntrySize]
		crc, check := binary.LittleEndian.Uint32(e[:4]), binary.LittleEndian.Uint32(e[4:])
		switch {
		case crc == 0 && check == 0:
		case check == s.check(i, crc):
			present = append(present, recorded{chunk: i, crc: crc})
		default:
			damaged++
		}
	}
	return present, damaged, nil
}
