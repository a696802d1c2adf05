package fuse_test

import (
	"errors"
	"os"
	"testing"

	"sluice/internal/node/plane"
	"sluice/internal/node/plane/fuse"
	"sluice/internal/node/plane/planetest"
)

func needRoot(t testing.TB) {
	if os.Getuid() != 0 {
		t.Skip("FUSE and EROFS mounts need root")
	}
}

func open(t *testing.T, opts fuse.Options) *fuse.Plane {
	t.Helper()
	needRoot(t)
	if opts.Dir == "" {
		opts.Dir = t.TempDir()
	}
	opts.HolderCommand = planetest.HolderCommand()
	p, err := fuse.Open(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := planetest.Shutdown(p, opts.Dir); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Errorf("shutdown: %v", err)
		}
		plane.Unmount(opts.Dir+"/blobs", true)
	})
	return p
}

func TestPlane(t *testing.T) {
	planetest.Run(t, planetest.Options{Lazy: true}, func(t *testing.T) plane.Plane {
		return open(t, fuse.Options{})
	})
}

// TestPlaneLoop forces what kernels before 6.12 need.
func TestPlaneLoop(t *testing.T) {
	planetest.Run(t, planetest.Options{Lazy: true}, func(t *testing.T) plane.Plane {
		return open(t, fuse.Options{Mode: plane.Loop})
	})
}

// TestPlaneWithoutResend is a kernel before 6.9.
func TestPlaneWithoutResend(t *testing.T) {
	planetest.Run(t, planetest.Options{Lazy: true}, func(t *testing.T) plane.Plane {
		p := open(t, fuse.Options{Mode: plane.Loop}.WithoutResend())
		if p.Start().Resends {
			t.Error("the kernel was asked to resend")
		}
		return p
	})
}

func TestPlaneDirectIO(t *testing.T) {
	planetest.Run(t, planetest.Options{Lazy: true}, func(t *testing.T) plane.Plane {
		return open(t, fuse.Options{DirectIO: true})
	})
}
