// Package vhd is the footer that makes a file a fixed virtual hard disk.
//
// A fixed VHD is the disk's content, byte for byte, and then one sector that
// describes it. So a file system that lies at the beginning of the disk mounts as
// it is, footer and all; what follows it is of no concern to it. The format is
// Microsoft's "Virtual Hard Disk Image Format Specification", version 1.0 of 11
// October 2006: "Hard Disk Footer Format" for the fields, and the appendix "CHS
// Calculation" for the geometry. All numbers are big-endian.
//
// Start with Footer. Encode makes the sector, Parse and Read take one apart and
// believe nothing that they haven't checked. Capacity says how long the content
// must be made: programs disagree about whether a disk is as large as the footer
// says or as its geometry does (QEMU, for one, decides by who made it), and the
// disks of this package are as large as both say.
package vhd

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"sluice/oci"
)

const (
	// SectorSize is what the sizes of disks are multiples of, in bytes.
	SectorSize = 512

	// FooterSize is how many bytes a fixed VHD is longer than its disk.
	FooterSize = 512

	// MaxSize is the largest disk, in bytes: the format's 2040 GiB.
	MaxSize = 2040 << 30
)

// ErrInvalid is what every error about a footer's content wraps.
var ErrInvalid = errors.New("not a fixed VHD")

// Footer describes a fixed disk.
type Footer struct {
	Size int64    // of the disk in bytes, a multiple of SectorSize
	ID   [16]byte // a UUID, by which disks are told apart
}

// ID returns the UUID of the disk that has a layer: version 8 of RFC 9562, the
// same for the same digest on every machine.
func ID(layer oci.Digest) (id [16]byte) {
	sum := sha256.Sum256([]byte("sluice vhd " + layer.String()))
	copy(id[:], sum[:])
	id[6] = id[6]&0x0f | 0x80
	id[8] = id[8]&0x3f | 0x80
	return id
}

// The fields' offsets, and what is in those that have one value only.
const (
	offCookie     = 0  // cookie
	offFeatures   = 8  // featureReserved, a bit that is always set
	offVersion    = 12 // formatVersion
	offDataOffset = 16 // all ones: there are no headers
	offTime       = 24 // seconds since 2000: 0, since the same layer gives the same disk
	offApp        = 28 // creatorApp
	offAppVersion = 32
	offHost       = 36 // hostWindows: there is no value for others than it and the Macintosh
	offOriginal   = 40
	offSize       = 48
	offGeometry   = 56 // cylinders (2 bytes), heads, sectors per track
	offType       = 60 // typeFixed
	offChecksum   = 64
	offID         = 68
	offState      = 84 // 1: a virtual machine is suspended
	offReserved   = 85

	cookie          = "conectix"
	featureReserved = 2
	formatVersion   = 0x00010000
	creatorApp      = "slce"
	creatorVersion  = 0x00010000
	hostWindows     = "Wi2k"
	typeFixed       = 2
)

// Encode returns the footer's sector. The size must be one that Capacity returns.
func (f Footer) Encode() ([]byte, error) {
	if f.Size <= 0 || f.Size > MaxSize || Capacity(f.Size) != f.Size {
		return nil, fmt.Errorf("vhd: a disk of %d bytes has no geometry: make it Capacity's %d", f.Size, Capacity(f.Size))
	}
	b := make([]byte, FooterSize)
	be := binary.BigEndian
	copy(b[offCookie:], cookie)
	be.PutUint32(b[offFeatures:], featureReserved)
	be.PutUint32(b[offVersion:], formatVersion)
	be.PutUint64(b[offDataOffset:], ^uint64(0))
	copy(b[offApp:], creatorApp)
	be.PutUint32(b[offAppVersion:], creatorVersion)
	copy(b[offHost:], hostWindows)
	be.PutUint64(b[offOriginal:], uint64(f.Size))
	be.PutUint64(b[offSize:], uint64(f.Size))
	be.PutUint32(b[offGeometry:], geometryOf(f.Size/SectorSize).encode())
	be.PutUint32(b[offType:], typeFixed)
	copy(b[offID:], f.ID[:])
	be.PutUint32(b[offChecksum:], checksum(b))
	return b, nil
}

