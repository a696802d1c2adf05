package mount

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"

	"sluice/internal/node/plane"
)

// Users returns where the images that are mounted for a Manager with its state
// in root can be seen besides: as containers' root file systems, and what Mount
// made. It knows this mount namespace only, and not overlayfs whose lower
// directories were given by relative paths.
func Users(root string) ([]string, error) {
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, fmt.Errorf("read the mount table: %w", err)
	}
	below := filepath.Join(root, mountsName) + string(filepath.Separator)
	var own []*mountinfo.Info
	for _, i := range mounts {
		if strings.HasPrefix(i.Mountpoint, below) {
			own = append(own, i)
		}
	}
	users := []string{}
	for _, i := range mounts {
		for _, o := range own {
			if !strings.HasPrefix(i.Mountpoint, below) && shows(i, o) {
				users = append(users, i.Mountpoint)
				break
			}
		}
	}
	return users, nil
}

// shows reports whether a mount shows the content of the mount own.
func shows(i, own *mountinfo.Info) bool {
	if i.FSType == "overlay" {
		return slices.Contains(plane.Lowers(i.VFSOptions), own.Mountpoint)
	}
	return i.Major == own.Major && i.Minor == own.Minor
}

// Clear ends all claims and unmounts all images, for an owner who gives up the
// Manager and has looked at Users. It fails with plane.ErrBusy when something
// is in use, and leaves that; with force it is taken away from those who use it: they get I/O errors.
func (m *Manager) Clear(ctx context.Context, force bool) error {
	var errs []error
	for _, c := range m.Claims() {
		err := m.Unmount(ctx, c.ID)
		if errors.Is(err, plane.ErrBusy) && force {
			if err = plane.Unmount(c.Dir, true); err == nil {
				err = m.Unmount(ctx, c.ID)
			}
		}
		errs = append(errs, err)
	}
	mounts, err := plane.MountsBelow(m.mountsDir())
	errs = append(errs, err)
	for _, dir := range mounts {
		errs = append(errs, m.clearMount(ctx, dir, force))
	}
	return errors.Join(errs...)
}

// clearMount unmounts one image, also one that isn't the plane's.
func (m *Manager) clearMount(ctx context.Context, dir string, force bool) error {
	err := m.opts.Plane.Detach(ctx, dir)
	if errors.Is(err, plane.ErrBusy) && force {
		if err = plane.Unmount(dir, true); err == nil {
			err = m.opts.Plane.Detach(ctx, dir)
		}
	}
	if errors.Is(err, plane.ErrNotAttached) {
		err = plane.Unmount(dir, force)
	}
	if errors.Is(err, plane.ErrNotAttached) {
		return nil // it is gone
	}
	return err
}
