package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"sluice/internal/artifact"
	"sluice/internal/durable"
	"sluice/oci"
)

// maxQueuedFills bounds the images that wait to be filled; what doesn't fit is
// found again by the next sweep.
const maxQueuedFills = 4096

// bootTimeout bounds how long a boot pack may take. It's only a help.
const bootTimeout = 5 * time.Minute

// startTime is how long a container has to start before the rest of its image
// comes: unpacking that would take processors away from it.
const startTime = 3 * time.Second

// boot readies the cache for an image that is being pulled and fetches its
// boot pack; then, after a while, it queues the image to be filled.
func (m *Manager) boot(ctx context.Context, img *image) {
	began := time.Now()
	switch err := m.work(ctx, img, m.bootPack); {
	case ctx.Err() != nil || img.isGone():
		return
	case err != nil:
		m.log.WarnContext(ctx, "boot pack is of no use: start-up reads chunk by chunk", "image", img.id, "error", err)
	case img.manifest.BootPack != nil:
		m.log.DebugContext(ctx, "boot pack is here", "image", img.id, "duration", time.Since(began))
	}
	pause := time.NewTimer(startTime)
	defer pause.Stop()
	select {
	case <-ctx.Done():
	case <-img.gone:
	case <-pause.C:
		m.queueFill(img.id)
	}
}

// work does background work for an image, until it is done or the image is
// gone. What the work brought of an image that is gone is removed.
func (m *Manager) work(ctx context.Context, img *image, do func(context.Context, *image) error) error {
	within, cancel := context.WithCancelCause(ctx)
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		select {
		case <-img.gone:
			cancel(ErrUnknownImage)
		case <-within.Done():
		}
	}()
	err := do(within, img)
	cancel(nil)
	<-stopped
	if img.isGone() {
		m.dropContent(ctx, img)
	}
	return err
}

// isGone reports whether the node has the image no more.
func (img *image) isGone() bool {
	select {
	case <-img.gone:
		return true
	default:
		return false
	}
}

// bootPack puts a boot pack's chunks into the cache while they arrive. Readers
// of those that are still to come wait for them, as long as it gets on.
func (m *Manager) bootPack(ctx context.Context, img *image) (err error) {
	desc := img.manifest.BootPack
	if desc == nil {
		return nil
	}
	ctx, span := m.step(ctx, "boot pack")
	defer func() { end(span, err) }()
	ctx, cancel := context.WithTimeoutCause(ctx, bootTimeout, fmt.Errorf("it didn't arrive within %v", bootTimeout))
	defer cancel()
	table, err := m.openTable(ctx, img)
	if err != nil {
		return err
	}
	asked := time.Now()
	r, err := m.source(img, *desc).ReadRange(ctx, 0, desc.Size)
	if err != nil {
		return err
	}
	defer r.Close()
	trip := time.Since(asked)
	all := make([]int, len(table.Devices))
	for i := range all {
		all[i] = i
	}
	// All of them, though the boot pack needs only some: the mount that is
	// about to be made finds them open.
	layers, err := m.acquire(ctx, img, table, all)
	if err != nil {
		return err
	}
	defer func() {
		for _, l := range layers {
			l.Release()
		}
	}()
	delivery := m.opts.Cache.NewDelivery(trip)
	defer delivery.Close()
	expect := func(refs []artifact.ChunkRef) error {
		for i, l := range layers {
			var chunks []int
			var at []int64
			for k, ref := range refs {
				if ref.Device == i {
					chunks = append(chunks, ref.Index)
					at = append(at, desc.Size*int64(k)/int64(len(refs))) // about
				}
			}
			l.Expect(delivery, chunks, at)
		}
		return nil
	}
	return artifact.ReadBootPack(ctx, delivery.Reader(r), table, expect, func(ref artifact.ChunkRef, _ artifact.Chunk, frame []byte) error {
		return layers[ref.Device].PutFrame(ctx, ref.Index, frame)
	})
}

