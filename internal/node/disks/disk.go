package disks

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"sluice/internal/artifact"
	"sluice/internal/durable"
	"sluice/internal/erofs"
	"sluice/internal/node/cache"
	"sluice/internal/node/plane"
	"sluice/internal/vhd"
	"sluice/oci"
)

// content says which file a disk is.
type content struct {
	Digest    oci.Digest `json:"digest"`    // of the VHD
	Size      int64      `json:"size"`      // in bytes
	Sums      oci.Digest `json:"sums"`      // of the file of sums
	BlockSize int64      `json:"blockSize"` // of each of which there's a sum
}

// maxBlocks bounds the blocks of a disk, 256 GiB at the registry's block size: a node
// has some bytes of memory for each. vhd has a bound of its own.
const maxBlocks = 1 << 20

// check returns an error if there can't be such a disk.
func (c content) check() error {
	for _, d := range []oci.Digest{c.Digest, c.Sums} {
		if _, err := oci.ParseDigest(d.String()); err != nil {
			return err
		}
		if d.Algorithm() != oci.SHA256 {
			return fmt.Errorf("%s isn't a sha256 digest", d)
		}
	}
	switch {
	case c.Size < erofs.HeadSize+vhd.FooterSize || c.Size > vhd.MaxSize+vhd.FooterSize:
		return fmt.Errorf("a disk can't have %d bytes", c.Size)
	case c.BlockSize < erofs.HeadSize || c.BlockSize > artifact.MaxChunkLength:
		return fmt.Errorf("sums of blocks of %d bytes: %d to %d are allowed", c.BlockSize, erofs.HeadSize, artifact.MaxChunkLength)
	case c.blocks() > maxBlocks:
		return fmt.Errorf("%d blocks of %d bytes: %d are allowed", c.blocks(), c.BlockSize, maxBlocks)
	}
	return nil
}

// blocks is how many blocks the disk has.
func (c content) blocks() int64 { return (c.Size + c.BlockSize - 1) / c.BlockSize }

// sumsSize is the length of its file of sums, in bytes.
func (c content) sumsSize() int64 { return c.blocks() * sha256.Size }

// name is what the disk is called here.
func (c content) name() string {
	doc, err := json.Marshal(c)
	if err != nil {
		panic(err) // strings and numbers only
	}
	return oci.DigestOf(doc).Encoded()
}

// The files of a disk's directory.
const (
	fileSums = "sums"
	fileHead = "head"
)

// pointDigits is how many digits of its name the directory has where a disk is
// mounted. All of them, of many layers, must have place among the options of an
// overlayfs; that two disks have the same is possible, and an error.
const pointDigits = 16

// disk is an expanded layer.
type disk struct {
	content
	dir   string // of its files
	point string // where it's mounted, or can be

	// lock holds a token while nobody fetches, mounts or unmounts the disk. It guards
	// what follows, of which what Manager.mu guards, too, changes only with both.
	lock    chan struct{}
	device  *artifact.Device // nil: its files aren't here; Manager.mu, too
	windows []window         // of the devices; nil: the head hasn't been checked yet
	cached  *cache.Layer     // nil: nobody needs its content; Manager.mu, too

	meter cache.Meter // what reading it costs

	// What follows is guarded by Manager.mu.
	attached bool
	owners   map[owner]bool
	using    int // pulls and mounts under way
	used     time.Time
	places   []place // where the file is, the newest first
	problem  error   // why it couldn't be mounted the last time
}

// owner is somebody who uses a disk as a layer of an image.
type owner struct {
	name  string
	image oci.Digest
}

// place is where a disk's file is.
type place struct {
	repo *repo
	path string
}

// window is a part of a disk that is a device of its metadata.
type window struct{ off, size int64 }

// diskOf returns the disk that has the content, making it known. The caller has
// Manager.mu.
func (m *Manager) diskOf(c content) *disk {
	d := m.disks[c]
	if d == nil {
		name := c.name()
		d = &disk{
			content: c, dir: filepath.Join(m.disksDir(), name), point: filepath.Join(m.mountsDir(), name[:pointDigits]),
			lock: make(chan struct{}, 1), owners: make(map[owner]bool), used: time.Now(),
		}
		d.lock <- struct{}{}
		m.disks[c] = d
	}
	return d
}

// allDisks returns all disks. The caller has m.mu.
func (m *Manager) allDisks() []*disk { return slices.Collect(maps.Values(m.disks)) }

// use returns the disk that has the content, which isn't removed before done was
// called for it.
func (m *Manager) use(c content) *disk {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.diskOf(c)
	d.using++
	return d
}

func (m *Manager) done(d *disk) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d.using--
	d.used = time.Now()
}