// Parse takes a footer's sector apart, whoever made it. Its errors say which field
// is wrong, and wrap ErrInvalid.
func Parse(sector []byte) (Footer, error) {
	if len(sector) != FooterSize {
		return Footer{}, fmt.Errorf("%w: its footer has %d bytes, not %d", ErrInvalid, len(sector), FooterSize)
	}
	be := binary.BigEndian
	f := Footer{Size: int64(be.Uint64(sector[offSize:]))}
	copy(f.ID[:], sector[offID:])
	switch got := checksum(sector); {
	case string(sector[:len(cookie)]) != cookie:
		return Footer{}, fmt.Errorf("%w: its last sector doesn't begin with %q: it was truncated, or is another kind of file", ErrInvalid, cookie)
	case got != be.Uint32(sector[offChecksum:]):
		return Footer{}, fmt.Errorf("%w: the footer's checksum is %08x, its bytes give %08x: it was altered", ErrInvalid, be.Uint32(sector[offChecksum:]), got)
	case be.Uint32(sector[offVersion:])>>16 != formatVersion>>16:
		return Footer{}, fmt.Errorf("%w: version %08x of the format is unknown", ErrInvalid, be.Uint32(sector[offVersion:]))
	case be.Uint32(sector[offType:]) != typeFixed:
		return Footer{}, fmt.Errorf("%w: the disk is of type %d, fixed ones are %d", ErrInvalid, be.Uint32(sector[offType:]), typeFixed)
	case be.Uint64(sector[offDataOffset:]) != ^uint64(0):
		return Footer{}, fmt.Errorf("%w: the footer has the data offset %#x, in a fixed disk all bits are set", ErrInvalid, be.Uint64(sector[offDataOffset:]))
	case f.Size <= 0 || f.Size > MaxSize || f.Size%SectorSize != 0:
		return Footer{}, fmt.Errorf("%w: a disk can't have %d bytes", ErrInvalid, f.Size)
	}
	want := geometryOf(f.Size / SectorSize).encode()
	if got := be.Uint32(sector[offGeometry:]); got != want {
		return Footer{}, fmt.Errorf("%w: the footer has the geometry %08x, a disk of %d bytes has %08x", ErrInvalid, got, f.Size, want)
	}
	if sector[offState] != 0 || len(bytes.TrimLeft(sector[offReserved:], "\x00")) != 0 {
		return Footer{}, fmt.Errorf("%w: the footer has a saved state, or something behind its last field", ErrInvalid)
	}
	return f, nil
}

// Read reads the footer of a file of the given length in bytes, and checks that it
// describes that file. Errors are those of r and of Parse.
func Read(r io.ReaderAt, length int64) (Footer, error) {
	if length < FooterSize+SectorSize {
		return Footer{}, fmt.Errorf("%w: %d bytes are too few", ErrInvalid, length)
	}
	sector := make([]byte, FooterSize)
	if n, err := r.ReadAt(sector, length-FooterSize); n < len(sector) {
		return Footer{}, fmt.Errorf("vhd: reading the footer at %d: %w", length-FooterSize, err)
	}
	f, err := Parse(sector)
	if err == nil && f.Size != length-FooterSize {
		return Footer{}, fmt.Errorf("%w: the footer is of a disk of %d bytes, %d are before it", ErrInvalid, f.Size, length-FooterSize)
	}
	return f, err
}

// checksum is the complement of the sum of all bytes but the checksum's own.
func checksum(sector []byte) uint32 {
	var sum uint32
	for i, b := range sector {
		if i < offChecksum || i >= offID {
			sum += uint32(b)
		}
	}
	return ^sum
}
