package backends

import (
	"fmt"
	"sync/atomic"
	"testing"

	"sluice/internal/index"
	"sluice/internal/stored"
	"sluice/oci"
	"sluice/oci/ocitest"
)

// TestRegistry holds the registry on each server to the contract that all
// registries have.
func TestRegistry(t *testing.T) {
	eachPlace(t, func(t *testing.T, p place) {
		var buckets atomic.Int64
		ocitest.Run(t, func(t *testing.T) oci.Registry {
			db, err := index.Open(t.Context(), index.Options{URL: "sqlite::memory:"})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := db.Close(); err != nil {
					t.Error(err)
				}
			})
			return stored.New(p.open(t, fmt.Sprintf("registry-%d", buckets.Add(1))), db, stored.Options{AllowStreamingPush: true})
		})
	})
}
