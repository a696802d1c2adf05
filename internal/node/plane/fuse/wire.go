package fuse

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// The messages of /dev/fuse, as include/uapi/linux/fuse.h has them: numbers in
// the machine's byte order at fixed offsets. Only what this server uses is here.
var ne = binary.NativeEndian

const (
	inHeaderSize  = 40 // struct fuse_in_header
	outHeaderSize = 16 // struct fuse_out_header

	// requestSize is the buffer for one request. The kernel wants
	// FUSE_MIN_READ_BUFFER; no request to a read-only file system is longer
	// (names are at most 255 bytes), and BATCH_FORGET fills what there is.
	requestSize = 8192

	// maxRead is the longest READ: FUSE_MAX_PAGES at 256 pages of 4 KiB.
	maxRead  = 1 << 20
	maxPages = maxRead / 4096

	// maxReply is the longest reply that is not data: enough for every
	// struct and for a READDIR of one page.
	maxReply = outHeaderSize + 4096
)

// Opcodes.
const (
	opLookup      = 1
	opForget      = 2
	opGetattr     = 3
	opOpen        = 14
	opRead        = 15
	opStatfs      = 17
	opRelease     = 18
	opInit        = 26
	opOpendir     = 27
	opReaddir     = 28
	opReleasedir  = 29
	opInterrupt   = 36
	opDestroy     = 38
	opBatchForget = 42
)

// INIT flags; those above bit 31 travel in flags2.
const (
	initAsyncRead      = 1 << 0  // several READs of one file at once
	initAsyncDIO       = 1 << 15 // direct I/O of a kernel user (EROFS, loop) too
	initParallelDirops = 1 << 18
	initMaxPages       = 1 << 22
	initExt            = 1 << 30
	initHasResend      = 1 << 39 // FUSE_NOTIFY_RESEND, Linux 6.9
)

const (
	openDirectIO  = 1 << 0 // FOPEN_DIRECT_IO
	openKeepCache = 1 << 1 // FOPEN_KEEP_CACHE

	notifyResend = 7 // FUSE_NOTIFY_RESEND

	devIocClone = 0x8004e500 // FUSE_DEV_IOC_CLONE, _IOR(229, 0, uint32_t)

	rootNode  = 1 // FUSE_ROOT_ID
	pollNode  = 2 // see calmPoller
	firstNode = 3 // of devices
)

// request is one message from the kernel. body aliases the worker's buffer.
type request struct {
	op     uint32
	unique uint64
	node   uint64
	body   []byte
}

// parseRequest splits a message. It fails only if the kernel did not keep to
// its own format.
func parseRequest(msg []byte) (request, bool) {
	if len(msg) < inHeaderSize {
		return request{}, false
	}
	n := ne.Uint32(msg)
	if n < inHeaderSize || n > uint32(len(msg)) {
		return request{}, false
	}
	return request{
		op:     ne.Uint32(msg[4:]),
		unique: ne.Uint64(msg[8:]),
		node:   ne.Uint64(msg[16:]),
		body:   msg[inHeaderSize:n],
	}, true
}

// putHeader fills the header of a reply of n bytes in all.
func putHeader(reply []byte, n int, errno unix.Errno, unique uint64) {
	ne.PutUint32(reply[0:], uint32(n))
	ne.PutUint32(reply[4:], uint32(-int32(errno)))
	ne.PutUint64(reply[8:], unique)
}

// How long the kernel may believe what it was told, in seconds. Attributes of a
// node never change. Names are asked for again each time: they are used once
// per attach only, and a name that came back after its device was dropped has
// another node.
const (
	attrSeconds  = 365 * 24 * 3600
	entrySeconds = 0
)

// putAttr fills struct fuse_attr (88 bytes).
func putAttr(b []byte, node uint64, size int64, mode uint32) {
	ne.PutUint64(b[0:], node)
	ne.PutUint64(b[8:], uint64(size))
	ne.PutUint64(b[16:], uint64((size+511)/512))
	ne.PutUint32(b[60:], mode)
	ne.PutUint32(b[64:], 1) // nlink
	ne.PutUint32(b[80:], 4096)
}

const (
	attrSize    = 88
	attrOutSize = 16 + attrSize // struct fuse_attr_out
	entrySize   = 40 + attrSize // struct fuse_entry_out
	openOutSize = 16            // struct fuse_open_out
	statfsSize  = 80            // struct fuse_statfs_out
	initOutSize = 64            // struct fuse_init_out
	readInSize  = 24            // struct fuse_read_in up to its size
)

// putDirent appends a struct fuse_dirent to b if it fits in limit bytes.
func putDirent(b []byte, limit int, node, next uint64, name string, typ uint32) ([]byte, bool) {
	n := 24 + len(name)
	padded := (n + 7) &^ 7
	if len(b)+padded > limit {
		return b, false
	}
	var head [24]byte
	ne.PutUint64(head[0:], node)
	ne.PutUint64(head[8:], next)
	ne.PutUint32(head[16:], uint32(len(name)))
	ne.PutUint32(head[20:], typ)
	b = append(b, head[:]...)
	b = append(b, name...)
	return append(b, make([]byte, padded-n)...), true
}

// negotiated is what INIT settled for the life of a connection.
type negotiated struct {
	Minor        uint32 `json:"minor"`
	Flags        uint64 `json:"flags"`
	MaxReadahead uint32 `json:"max_readahead"`
}

// wantFlags is what is asked for when the kernel has it, needFlags what this
// server cannot do without.
const (
	wantFlags = initAsyncRead | initAsyncDIO | initParallelDirops | initMaxPages | initExt | initHasResend
	needFlags = initAsyncDIO | initMaxPages | initExt
)

// answerInit reads an INIT request's body and writes the reply's body, asking
// for the flags want.
func answerInit(body, out []byte, background int, want uint64) (negotiated, bool) {
	if len(body) < 20 || ne.Uint32(body) != 7 {
		return negotiated{}, false
	}
	offered := uint64(ne.Uint32(body[12:]))
	if offered&initExt != 0 {
		offered |= uint64(ne.Uint32(body[16:])) << 32
	}
	n := negotiated{Minor: ne.Uint32(body[4:]), Flags: offered & want, MaxReadahead: maxRead}
	clear(out[:initOutSize])
	ne.PutUint32(out[0:], 7)
	ne.PutUint32(out[4:], min(n.Minor, 40)) // the last version whose structs these are
	ne.PutUint32(out[8:], n.MaxReadahead)
	ne.PutUint32(out[12:], uint32(n.Flags))
	ne.PutUint16(out[16:], uint16(background))
	ne.PutUint16(out[18:], uint16(background*3/4)) // congestion threshold
	ne.PutUint32(out[20:], 4096)                   // max_write, unused but must be valid
	ne.PutUint32(out[24:], 1)                      // time granularity
	ne.PutUint16(out[28:], maxPages)
	ne.PutUint32(out[32:], uint32(n.Flags>>32))
	return n, n.Flags&needFlags == needFlags
}
