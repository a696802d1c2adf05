package planetest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"

	"sluice/internal/node/plane"
)

// Shutdown shuts a plane down, whose own mounts are in dir. Processes that others
// start with a mount namespace of their own have copies of all mounts of this
// machine, which keep the plane's busy for as long as they like. What is copied is
// therefore taken out of this namespace first, as `sluice node uninstall` does.
func Shutdown(p Served, dir string) error {
	err := p.Shutdown(context.Background())
	if !errors.Is(err, plane.ErrBusy) {
		return err
	}
	copied, cerr := copiedElsewhere(dir)
	if cerr != nil {
		return errors.Join(err, cerr)
	}
	for _, at := range copied {
		if uerr := plane.UnmountAll(at); uerr != nil {
			return errors.Join(err, uerr)
		}
	}
	return p.Shutdown(context.Background()) // also if the copies were gone by now
}

// copiedElsewhere returns what is mounted below dir in another mount namespace.
func copiedElsewhere(dir string) ([]string, error) {
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return nil, err
	}
	namespaces, err := filepath.Glob("/proc/[0-9]*/ns/mnt")
	if err != nil {
		return nil, err
	}
	seen, copied := map[string]bool{own: true}, map[string]bool{}
	for _, name := range namespaces {
		ns, err := os.Readlink(name)
		if err != nil || seen[ns] {
			continue // the process has ended, or has a namespace of which one is enough
		}
		table, err := os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(name)), "mountinfo"))
		if err != nil {
			continue
		}
		seen[ns] = true
		for line := range strings.Lines(string(table)) {
			if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
				copied[f[4]] = true
			}
		}
	}
	var all []string
	for at := range copied {
		all = append(all, at)
	}
	return all, nil
}
