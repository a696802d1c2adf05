package mount_test

import (
	"os"
	"path/filepath"
	"testing"

	"sluice/internal/node/mount"
)

// What the disk lost of an image, or changed, comes from the registry again when
// the image is mounted; nobody has to pull it.
func TestBrokenFilesAreMended(t *testing.T) {
	harms := map[string]func(name string) error{
		"missing": os.Remove,
		"short":   func(name string) error { return os.Truncate(name, 100) },
		"changed": func(name string) error {
			b, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			b[len(b)/2] ^= 1
			return os.WriteFile(name, b, 0o600)
		},
		"zeros": func(name string) error {
			b, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			return os.WriteFile(name, make([]byte, len(b)), 0o600)
		},
	}
	n, manifest := prepared(t)
	n.start()
	img, _ := n.pulled(manifest, "container")
	for harm, do := range harms {
		for _, file := range []string{"merged.erofs", "table"} {
			if harm == "changed" && file == "table" {
				continue // its pages are checked when they are read
			}
			n.reboot()
			names, err := filepath.Glob(filepath.Join(n.root, "node", "images", img.ID.Encoded()[:8]+"*", file))
			if err != nil || len(names) != 1 {
				t.Fatal(names, err)
			}
			if err := do(names[0]); err != nil {
				t.Fatal(err)
			}
			dir, err := n.start().Attach(t.Context(), img.ID, mount.Merged, "container")
			if err != nil {
				t.Errorf("%s, %s: %v", file, harm, err)
				continue
			}
			checkImage(t, dir)
		}
	}
}
