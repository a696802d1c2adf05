package local_test

import (
	"os"
	"testing"

	"sluice/internal/node/plane"
	"sluice/internal/node/plane/local"
	"sluice/internal/node/plane/planetest"
)

func TestMain(m *testing.M) {
	planetest.Child()
	os.Exit(m.Run())
}

func TestPlane(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting needs root")
	}
	planetest.Run(t, planetest.Options{}, func(t *testing.T) plane.Plane {
		return local.New(t.TempDir())
	})
}
