package mount

import (
	"bytes"
	"context"
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
	"sluice/oci"
)

// Limits of what is kept in memory or fetched at once, in bytes.
const (
	// spoolInMemory is up to what size compressed metadata stays in memory
	// between arriving and being unpacked.
	spoolInMemory = 8 << 20

	// wholeTableSize is up to what size a chunk table comes whole before the
	// first mount. Bigger ones follow in the background.
	wholeTableSize = 512 << 10
)

// fetch brings an artifact's metadata and chunk table to disk, verified, and
// makes the image known. If it's known already only the origin is new.
func (m *Manager) fetch(ctx context.Context, f *found, o origin) (*image, error) {
	if img := m.lookup(f.desc.Digest); img != nil {
		return img, m.remember(img, o)
	}
	tmp, err := os.MkdirTemp(m.imagesDir(), durable.TempPrefix)
	if err != nil {
		return nil, notStreaming(PlaneUnavailable, "directory for the image: %w", err)
	}
	defer os.RemoveAll(tmp) // it's gone already when all went well
	img := newImage(f.desc.Digest, tmp, f.manifest)
	img.addOrigin(o)
	img.created, img.mount = time.Now(), m.mountName(img.id)
	if err := m.fetchFiles(ctx, img, f.content); err != nil {
		close(img.gone)
		return nil, registryError("fetch metadata and chunk table of "+img.id.String(), err)
	}
	_, span := m.step(ctx, "store")
	installed, err := m.install(img)
	end(span, err)
	if err != nil {
		close(img.gone)
		return nil, notStreaming(PlaneUnavailable, "store the image: %w", err)
	}
	if installed != img {
		close(img.gone)
		return installed, m.remember(installed, o)
	}
	return img, nil
}

// lookup returns an image that is here, or nil.
func (m *Manager) lookup(id oci.Digest) *image {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.images[id]
}

// remember adds an origin to an image that is here.
func (m *Manager) remember(img *image, o origin) error {
	m.mu.Lock()
	img.revive()
	added := img.addOrigin(o)
	m.mu.Unlock()
	if !added {
		return nil
	}
	if err := m.saveOrigins(img); err != nil {
		return notStreaming(PlaneUnavailable, "store the image's origin: %w", err)
	}
	return nil
}

// fetchFiles fetches, in parallel, metadata and table, and checks them
// together. As soon as the table is there the boot pack is on its way, and the
// cache gets ready for the layers.
func (m *Manager) fetchFiles(ctx context.Context, img *image, manifest []byte) error {
	var metadata blob.Source
	group, gctx := errgroup.WithContext(ctx)
	group.Go(func() (err error) {
		metadata, err = try(gctx, m, "metadata", func(ctx context.Context) (blob.Source, error) {
			return m.spoolMetadata(ctx, img, img.manifest.Metadata.Blob)
		})
		return err
	})
	group.Go(func() error {
		part, err := try(gctx, m, "chunk table", func(ctx context.Context) (tablePart, error) { return m.readTable(ctx, img) })
		if err != nil {
			return err
		}
		m.background.Go(func(background context.Context) { m.boot(follow(background, ctx), img) })
		return part.store(img)
	})
	group.Go(func() error { // the disk takes its time: meanwhile is better than afterwards
		content, err := img.storedJSON() // nobody changes it yet
		return localError(errors.Join(err,
			writeSynced(filepath.Join(img.dir, fileManifest), manifest),
			writeSynced(filepath.Join(img.dir, fileImage), content)))
	})
	if err := group.Wait(); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = errors.Join(cause, err)
		}
		return err
	}
	if c, ok := metadata.(io.Closer); ok {
		defer c.Close()
	}
	return m.unpack(ctx, img, img.table, Merged, metadata)
}

// tablePart is what is stored of a chunk table.
type tablePart struct {
	name    string
	content []byte
}

func (p tablePart) store(img *image) error {
	return localError(writeSynced(filepath.Join(img.dir, p.name), p.content))
}

// fetchTable brings the chunk table, or its root when it is big, and opens it.
func (m *Manager) fetchTable(ctx context.Context, img *image) error {
	part, err := m.readTable(ctx, img)
	if err != nil {
		return err
	}
	return part.store(img)
}

