package fanotify_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"sluice/internal/node/plane"
	"sluice/internal/node/plane/fanotify"
	"sluice/internal/node/plane/planetest"
)

// need skips a test that this machine can't run, and says why.
func need(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("fanotify and EROFS mounts need root")
	}
}

func open(t *testing.T, opts fanotify.Options) *fanotify.Plane {
	t.Helper()
	need(t)
	if opts.Dir == "" {
		opts.Dir = t.TempDir()
	}
	opts.Files = filepath.Join(opts.Dir, "files")
	opts.HolderCommand = planetest.HolderCommand()
	p, err := fanotify.Open(t.Context(), opts)
	var unsupported *plane.UnsupportedError
	if errors.As(err, &unsupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Shutdown(context.Background()); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Errorf("shutdown: %v", err)
		}
	})
	return p
}

func TestPlane(t *testing.T) {
	planetest.Run(t, planetest.Options{Lazy: true}, func(t *testing.T) plane.Plane {
		return open(t, fanotify.Options{})
	})
}

// TestKill: SLUICE_KILLS sets the number of kills.
func TestKill(t *testing.T) {
	open(t, fanotify.Options{}) // or skip
	planetest.Stress{Roles: roles(), Kills: planetest.Kills(t), DeviceSize: 512 << 20}.Run(t)
}
