package teleport

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"sluice/internal/durable"
	"sluice/internal/index"
	"sluice/internal/operation"
	"sluice/oci"
)

// abandoned is how old a file under way must be to be one that a crash has left.
const abandoned = 24 * time.Hour

// sweep removes the disks that no image of a repository needs, from there and, if
// no other repository has them, for good.
func (s *Service) sweep(ctx context.Context, repo string) error {
	row, err := s.db.Repository(ctx, repo)
	if err != nil && !errors.Is(err, index.ErrNotFound) {
		return err
	}
	all := err != nil || !row.TeleportEnabled
	names, err := disks(s.share.layers(repo))
	if err != nil {
		return err
	}
	for _, name := range names {
		layer, ok := layerOf(name)
		if !ok {
			continue // none of ours
		}
		if err := s.sweepDisk(ctx, repo, name, layer, all); err != nil {
			return fmt.Errorf("remove the disk %s of %s: %w", name, repo, err)
		}
	}
	removeEmpty(s.share.layers(repo), filepath.Join(s.share.dir, reposDir))
	return nil
}

// sweepDisk removes a disk from a repository, if no image of it needs it or all
// disks are to go.
func (s *Service) sweepDisk(ctx context.Context, repo, name string, layer oci.Digest, all bool) error {
	unlock, err := s.db.PollExclude(ctx, layerLock(layer), s.pause)
	if err != nil {
		return err
	}
	defer unlock()
	if !all {
		needed, err := s.needed(ctx, repo, layer)
		if err != nil || needed {
			return err
		}
	}
	if err := remove(s.share.layers(repo), name); err != nil {
		return err
	}
	return s.sweepPool(name)
}

// needed reports whether an image of a repository needs the disk of a layer: one that
// has all its disks, or may get them yet.
func (s *Service) needed(ctx context.Context, repo string, layer oci.Digest) (bool, error) {
	images, err := s.db.NeededBy(ctx, repo, layer)
	if err != nil {
		return true, err
	}
	for _, digest := range images {
		op, err := s.ops.Latest(ctx, repo, digest)
		if err != nil && !errors.Is(err, operation.ErrUnknown) {
			return true, err
		}
		if op.Status != operation.StatusFailed && op.Status != operation.StatusCanceled {
			return true, nil
		}
		img, err := s.image(ctx, repo, digest.String(), oci.Platform{})
		switch {
		case errors.Is(err, oci.ErrDenied):
			return true, nil // nobody may read it for now
		case errors.Is(err, oci.ErrManifestUnknown), permanent(err) != "":
			continue
		case err != nil:
			return true, err
		}
		if all, err := s.disks(repo, img); err != nil || len(all) > 0 {
			return true, err
		}
	}
	return false, nil
}

// sweepPool removes a disk of the pool that no repository has. The caller has the
// layer's lock.
func (s *Service) sweepPool(name string) error {
	info, err := os.Stat(filepath.Join(s.share.pool(), name+diskSuffix))
	if err == nil && links(info) > 1 {
		return nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return remove(s.share.pool(), name)
}

// links returns how many names a file has.
func links(info fs.FileInfo) uint64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return uint64(st.Nlink) //nolint:unconvert // it has 32 bits on other machines
	}
	return 1
}

// disks returns the names of the disks that a directory has, or parts of.
func disks(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		for _, suffix := range suffixes() {
			if name, ok := strings.CutSuffix(e.Name(), suffix); ok && !durable.IsTemp(name) && !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	return names, nil
}

// removeEmpty removes a directory and those above it as far as they are empty.
// That one isn't is what it stops at; that one can't be removed hurts nobody.
func removeEmpty(dir, top string) {
	for dir != top && strings.HasPrefix(dir, top+string(filepath.Separator)) {
		if os.Remove(dir) != nil {
			return
		}
		dir = filepath.Dir(dir)
	}
}

// Tidy sweeps all repositories that have disks, the pool, and what crashes have
// left. To be called now and then: what is deleted is swept by a job of its own.
func (s *Service) Tidy(ctx context.Context) error {
	top := filepath.Join(s.share.dir, reposDir)
	var repos []string
	err := filepath.WalkDir(top, func(dir string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || !d.IsDir() || d.Name() != layersDir {
			return err
		}
		if repo, err := filepath.Rel(top, filepath.Dir(dir)); err == nil && oci.CheckRepository(filepath.ToSlash(repo)) == nil {
			repos = append(repos, filepath.ToSlash(repo))
		}
		return fs.SkipDir
	})
	if err != nil {
		return err
	}
	for _, repo := range repos {
		if _, err := durable.Sweep(s.share.layers(repo), abandoned); err != nil {
			return err
		}
		if err := s.sweep(ctx, repo); err != nil {
			return err
		}
	}
	if _, err := durable.Sweep(s.share.pool(), abandoned); err != nil {
		return err
	}
	names, err := disks(s.share.pool())
	if err != nil {
		return err
	}
	for _, name := range names {
		layer, ok := layerOf(name)
		if !ok {
			continue
		}
		unlock, ok, err := s.db.TryExclude(ctx, layerLock(layer))
		if err != nil {
			return err
		}
		if !ok {
			continue // somebody is at it
		}
		err = s.sweepPool(name)
		unlock()
		if err != nil {
			return err
		}
	}
	return nil
}
