package planetest

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"sluice/internal/erofs"
	"sluice/internal/node/plane"
)

// Dev is a device of a test image.
type Dev struct {
	Content *Content
	Size    int64
	// File makes a complete local file of it.
	File bool
}

// NewDev returns a device with a pattern of its own. Its name in images follows
// from the pattern: equal seeds are the same device.
func NewDev(seed uint64, size int64) Dev {
	return Dev{Content: &Content{Pattern: Pattern(seed)}, Size: size}
}

// File is a file of a test image and what must be in it.
type File struct {
	Name   string
	Size   int64
	Pieces []Piece
}

// Piece is a range of a file.
type Piece struct {
	Pattern Pattern
	Dev     int
	Offset  int64 // on the device
	Length  int64
}

// Image is a test image: what to attach, and what is in it then.
type Image struct {
	Plane plane.Image
	Files []File
}

// Build makes an image in which files cover all of devs: of lengths from one
// byte to megabytes, beginning at multiples of 512 as in a tar, the last one of
// each device ending with it. One more file consists of a piece of each device.
func Build(t testing.TB, devs []Dev) Image {
	t.Helper()
	dir := t.TempDir()
	var img Image
	random := rand.New(rand.NewPCG(uint64(len(devs)), 7))
	across := File{Name: "across"}
	for i, d := range devs {
		for off, n := int64(0), 0; off < d.Size; n++ {
			length := min(1+random.Int64N(1<<(4+random.IntN(18))), d.Size-off)
			if next := (off + length + 511) &^ 511; next >= d.Size {
				length = d.Size - off
			}
			img.Files = append(img.Files, File{
				Name: fmt.Sprintf("d%03d-f%04d", i, n), Size: length,
				Pieces: []Piece{{Pattern: d.Content.Pattern, Dev: i, Offset: off, Length: length}},
			})
			off = (off + length + 511) &^ 511
		}
		if length := min(d.Size&^511, 64<<10); length > 0 {
			across.Pieces = append(across.Pieces, Piece{Pattern: d.Content.Pattern, Dev: i, Offset: 0, Length: length})
			across.Size += length
		}
	}
	if across.Size > 0 {
		img.Files = append(img.Files, across)
	}
	img.Plane = Attachable(t, dir, devs, img.Files)
	return img
}

// Attachable writes the metadata of an image with these files into dir.
func Attachable(t testing.TB, dir string, devs []Dev, files []File) plane.Image {
	t.Helper()
	src := erofs.Image{Root: &erofs.Inode{Mode: unix.S_IFDIR | 0o755}}
	var out plane.Image
	for i, d := range devs {
		src.Devices = append(src.Devices, erofs.Device{Size: (d.Size + 511) &^ 511})
		pd := plane.Device{Name: fmt.Sprintf("test-%016x", uint64(d.Content.Pattern)), Size: d.Size, Content: d.Content}
		if d.File {
			pd.File, pd.Content = filepath.Join(dir, fmt.Sprintf("dev%d", i)), nil
			writePattern(t, pd.File, d)
		}
		out.Devices = append(out.Devices, pd)
	}
	for _, f := range files {
		node := &erofs.Inode{Mode: unix.S_IFREG | 0o644, Size: f.Size}
		at := int64(0)
		for _, p := range f.Pieces {
			node.Extents = append(node.Extents, erofs.Extent{Device: p.Dev, Offset: p.Offset, Length: p.Length, FileOffset: at})
			at += p.Length
		}
		src.Root.Entries = append(src.Root.Entries, erofs.Entry{Name: f.Name, Inode: node})
	}
	var buf bytes.Buffer
	if _, err := erofs.Write(&buf, src); err != nil {
		t.Fatalf("write metadata: %v", err)
	}
	out.Metadata = filepath.Join(dir, "metadata.erofs")
	if err := os.WriteFile(out.Metadata, buf.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return out
}

func writePattern(t testing.TB, name string, d Dev) {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for off := int64(0); off < d.Size; off += int64(len(buf)) {
		b := buf[:min(int64(len(buf)), d.Size-off)]
		d.Content.Pattern.Fill(b, off)
		if _, err := f.Write(b); err != nil {
			t.Fatal(err)
		}
	}
}

// check compares p, read from f at off, with what must be there.
func (f File) check(p []byte, off int64) error {
	start := int64(0)
	for _, piece := range f.Pieces {
		from, to := max(off, start), min(off+int64(len(p)), start+piece.Length)
		if from < to {
			if i := piece.Pattern.Differs(p[from-off:to-off], piece.Offset+from-start); i >= 0 {
				return fmt.Errorf("%s: wrong byte at %d", f.Name, from+int64(i))
			}
		}
		start += piece.Length
	}
	return nil
}
