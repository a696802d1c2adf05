package mount_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"sluice/internal/artifact"
	"sluice/oci"
)

// What is read after chunk tables were forgotten is right, whatever became of
// their files. The registry is asked only for what the disk has lost.
func TestForgottenTables(t *testing.T) {
	for name, test := range map[string]struct {
		harm func(name string) error
		lost bool
	}{
		"kept":  {func(string) error { return nil }, false},
		"short": {func(name string) error { return os.Truncate(name, 100) }, true},
		"changed": {func(name string) error {
			b, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			f, err := os.OpenFile(name, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			for i := range b {
				b[i] ^= 1
			}
			_, err = f.Write(b)
			return err
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			n, manifest := prepared(t)
			n.unembed(manifest)
			m := n.start()
			img, dir := n.pulled(manifest, "container")
			var tables, asked []oci.Digest
			for _, d := range blobsOf(t, n.manifest(testRepo, img.ID)) {
				if d.MediaType == artifact.MediaTypeTable {
					tables = append(tables, d.Digest)
				}
			}
			var mu sync.Mutex // guards asked
			n.reg.mu.Lock()
			n.reg.asked = func(_ context.Context, d oci.Digest) {
				mu.Lock()
				defer mu.Unlock()
				asked = append(asked, d)
			}
			n.reg.mu.Unlock()
			names, err := filepath.Glob(filepath.Join(n.root, "node", "images", img.ID.Encoded()[:8]+"*", "table"))
			if err != nil || len(names) != 1 || len(tables) != 1 {
				t.Fatal(names, tables, err)
			}
			if err := test.harm(names[0]); err != nil {
				t.Fatal(err)
			}
			m.ForgetTables()
			checkImage(t, dir)
			mu.Lock()
			defer mu.Unlock()
			if got := slices.Contains(asked, tables[0]); got != test.lost {
				t.Errorf("the registry was asked for the chunk table: %v, want %v", got, test.lost)
			}
		})
	}
}
