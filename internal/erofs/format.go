package erofs

import (
	"encoding/binary"
	"hash/crc32"
)

// BlockSize is the size in bytes of the file system's blocks: extents start at
// multiples of it, in the file and on the device.
const BlockSize = 512

const (
	blockBits  = 9
	superOff   = 1024
	superSize  = 128
	slotSize   = 128 // one device in the device table, also the unit of its offset
	devtabOff  = superOff + superSize
	magic      = 0xE0F5E1E2
	nidUnit    = 32
	nidBits    = 5
	rootNID    = BlockSize / nidUnit // see the package comment
	maxDevices = 1<<16 - 1
	maxTag     = 64

	featureCompatChecksum = 0x1
	featureCompatMtime    = 0x2
	featureCompat         = featureCompatChecksum | featureCompatMtime

	featureIncompatChunked = 0x4
	featureIncompatDevices = 0x8
	featureIncompat        = featureIncompatChunked | featureIncompatDevices
)

// Offsets in the superblock of what is not zero in our images.
const (
	sbMagic      = 0
	sbChecksum   = 4
	sbCompat     = 8
	sbBlockBits  = 12
	sbRootNID    = 14
	sbInodes     = 16
	sbBlocks     = 36
	sbMetaBlock  = 40
	sbXattrBlock = 44
	sbUUID       = 48
	sbIncompat   = 80
	sbDevices    = 86
	sbDevtabSlot = 88
)

// Offsets in a slot of the device table, after the tag.
const (
	slotBlocks  = 64
	slotUniaddr = 68
)

// The 64-byte inode.
const (
	inodeSize = 64

	inFormat    = 0
	inXattrs    = 2
	inMode      = 4
	inUpper     = 6 // upper half of addresses, for 48-bit images only: zero
	inSize      = 8
	inUnion     = 16 // start block, device number or chunk format
	inIno       = 20
	inUID       = 24
	inGID       = 28
	inMtime     = 32
	inMtimeNsec = 40
	inNlink     = 44
	inReserved  = 48

	formatExtended = 1 // bit 0 of the format: the 64-byte kind
	layoutPlain    = 0 // bits 1 to 3 of the format
	layoutInline   = 2
	layoutChunked  = 4
)

// Chunk indexes.
const (
	chunkIndexSize   = 8
	chunkIndexes     = 0x20 // in the chunk format: 8-byte indexes
	maxChunkBits     = 31   // chunk size = BlockSize << bits
	nullBlock        = 0xffffffff
	maxDeviceBlocks  = 1<<32 - 1
	maxChunksPerFile = 1 << 22
)

// Extended attributes.
const (
	xattrHeaderSize = 12
	xattrEntrySize  = 4
	maxXattrName    = 255
	maxXattrValue   = 1<<16 - 1
	maxXattrIcount  = 1<<16 - 1
	maxSharedXattrs = 255

	xattrUser       = 1
	xattrACLAccess  = 2
	xattrACLDefault = 3
	xattrTrusted    = 4
	xattrSecurity   = 6
)

const (
	direntSize = 12
	maxName    = 255
	maxTarget  = 4095 // PATH_MAX less the terminating zero
)

// File type bits of a mode. They are the same on every Linux architecture, and
// written out here so that images can be made and checked on any system.
const (
	modeType    = 0o170000
	modeFIFO    = 0o010000
	modeChar    = 0o020000
	modeDir     = 0o040000
	modeBlock   = 0o060000
	modeRegular = 0o100000
	modeSymlink = 0o120000
	modeSocket  = 0o140000
	modeAll     = 0o177777
)

// fileType returns the directory entry's type for mode, 0 for an unknown one.
func fileType(mode uint32) byte {
	switch mode & modeType {
	case modeRegular:
		return 1
	case modeDir:
		return 2
	case modeChar:
		return 3
	case modeBlock:
		return 4
	case modeFIFO:
		return 5
	case modeSocket:
		return 6
	case modeSymlink:
		return 7
	}
	return 0
}

// typeMode is the reverse of fileType: 0 for an unknown type.
func typeMode(t byte) uint32 {
	modes := [...]uint32{0, modeRegular, modeDir, modeChar, modeBlock, modeFIFO, modeSocket, modeSymlink}
	if int(t) >= len(modes) {
		return 0
	}
	return modes[t]
}

var le = binary.LittleEndian

// checksum is the superblock's: CRC-32C without the final inversion, over the
// superblock's whole block with the checksum itself taken as zero
// (erofs_superblock_csum_verify in fs/erofs/super.c).
func checksum(block []byte) uint32 {
	var zero [4]byte
	table := crc32.MakeTable(crc32.Castagnoli)
	c := crc32.Update(0, table, block[:sbChecksum])
	c = crc32.Update(c, table, zero[:])
	return ^crc32.Update(c, table, block[sbChecksum+4:])
}

func roundUp(n, unit int64) int64 { return (n + unit - 1) / unit * unit }

// blocksOf returns how many blocks n bytes take, for any n >= 0.
func blocksOf(n int64) int64 { return n/BlockSize + min(1, n%BlockSize) }