// readTable is fetchTable without the disk: it returns what is to be stored.
func (m *Manager) readTable(ctx context.Context, img *image) (tablePart, error) {
	ref := img.manifest.Table
	src := &tableSource{remote: m.source(img, ref.Blob)}
	part := tablePart{name: fileTable}
	if ref.Blob.Size > m.opts.wholeTable {
		root, err := readRoot(ctx, src.remote, ref.RootSize, ref.RootDigest)
		if err != nil {
			return part, fmt.Errorf("chunk table %s: %w", ref.Blob.Digest, err)
		}
		part, src.root = tablePart{fileRoot, root}, root
	} else {
		var b bytes.Buffer
		if err := spool(ctx, src.remote, ref.Blob, &b); err != nil {
			return part, fmt.Errorf("chunk table %s: %w", ref.Blob.Digest, err)
		}
		part.content = b.Bytes()
		src.local.Store(&localTable{Source: blob.FromBytes(part.content)})
	}
	table, err := artifact.OpenTable(ctx, ref, src)
	if err == nil {
		err = img.manifest.CheckTable(table)
	}
	if err != nil {
		return part, notStreaming(IntegrityFailure, "%w", err)
	}
	m.shareDevices(table, src)
	img.opening.Lock()
	img.table, img.tables = table, src
	img.opening.Unlock()
	return part, nil
}

// spoolMetadata brings compressed metadata, verified, into memory or a file
// that has no name.
func (m *Manager) spoolMetadata(ctx context.Context, img *image, desc oci.Descriptor) (blob.Source, error) {
	src := m.source(img, desc)
	if desc.Size <= spoolInMemory {
		var content bytes.Buffer
		content.Grow(int(desc.Size))
		if err := spool(ctx, src, desc, &content); err != nil {
			return nil, fmt.Errorf("metadata %s: %w", desc.Digest, err)
		}
		return blob.FromBytes(content.Bytes()), nil
	}
	f, err := os.CreateTemp(img.dir, durable.TempPrefix)
	if err != nil {
		return nil, localError(err)
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, localError(errors.Join(err, f.Close()))
	}
	if err := spool(ctx, src, desc, f); err != nil {
		return nil, errors.Join(fmt.Errorf("metadata %s: %w", desc.Digest, err), f.Close())
	}
	return fileSource{blob.FromFile(f, desc.Size), f}, nil
}

// fileSource is a source that is closed with its file.
type fileSource struct {
	blob.Source
	io.Closer
}

// unpack makes a part's EROFS file from its compressed metadata. Everything
// about it has been checked when the file has its name.
func (m *Manager) unpack(ctx context.Context, img *image, table *artifact.Table, part Part, src blob.Source) (err error) {
	defer m.noteGarbage()
	ctx, span := m.step(ctx, "unpack metadata")
	defer func() { end(span, err) }()
	ref := img.metadata(part)
	f, err := durable.Create(img.dir, 0o600)
	if err != nil {
		return localError(err)
	}
	defer f.Discard()
	if err := ref.Unpack(ctx, src, f, table.Sizes(ref.Devices)); err != nil {
		if ctx.Err() != nil {
			return err
		}
		return notStreaming(IntegrityFailure, "%w", err)
	}
	if err := f.Commit(filepath.Join(img.dir, metadataFile(part))); err != nil {
		return localError(err)
	}
	m.setSound(img, part)
	return nil
}

// metadata returns what the manifest says of a part's metadata.
func (img *image) metadata(part Part) artifact.MetadataRef {
	if part == Merged {
		return img.manifest.Metadata
	}
	return img.manifest.Layers[part].Metadata
}

// install completes the image's temporary directory, gives it its name and
// makes the image known: from then on it survives everything. When another
// pull was faster, its image is returned.
func (m *Manager) install(img *image) (*image, error) {
	if err := durable.SyncDir(img.dir); err != nil {
		return nil, err
	}
	m.naming.Lock()
	defer m.naming.Unlock()
	if other := m.lookup(img.id); other != nil {
		return other, nil
	}
	if m.mountName(img.id) != img.mount {
		return nil, errors.New("another image whose digest begins alike came at the same time: pull it again")
	}
	// What may be there was found broken at the start, or its removal failed.
	final := filepath.Join(m.imagesDir(), dirName(img.id))
	if err := os.RemoveAll(final); err != nil {
		return nil, err
	}
	if err := durable.Rename(img.dir, final); err != nil {
		return nil, err
	}
	img.dir = final
	if img.tables.local.Load() != nil {
		if err := img.tables.useFile(filepath.Join(final, fileTable)); err != nil { // memory isn't for it
			return nil, err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.images[img.id] = img
	return img, nil
}

// writeSynced writes a file into a directory that nobody uses yet.
func writeSynced(name string, content []byte) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	return errors.Join(err, f.Sync(), f.Close())
}

// localError says of an error that it's this machine's, not the registry's.
func localError(err error) error {
	if err == nil {
		return nil
	}
	return notStreaming(PlaneUnavailable, "local disk: %w", err)
}