// queueFill lets an image be filled when its turn comes.
func (m *Manager) queueFill(id oci.Digest) {
	m.mu.Lock()
	defer m.mu.Unlock()
	img, ok := m.images[id]
	if !ok || img.filling || img.filled {
		return
	}
	select {
	case m.fills <- id:
		img.filling = true
	default:
	}
}

// resumeFills queues what an earlier process didn't finish, but not images that
// lost content to the cache's bounds: those wait until they are mounted again,
// or pinned.
func (m *Manager) resumeFills(ctx context.Context) {
	for _, img := range m.list() {
		m.mu.Lock()
		mounted := img.mounted()
		m.mu.Unlock()
		if _, evicted := m.here(ctx, img); mounted || !evicted || img.pinned() {
			m.queueFill(img.id)
		}
	}
}

// fillLoop fills one image after the other.
func (m *Manager) fillLoop(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case id := <-m.fills:
			img := m.lookup(id)
			if img == nil {
				continue
			}
			began := time.Now()
			whole := !m.opts.NoFill || img.pinned()
			err := m.work(ctx, img, func(ctx context.Context, img *image) error { return m.fill(ctx, img, whole) })
			m.mu.Lock()
			img.filling, img.filled = false, err == nil && whole
			img.problem = err
			m.mu.Unlock()
			if !whole && img.pinned() {
				m.queueFill(id) // it was pinned meanwhile
			}
			if err == nil {
				m.log.DebugContext(ctx, "image is complete", "image", id, "duration", time.Since(began))
			} else if ctx.Err() == nil && !img.isGone() {
				m.log.WarnContext(ctx, "image stays incomplete: what is missing is fetched when it's read", "image", id, "error", err)
			}
		}
	}
}

// fill brings what is missing of an image: what a restart without the registry
// needs first, then, if it is to be whole, content.
func (m *Manager) fill(ctx context.Context, img *image, whole bool) error {
	if err := m.fillTable(ctx, img); err != nil {
		return err
	}
	for i := range img.manifest.Layers {
		if !exists(filepath.Join(img.dir, metadataFile(Part(i)))) {
			if err := m.fetchLayerMetadata(ctx, img, i); err != nil {
				return err
			}
		}
	}
	if !whole {
		return nil
	}
	table, err := m.openTable(ctx, img)
	if err != nil {
		return err
	}
	var errs []error
	for _, dev := range m.devices(img, table) {
		if err := m.fillDevice(ctx, img, dev); err != nil {
			errs = append(errs, fmt.Errorf("layer %s: %w", dev.DiffID, err))
		}
		if ctx.Err() != nil {
			return errors.Join(append(errs, context.Cause(ctx))...)
		}
	}
	return errors.Join(errs...)
}

// fillTable brings the whole of a chunk table of which only the root is here.
func (m *Manager) fillTable(ctx context.Context, img *image) error {
	name := filepath.Join(img.dir, fileTable)
	if exists(name) {
		return nil
	}
	if _, err := m.openTable(ctx, img); err != nil {
		return err
	}
	ref := img.manifest.Table
	f, err := durable.Create(img.dir, 0o600)
	if err != nil {
		return localError(err)
	}
	defer f.Discard()
	if err := spool(ctx, m.source(img, ref.Blob), ref.Blob, f); err != nil {
		return registryError("chunk table "+ref.Blob.Digest.String(), err)
	}
	root := make([]byte, ref.RootSize)
	if _, err := f.ReadAt(root, 0); err != nil {
		return localError(err)
	}
	if !bytes.Equal(root, img.tables.root) {
		return notStreaming(IntegrityFailure, "chunk table %s doesn't begin with the root %s", ref.Blob.Digest, ref.RootDigest)
	}
	if err := f.Commit(name); err != nil {
		return localError(err)
	}
	return img.tables.useFile(name)
}

// fillDevice brings all content of one device.
func (m *Manager) fillDevice(ctx context.Context, img *image, dev *artifact.Device) error {
	l, err := m.opts.Cache.Acquire(ctx, dev, m.source(img, dev.Blob), &img.meter)
	if err != nil {
		return cacheError(err)
	}
	defer l.Release()
	if l.Complete() {
		return nil
	}
	return l.Fill(ctx)
}
