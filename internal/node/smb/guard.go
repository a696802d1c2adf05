package smb

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"sync/atomic"
)

const (
	// dialect is SMB 3.1.1, the first in which nobody between can have the two agree
	// on less than they can do.
	dialect = 0x0311

	// maxFrame is what a frame may have in bytes: an answer to the largest request.
	maxFrame = partSize + 64<<10

	frameHeader = 4  // a zero and the length (MS-SMB2, section 2.1)
	smbHeader   = 64 // section 2.2.1
)

var (
	plainMagic  = []byte("\xfeSMB")
	sealedMagic = []byte("\xfdSMB") // section 2.2.41
)

// guard is a connection over which nothing comes but frames of a bearable size, of SMB
// 3.1.1, and, once it is sealed, nothing comes or goes that isn't encrypted. A server,
// or somebody between, could otherwise talk the library out of it.
//
// Read and Write belong to one goroutine each.
type guard struct {
	net.Conn
	sealed atomic.Bool

	r    *bufio.Reader
	left int // of the frame that is being read

	out []byte // the header of a frame that is to be written with it
}

func newGuard(c net.Conn) *guard {
	return &guard{Conn: c, r: bufio.NewReaderSize(c, 64<<10)}
}

func (g *guard) Read(p []byte) (int, error) {
	if g.left == 0 {
		n, err := g.frame()
		if err != nil {
			return 0, err
		}
		g.left = n
	}
	n, err := g.r.Read(p[:min(len(p), g.left)])
	g.left -= n
	return n, err
}

// frame looks at the beginning of a frame, and returns its length.
func (g *guard) frame() (int, error) {
	head, err := g.r.Peek(frameHeader + len(plainMagic))
	if err != nil {
		return 0, err
	}
	n := int(binary.BigEndian.Uint32(head))
	if n < smbHeader || n > maxFrame {
		return 0, fmt.Errorf("the server sends %d bytes at once", n)
	}
	if g.sealed.Load() {
		return frameHeader + n, sealedOnly(head[frameHeader:])
	}
	if !bytes.Equal(head[frameHeader:], plainMagic) {
		return 0, fmt.Errorf("the server doesn't speak SMB 3: it sends %x", head)
	}
	// The command is at byte 12 of the header, and 0 is NEGOTIATE, of whose answer
	// the dialect is at byte 4 (section 2.2.4). After an error there is none.
	if head, err = g.r.Peek(frameHeader + min(n, smbHeader+6)); err != nil {
		return 0, err
	}
	head = head[frameHeader:]
	if binary.LittleEndian.Uint16(head[12:]) == 0 && binary.LittleEndian.Uint32(head[8:]) == 0 {
		if len(head) < smbHeader+6 || binary.LittleEndian.Uint16(head[smbHeader+4:]) != dialect {
			return 0, fmt.Errorf("the server doesn't speak SMB 3.1.1, which is asked for")
		}
	}
	return frameHeader + n, nil
}

func sealedOnly(magic []byte) error {
	if !bytes.Equal(magic, sealedMagic) {
		return fmt.Errorf("the server doesn't encrypt: it is to require encryption of everybody")
	}
	return nil
}

// Write writes a frame in one piece, whose header the library writes first.
func (g *guard) Write(p []byte) (int, error) {
	if len(g.out) == 0 && len(p) == frameHeader {
		g.out = append(g.out, p...)
		return len(p), nil
	}
	if g.sealed.Load() {
		if err := sealedOnly(p[:min(len(p), len(sealedMagic))]); err != nil {
			return 0, err
		}
	}
	g.out = append(g.out, p...)
	_, err := g.Conn.Write(g.out)
	g.out = g.out[:0]
	if err != nil {
		return 0, err
	}
	return len(p), nil
}
