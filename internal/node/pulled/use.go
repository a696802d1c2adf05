package pulled

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"sluice/internal/artifact"
	"sluice/internal/durable"
	"sluice/internal/node/plane"
	"sluice/oci"
)

// planeImage returns what is mounted for an image.
func (s *Store) planeImage(img Image) (plane.Image, error) {
	pi := plane.Image{Metadata: filepath.Join(s.imageDir(img.ID), fileMetadata)}
	for _, id := range img.DiffIDs {
		var rec record
		if err := readJSON(filepath.Join(s.layerDir(id), fileLayer), &rec); err != nil {
			return pi, fmt.Errorf("layer %s: %w", id, err)
		}
		pi.Devices = append(pi.Devices, s.device(id, fileTar, rec.Size))
		if rec.SparseSize > 0 {
			pi.Devices = append(pi.Devices, s.device(id, fileSparse, rec.SparseSize))
		}
	}
	for _, d := range pi.Devices {
		if whole, err := d.Direct(); err != nil {
			return pi, err
		} else if !whole {
			return pi, fmt.Errorf("device %s: %s isn't whole blocks", d.Name, d.File)
		}
	}
	return pi, pi.Check()
}

func (s *Store) device(diffID oci.Digest, file string, size int64) plane.Device {
	return plane.Device{
		Name: "sha256-" + diffID.Encoded() + "-" + file, Size: roundUp(size),
		File: filepath.Join(s.layerDir(diffID), file),
	}
}

// Hold keeps an image for owner until Release.
func (s *Store) Hold(_ context.Context, id oci.Digest, owner string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	img := s.lookup(id)
	if img == nil {
		return fmt.Errorf("image %s: %w", id, ErrUnknownImage)
	}
	img.hold(owner)
	return nil
}

// Stack mounts an image for owner and returns the directories whose stack, the
// topmost first, is its root file system: a single one. It stays mounted until
// Release. An image that an earlier process has left mounted stays so.
func (s *Store) Stack(ctx context.Context, id oci.Digest, owner string) (dirs []string, err error) {
	give, err := s.locks.take(ctx, "image/"+id.String())
	if err != nil {
		return nil, err
	}
	defer give()
	s.mu.Lock()
	img := s.lookup(id)
	if img == nil {
		s.mu.Unlock()
		return nil, fmt.Errorf("image %s: %w", id, ErrUnknownImage)
	}
	had := img.users[owner]
	img.users[owner] = true
	s.mu.Unlock()
	if err := s.mount(img.Image); err != nil {
		if !had {
			s.mu.Lock()
			delete(img.users, owner)
			s.mu.Unlock()
		}
		return nil, fmt.Errorf("mount image %s: %w", id, err)
	}
	return []string{s.mountDir(id)}, nil
}

// mount mounts an image, unless it is mounted. The caller has its lock.
func (s *Store) mount(img Image) error {
	dir := s.mountDir(img.ID)
	at, err := plane.MountAt(dir)
	if err != nil || at != nil {
		return err
	}
	pi, err := s.planeImage(img)
	if err != nil {
		return err
	}
	meta, err := durable.ReadFile(pi.Metadata, artifact.MaxMetadataSize)
	if err != nil {
		return err
	}
	// The kernel is given what was checked.
	if got := oci.DigestOf(meta); got != img.Metadata {
		return fmt.Errorf("its metadata on the disk is %s instead of %s: remove the image and pull it again", got, img.Metadata)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	var files []string
	for _, d := range pi.Devices {
		files = append(files, d.File)
	}
	if s.opts.Mode == plane.Loop {
		return plane.MountEROFSLoop(pi.Metadata, files, dir)
	}
	return plane.MountEROFS(pi.Metadata, files, dir)
}

// Release gives up all that owner has. What nobody uses any more is unmounted, if
// nothing else has it open: Collect tries again. Unknown owners are fine.
func (s *Store) Release(ctx context.Context, owner string) error {
	s.mu.Lock()
	var unused []oci.Digest
	for id, img := range s.images {
		delete(img.holders, owner)
		if img.users[owner] {
			delete(img.users, owner)
			unused = append(unused, id)
		}
	}
	s.mu.Unlock()
	var errs []error
	for _, id := range unused {
		if err := s.unmount(ctx, id); err != nil && !errors.Is(err, plane.ErrBusy) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// unmount unmounts an image that has no user.
func (s *Store) unmount(ctx context.Context, id oci.Digest) error {
	give, err := s.locks.take(ctx, "image/"+id.String())
	if err != nil {
		return err
	}
	defer give()
	s.mu.Lock()
	img := s.images[id]
	used := img != nil && len(img.users) > 0
	s.mu.Unlock()
	if used {
		return nil
	}
	return unmountDir(s.mountDir(id))
}

// unmountDir unmounts what is mounted on a directory, and removes that.
func unmountDir(dir string) error {
	if err := plane.Unmount(dir, false); err != nil && !errors.Is(err, plane.ErrNotAttached) {
		return err
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// Collect unmounts and removes the images that nobody holds or uses, and the
// layers that no image has. An image that is busy stays.
func (s *Store) Collect(ctx context.Context) {
	s.mu.Lock()
	var ids []oci.Digest
	for id, img := range s.images {
		if !img.kept() {
			ids = append(ids, id)
		} else if len(img.users) == 0 {
			defer func() { // mounted by an earlier process, or busy when it was released
				if err := s.unmount(ctx, id); err != nil && !errors.Is(err, plane.ErrBusy) {
					s.log.WarnContext(ctx, "an unused image stays mounted", "image", id, "error", err)
				}
			}()
		}
	}
	s.mu.Unlock()
	for _, id := range ids {
		if err := s.remove(ctx, id); err != nil {
			s.log.WarnContext(ctx, "an unused image stays", "image", id, "error", err)
		}
	}
	if err := s.collectLayers(); err != nil {
		s.log.WarnContext(ctx, "unused layers can't be removed", "error", err)
	}
}

// remove removes an image, unless somebody has it.
func (s *Store) remove(ctx context.Context, id oci.Digest) error {
	give, err := s.locks.take(ctx, "image/"+id.String())
	if err != nil {
		return err
	}
	defer give()
	s.mu.Lock()
	img := s.images[id]
	if img == nil || img.kept() {
		s.mu.Unlock()
		return nil
	}
	img.leaving = true
	s.mu.Unlock()
	err = unmountDir(s.mountDir(id))
	if err == nil {
		err = s.discard(s.imageDir(id))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if img.leaving = false; err == nil {
		delete(s.images, id)
	}
	return err
}

// collectLayers removes the layers that no image has, nor a pull under way.
func (s *Store) collectLayers() error {
	entries, err := os.ReadDir(s.layersDir())
	if err != nil {
		return err
	}
	var gone []string
	s.mu.Lock()
	needed := make(map[string]bool)
	for _, img := range s.images {
		for _, l := range img.DiffIDs {
			needed[l.Encoded()] = true
		}
	}
	for l := range s.pinned {
		needed[l.Encoded()] = true
	}
	for _, e := range entries {
		if needed[e.Name()] || durable.IsTemp(e.Name()) {
			continue
		}
		dir, herr := hide(filepath.Join(s.layersDir(), e.Name()))
		err = errors.Join(err, herr)
		if dir != "" {
			gone = append(gone, dir)
		}
	}
	s.mu.Unlock()
	for _, dir := range gone {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	return err
}
