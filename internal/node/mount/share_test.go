package mount_test

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"sluice/internal/node/mount"
)

// TestManyStartsFetchOnce: fifty that pull, mount and read one image at once
// have its bytes fetched once.
func TestManyStartsFetchOnce(t *testing.T) {
	var fetched sync.Map                 // by starts
	t.Run("starts", func(t *testing.T) { // which waits for them
		for _, starts := range []int{1, 50} {
			t.Run(fmt.Sprint(starts), func(t *testing.T) { fetched.Store(starts, fetchedBy(t, starts)) })
		}
	})
	one, ok := fetched.Load(1)
	many, also := fetched.Load(50)
	if !ok || !also {
		t.Skip("can't mount here")
	}
	t.Logf("one fetches %d bytes, fifty %d", one, many)
	if many.(int64) > one.(int64)*101/100 {
		t.Error("some were fetched again")
	}
}

// fetchedBy returns the bytes that so many starts at once ask a registry for.
func fetchedBy(t *testing.T, starts int) int64 {
	n, manifest := prepared(t)
	m := n.start()
	var all sync.WaitGroup
	for i := range starts {
		all.Go(func() {
			img, err := m.Pull(t.Context(), testRef, manifest)
			if err != nil {
				t.Error(err)
				return
			}
			dir, err := m.Attach(t.Context(), img.ID, mount.Merged, fmt.Sprint("container ", i))
			if err != nil {
				t.Error(err)
				return
			}
			for _, name := range []string{"big", "top", "bin/true"} { // all there is
				if _, err := os.ReadFile(filepath.Join(dir, name)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	return m.Status(t.Context()).Traffic.Bytes
}
