package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"sluice/internal/durable"
	"sluice/oci"
)

// filePinned, in an image's directory, exists while the image is pinned.
const filePinned = "pinned"

func (img *image) pinned() bool { return exists(filepath.Join(img.dir, filePinned)) }

// Pin keeps an image on this node until Unpin, whoever else needs it or not:
// all its content is fetched (also with Options.NoFill) and neither evicted nor
// pruned. The image is named by a reference that it was pulled by, and then it
// is all images that were, or by its artifact's digest. When Pin returns nil
// that survives restarts and loss of power.
func (m *Manager) Pin(ctx context.Context, name string) error {
	return m.setPinned(ctx, name, func(file string) error { return durable.WriteFile(file, nil, 0o600) })
}

// Unpin undoes Pin, durably.
func (m *Manager) Unpin(ctx context.Context, name string) error {
	return m.setPinned(ctx, name, func(file string) error {
		if err := durable.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	})
}

func (m *Manager) setPinned(ctx context.Context, name string, set func(file string) error) error {
	reference := name
	if ref, err := oci.ParseReference(name); err == nil {
		reference = ref.String() // "debian" is "docker.io/library/debian:latest"
	}
	m.naming.Lock() // so that none is removed meanwhile
	defer m.naming.Unlock()
	found := false
	for _, img := range m.list() {
		m.mu.Lock()
		named := img.id.String() == name || slices.ContainsFunc(img.origins, func(o origin) bool { return o.Reference == reference })
		m.mu.Unlock()
		if !named {
			continue
		}
		found = true
		if err := set(filepath.Join(img.dir, filePinned)); err != nil {
			return localError(err)
		}
		m.mu.Lock()
		img.used = time.Now() // it lingers
		m.mu.Unlock()
		m.queueFill(img.id)
		m.log.InfoContext(ctx, "image is pinned, or not any more", "image", img.id, "pinned", img.pinned())
	}
	if !found {
		return fmt.Errorf("%q: %w; sluice node du lists them", name, ErrUnknownImage)
	}
	return nil
}
