package disks

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"sluice/internal/artifact"
	"sluice/internal/blob"
	"sluice/internal/durable"
	"sluice/internal/erofs"
	"sluice/internal/node/cache"
	"sluice/internal/node/mount"
	"sluice/internal/teleport/mountapi"
	"sluice/internal/vhd"
	"sluice/oci"
)

// atOnce is how many layers are fetched or mounted at the same time. Both wait for
// others more than they work.
const atOnce = 32

// fetch brings home what an image lacks, mounts its layers and makes it known, and
// kept.
func (m *Manager) fetch(ctx context.Context, rec record, o origin, answer mountapi.Mount) (*image, error) {
	m.mu.Lock()
	r := m.repoOf(o.repo())
	r.pulls[rec.Manifest]++
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		if r.pulls[rec.Manifest]--; r.pulls[rec.Manifest] == 0 {
			delete(r.pulls, rec.Manifest)
		}
		m.mu.Unlock()
	}()
	r.give(answer.SMB)
	var disks []*disk
	defer func() {
		for _, d := range disks {
			m.done(d)
		}
	}()
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(atOnce)
	for i, l := range rec.Layers {
		d := m.use(l.Disk)
		disks = append(disks, d)
		m.mu.Lock()
		d.addPlace(place{r, o.Paths[i]})
		m.mu.Unlock()
		from := answer.Layers[i]
		group.Go(func() error {
			err := m.prepare(gctx, d, func(ctx context.Context) error { return m.fetchDisk(ctx, d, r, from) })
			if err != nil {
				return fmt.Errorf("layer %d: %w", i, err)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	// The record comes last: what it says is there is on the disk.
	if err := durable.SyncDir(m.disksDir()); err != nil {
		return nil, stateError(err)
	}
	return m.install(rec, o, disks)
}

// install stores and makes known an image whose disks are here, and keeps it.
func (m *Manager) install(rec record, o origin, disks []*disk) (*image, error) {
	m.files.Lock()
	defer m.files.Unlock()
	m.mu.Lock()
	img := m.images[rec.id()]
	if img == nil {
		img = newImage(rec, disks)
		img.created = time.Now()
	}
	isNew := img.addOrigin(o)
	img.used, img.removed = time.Now(), false
	m.mu.Unlock()
	if isNew {
		if err := m.save(img); err != nil {
			return nil, stateError(err)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.enter(img)
	img.kept++
	return img, nil
}

// stateError is the error of storing what an image needs.
func stateError(err error) error {
	return notStreaming(mount.PlaneUnavailable, "store the image: %w", err)
}

// parts is what of a disk is read before anything can be known of it.
type parts struct{ sums, first []byte }

// fetchDisk brings home what mounting a disk needs: sums and metadata. What isn't what
// it should be is asked for once more: it may be of a file that was replaced. The caller
// has the disk's lock.
func (m *Manager) fetchDisk(ctx context.Context, d *disk, r *repo, l mountapi.Layer) error {
	p, dev, err := m.readParts(ctx, d, r, l)
	if err != nil && reasonFor(err) == mount.IntegrityFailure {
		p, dev, err = m.readParts(blob.Doubt(ctx), d, r, l)
	}
	if ctx.Err() == nil {
		r.noteProblem(err)
	}
	if err != nil {
		return err
	}
	layer, err := m.opts.Cache.Acquire(ctx, dev, m.source(d), &d.meter)
	if err != nil {
		return cacheError(err)
	}
	_ = layer.PutFrame(ctx, 0, p.first) // what the disk doesn't take is read again
	windows, err := m.store(ctx, d, layer, p)
	if err != nil {
		layer.Release()
		m.opts.Cache.Remove(dev.Key)
		return err
	}
	m.mu.Lock()
	d.device, d.windows, d.cached = dev, windows, layer
	m.mu.Unlock()
	return nil
}

// readParts reads a disk's sums, first block and footer, and checks them. They are
// asked for at the same time, so that it takes as long as one file takes to be opened
// and read.
func (m *Manager) readParts(ctx context.Context, d *disk, r *repo, l mountapi.Layer) (p parts, dev *artifact.Device, err error) {
	src := blob.Count(r.share.Open(l.Path, d.Size, d.Digest), &m.counter)
	p.first = make([]byte, min(d.BlockSize, d.Size))
	group, gctx := errgroup.WithContext(ctx)
	group.Go(func() (err error) {
		m.counter.Requests.Add(1)
		p.sums, err = r.share.ReadFile(gctx, l.Sums.Path, d.sumsSize())
		m.counter.Bytes.Add(int64(len(p.sums)))
		return err
	})
	group.Go(func() error { return blob.ReadFull(gctx, src, p.first, 0) })
	group.Go(func() error { return d.checkFooter(gctx, src) })
	if err := group.Wait(); err != nil {
		return p, nil, err
	}
	if dev, err = d.deviceOf(p.sums); err != nil {
		return p, nil, err
	}
	c, err := dev.Chunk(ctx, 0)
	if err == nil && sha256.Sum256(p.first) != c.Digest {
		err = oci.ErrDigestInvalid.Withf("the first block of %s isn't what its sum says", l.Path)
	}
	return p, dev, err
}

// readerAt is an io.ReaderAt.
type readerAt func(p []byte, off int64) (int, error)

// ReadAt implements io.ReaderAt.
func (f readerAt) ReadAt(p []byte, off int64) (int, error) { return f(p, off) }

// checkFooter checks that the file is a VHD that ends where it's said to.
func (d *disk) checkFooter(ctx context.Context, src blob.Source) error {
	var failed error
	_, err := vhd.Read(readerAt(func(p []byte, off int64) (int, error) {
		if failed = blob.ReadFull(ctx, src, p, off); failed != nil {
			return 0, failed
		}
		return len(p), nil
	}), d.Size)
	if failed != nil {
		return failed
	}
	return err
}

// cacheError is the error of the cache for a disk.
func cacheError(err error) error {
	var integrity *cache.IntegrityError
	if errors.As(err, &integrity) {
		return &mount.NotStreaming{Reason: mount.IntegrityFailure, Err: err}
	}
	return &mount.NotStreaming{Reason: mount.PlaneUnavailable, Err: err}
}

// store makes a disk's directory, with its sums and its head, which is checked. The
// caller has the disk's lock.
func (m *Manager) store(ctx context.Context, d *disk, layer *cache.Layer, p parts) ([]window, error) {
	tmp, err := os.MkdirTemp(m.disksDir(), durable.TempPrefix)
	if err != nil {
		return nil, stateError(err)
	}
	defer os.RemoveAll(tmp) // it's gone already when all went well
	head, err := os.OpenFile(filepath.Join(tmp, fileHead), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, stateError(err)
	}
	defer head.Close()
	windows, err := d.copyHead(ctx, head, layer, p.first)
	if err != nil {
		return nil, err
	}
	var group errgroup.Group
	group.Go(head.Sync)
	group.Go(func() error { return writeSynced(filepath.Join(tmp, fileSums), p.sums) })
	if err := group.Wait(); err != nil {
		return nil, stateError(err)
	}
	if err := durable.SyncDir(tmp); err != nil {
		return nil, stateError(err)
	}
	m.files.Lock()
	defer m.files.Unlock()
	if err := os.RemoveAll(d.dir); err != nil { // what was here of it isn't what it was
		return nil, stateError(err)
	}
	if err := os.Rename(tmp, d.dir); err != nil {
		return nil, stateError(err)
	}
	return windows, nil
}

// copyPiece is how much of a large head is read at a time, in bytes.
const copyPiece = 4 << 20

// copyHead copies the disk's first blocks to a file, as many as have metadata, checks
// the metadata, and returns where its devices are.
func (d *disk) copyHead(ctx context.Context, head *os.File, layer *cache.Layer, first []byte) ([]window, error) {
	size, err := erofs.ImageSize(first)
	if err != nil {
		return nil, err
	}
	if size <= 0 || size > min(d.Size, artifact.MaxMetadataSize) {
		return nil, fmt.Errorf("%w: %d bytes of metadata, of a disk of %d", erofs.ErrTooLarge, size, d.Size)
	}
	end := min((size+d.BlockSize-1)/d.BlockSize*d.BlockSize, d.Size)
	rest := io.NewSectionReader(readerAt(func(p []byte, off int64) (int, error) { return layer.ReadAt(ctx, p, off) }), int64(len(first)), end-int64(len(first)))
	if _, err := io.CopyBuffer(struct{ io.Writer }{head}, io.MultiReader(bytes.NewReader(first), rest), make([]byte, min(copyPiece, end))); err != nil {
		return nil, err
	}
	fs, err := openHead(head)
	if err != nil {
		return nil, err
	}
	windows, err := d.windowsOf(fs)
	if err != nil {
		return nil, err
	}
	var sizes []int64
	for _, w := range windows {
		sizes = append(sizes, w.size)
	}
	_, err = fs.Check(ctx, erofs.Limits{Size: artifact.MaxMetadataSize, Devices: sizes})
	return windows, err
}

// writeSynced makes a file whose content is on the disk.
func writeSynced(name string, content []byte) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	return errors.Join(err, f.Sync(), f.Close())
}
