package registry_test

import (
	"testing"

	"sluice/internal/registry"
	"sluice/internal/storage"
	"sluice/oci"
	"sluice/oci/ocitest"
)

func TestStoredInMemory(t *testing.T) {
	ocitest.Run(t, func(*testing.T) oci.Registry {
		return registry.NewStored(&storage.Memory{}, registry.StoredOptions{})
	})
}

func TestStoredLocally(t *testing.T) {
	ocitest.Run(t, func(t *testing.T) oci.Registry {
		return registry.NewStored(openLocal(t, t.TempDir()), registry.StoredOptions{})
	})
}

func openLocal(t *testing.T, dir string) *storage.Local {
	t.Helper()
	store, err := storage.OpenLocal(dir, storage.LocalOptions{Identity: registry.BlobIdentity})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	return store
}
