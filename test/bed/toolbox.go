package bed

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Toolbox is a small image: a shell with the usual tools, and layers of random
// files, which no two seeds have in common.
type Toolbox struct {
	Layout string            // OCI image layout
	Sums   map[string]string // SHA-256 in hex of the random files, by absolute path
}

// toolboxTools are the commands of the image.
const toolboxTools = "sh cat sleep sha256sum id stat ls touch rm sync mkdir date grep"

// NewToolbox makes an image of two layers and one more for each of sizes, which
// has a file of that many bytes, in a new directory dir. Its command sleeps.
func NewToolbox(ctx context.Context, dir string, seed uint64, sizes ...int) (Toolbox, error) {
	if err := Install(ctx, "busybox-static"); err != nil {
		return Toolbox{}, err
	}
	program, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return Toolbox{}, err
	}
	box := Toolbox{Layout: filepath.Join(dir, "layout"), Sums: map[string]string{}}
	shell := []member{{"bin/busybox", program, ""}}
	for tool := range strings.FieldsSeq(toolboxTools) {
		shell = append(shell, member{"bin/" + tool, nil, "busybox"})
	}
	users := []member{{"etc/passwd", []byte("root:x:0:0:root:/:/bin/sh\n"), ""}, {"etc/group", []byte("root:x:0:\n"), ""}}
	layers := [][]member{shell, users}
	rng := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), 1})
	for i, size := range sizes {
		content := make([]byte, size)
		rng.Read(content)
		name := fmt.Sprintf("data/%d", i)
		layers = append(layers, []member{{name, content, ""}})
		box.Sums["/"+name] = fmt.Sprintf("%x", sha256.Sum256(content))
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return Toolbox{}, err
	}
	var tars []string
	for i, l := range layers {
		name := filepath.Join(dir, fmt.Sprintf("%d.tar", i))
		if err := writeMembers(name, l); err != nil {
			return Toolbox{}, err
		}
		tars = append(tars, name)
	}
	return box, WriteLayout(box.Layout, []string{"/bin/sleep", "1000000"}, tars)
}

// member is an entry of a tar: a file, or a symbolic link.
type member struct {
	name    string
	content []byte
	link    string
}

// writeMembers writes a tar in which each entry's directory comes before it.
func writeMembers(name string, members []member) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	w := tar.NewWriter(f)
	made := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	dirs := map[string]bool{}
	for _, m := range members {
		if dir := filepath.Dir(m.name); !dirs[dir] {
			dirs[dir] = true
			if err := w.WriteHeader(&tar.Header{Name: dir + "/", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: made}); err != nil {
				return err
			}
		}
		h := &tar.Header{Name: m.name, Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(m.content)), ModTime: made}
		if m.link != "" {
			h.Typeflag, h.Linkname = tar.TypeSymlink, m.link
		}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if _, err := w.Write(m.content); err != nil {
			return err
		}
	}
	return errors.Join(w.Close(), f.Close())
}