// take takes the disk's lock.
func (d *disk) take(ctx context.Context) error {
	select {
	case <-d.lock:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// give gives the disk's lock back.
func (d *disk) give() { d.lock <- struct{}{} }

// ownedFor reports whether somebody uses the disk as a layer of the image. The caller
// has Manager.mu.
func (d *disk) ownedFor(image oci.Digest) bool {
	for o := range d.owners {
		if o.image == image {
			return true
		}
	}
	return false
}

// addPlace remembers where the file is, too. The caller has Manager.mu.
func (d *disk) addPlace(p place) {
	d.places = slices.DeleteFunc(d.places, func(q place) bool { return p == q })
	d.places = append([]place{p}, d.places...)
	d.places = d.places[:min(len(d.places), maxOrigins)]
}

// load reads the disk's sums, and returns the device that it is by them.
func (d *disk) load() (*artifact.Device, error) {
	if err := d.check(); err != nil {
		return nil, err
	}
	sums, err := durable.ReadFile(filepath.Join(d.dir, fileSums), d.sumsSize())
	if err != nil {
		return nil, err
	}
	return d.deviceOf(sums)
}

// deviceOf returns the device that the disk is by the given sums, if they are its.
func (d *disk) deviceOf(sums []byte) (*artifact.Device, error) {
	if got := oci.DigestOf(sums); got != d.Sums {
		return nil, oci.ErrDigestInvalid.Withf("its %d bytes of sums have digest %s, not %s", len(sums), got, d.Sums)
	}
	dev, err := artifact.StoredDevice(d.Size, d.Digest, d.BlockSize, sums)
	if err != nil {
		return nil, oci.ErrSizeInvalid.Withf("%v", err)
	}
	return dev, nil
}

// open checks the head by the sums, and sets the windows. The caller has the lock.
func (d *disk) open(ctx context.Context) error {
	if d.windows != nil {
		return nil
	}
	f, err := os.Open(filepath.Join(d.dir, fileHead))
	if err != nil {
		return err
	}
	defer f.Close()
	if err := d.checkHead(ctx, f); err != nil {
		return err
	}
	fs, err := openHead(f)
	if err != nil {
		return err
	}
	d.windows, err = d.windowsOf(fs)
	return err
}

// checkHead checks that a file has the disk's first blocks, as many as the metadata
// needs.
func (d *disk) checkHead(ctx context.Context, f *os.File) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	var off int64
	buf := make([]byte, artifact.MaxChunkLength)
	for i := 0; off < fi.Size(); i++ {
		c, err := d.device.Chunk(ctx, i)
		if err != nil {
			return err
		}
		block := buf[:c.BlobLength]
		if _, err := f.ReadAt(block, off); err != nil {
			return err
		}
		if sha256.Sum256(block) != c.Digest {
			return oci.ErrDigestInvalid.Withf("block %d of the head isn't what its sum says", i)
		}
		off += int64(c.Length)
	}
	return nil
}

// openHead opens the metadata in a disk's first blocks.
func openHead(f io.ReaderAt) (*erofs.FS, error) {
	first := make([]byte, erofs.HeadSize)
	if n, err := f.ReadAt(first, 0); n < len(first) {
		return nil, errors.Join(err, io.ErrUnexpectedEOF)
	}
	size, err := erofs.ImageSize(first)
	if err != nil {
		return nil, err
	}
	return erofs.Open(f, size)
}

// windowsOf returns where in the disk the metadata's devices are: one behind the
// other, behind the metadata.
func (d *disk) windowsOf(fs *erofs.FS) ([]window, error) {
	devices := fs.Devices()
	if len(devices) < 1 || len(devices) > 2 {
		return nil, fmt.Errorf("%w: it has %d devices: the disk of a layer has one or two", erofs.ErrCorrupt, len(devices))
	}
	windows := make([]window, 0, len(devices))
	end := fs.Size()
	for _, dev := range devices {
		windows = append(windows, window{end, dev.Size})
		end += dev.Size
	}
	if end > d.Size-vhd.FooterSize {
		return nil, fmt.Errorf("%w: it and its devices have %d bytes, the disk has %d", erofs.ErrCorrupt, end, d.Size-vhd.FooterSize)
	}
	return windows, nil
}

// planeImage returns what the plane mounts: the windows of the cached disk. The caller
// has the lock; the head has been checked, and the content is acquired.
func (d *disk) planeImage() plane.Image {
	img := plane.Image{Metadata: filepath.Join(d.dir, fileHead)}
	for i, w := range d.windows {
		img.Devices = append(img.Devices, plane.Device{
			Name:    fmt.Sprintf("%s-%s.%d", d.device.Key.Algorithm(), d.device.Key.Encoded(), i),
			Size:    w.size,
			Content: view{d.cached, w.off},
		})
	}
	return img
}

// view is the content of a window.
type view struct {
	layer *cache.Layer
	off   int64
}

// ReadAt implements plane.Content.
func (v view) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	return v.layer.ReadAt(ctx, p, v.off+off)
}

// Complete implements plane.Completer.
func (v view) Complete() bool { return v.layer.Complete() }
