package mount

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"sluice/oci"
)

// mend makes sure that what is here of an image and its part can be mounted:
// the chunk table, and the part's metadata, which the kernel trusts. What an
// earlier process left is looked at once, before its first mount. What a disk
// lost or changed comes from the registry again, where the image came from.
func (m *Manager) mend(ctx context.Context, img *image, part Part) error {
	img.mending.Lock()
	defer img.mending.Unlock()
	if m.isSound(img, part) {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, m.opts.Fetch, fmt.Errorf("what the disk lost of image %s didn't arrive within %v", img.id, m.opts.Fetch))
	defer cancel()
	if _, err := m.openTable(ctx, img); err != nil {
		m.log.ErrorContext(ctx, "an image's chunk table isn't what was stored: it is fetched again", "image", img.id, "error", err)
		for _, name := range []string{fileTable, fileRoot} {
			if err := os.Remove(filepath.Join(img.dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return localError(err)
			}
		}
		if err := m.fetchTable(ctx, img); err != nil {
			return registryError("chunk table of "+img.id.String(), err)
		}
	}
	ref := img.metadata(part)
	err := checkFile(filepath.Join(img.dir, metadataFile(part)), ref.Size, ref.Digest)
	if err == nil {
		m.setSound(img, part)
		return nil
	}
	if part == Merged || !errors.Is(err, os.ErrNotExist) { // layers' own come later, or never
		m.log.ErrorContext(ctx, "an image's metadata isn't what was stored: it is fetched again", "image", img.id, "part", part, "error", err)
	}
	return m.fetchLayerMetadata(ctx, img, int(part))
}

func (m *Manager) isSound(img *image, part Part) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return img.sound[part]
}

// setSound records that a part's metadata on the disk is what it should be.
func (m *Manager) setSound(img *image, part Part) {
	m.mu.Lock()
	defer m.mu.Unlock()
	img.sound[part] = true
}

// checkFile compares a file's size and SHA-256.
func checkFile(name string, size int64, digest oci.Digest) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if fi.Size() != size {
		return fmt.Errorf("%s has %d bytes, not %d", name, fi.Size(), size)
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != digest.Encoded() {
		return fmt.Errorf("%s has SHA-256 %s, not %s", name, got, digest.Encoded())
	}
	return nil
}
