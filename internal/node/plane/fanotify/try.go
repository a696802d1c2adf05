package fanotify

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"sluice/internal/erofs"
	"sluice/internal/node/plane"
)

// probeDir is the directory of try, in Options.Dir.
const probeDir = "probe"

// known is the content of the device that try makes.
type known []byte

// ReadAt implements plane.Content.
func (k known) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	return copy(p, k[off:]), nil
}

// try attaches an image and reads it. A kernel that doesn't ask shows zeros, so
// nothing less than that tells whether this one does.
func (p *Plane) try(ctx context.Context) error {
	dir := filepath.Join(p.opts.Dir, probeDir)
	img, content, err := probeImage(dir)
	defer os.RemoveAll(dir)
	if err != nil {
		return err
	}
	at := filepath.Join(dir, "image")
	if err := p.Attach(ctx, img, at); err != nil {
		return fmt.Errorf("try an image: %w", err)
	}
	got, rerr := os.ReadFile(filepath.Join(at, "file"))
	if err := p.Detach(ctx, at); err != nil {
		return errors.Join(rerr, fmt.Errorf("try an image: %w", err))
	}
	if rerr != nil || !bytes.Equal(got, content) {
		return &plane.UnsupportedError{Reasons: []string{fmt.Sprintf(
			"the kernel doesn't ask before EROFS reads a marked file, which needs Linux 6.15 (reading an image that was made to try it: %v)", rerr)}}
	}
	return nil
}

// probeImage makes an image with one file on a lazy device.
func probeImage(dir string) (img plane.Image, content known, err error) {
	if err := os.MkdirAll(filepath.Join(dir, "image"), 0o700); err != nil {
		return img, nil, err
	}
	content = bytes.Repeat([]byte("fanotify"), 1<<10)
	size := int64(len(content))
	var metadata bytes.Buffer
	_, err = erofs.Write(&metadata, erofs.Image{
		Root: &erofs.Inode{Mode: unix.S_IFDIR | 0o700, Entries: []erofs.Entry{{Name: "file", Inode: &erofs.Inode{
			Mode: unix.S_IFREG | 0o400, Size: size, Extents: []erofs.Extent{{Length: size}},
		}}}},
		Devices: []erofs.Device{{Size: size}},
	})
	if err != nil {
		return img, nil, err
	}
	img = plane.Image{
		Metadata: filepath.Join(dir, "metadata.erofs"),
		Devices:  []plane.Device{{Name: "probe", Size: size, Content: content}},
	}
	return img, content, os.WriteFile(img.Metadata, metadata.Bytes(), 0o600)
}
