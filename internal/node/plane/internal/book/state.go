package book

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"sluice/internal/durable"
)

// state is what a process needs to know of its predecessor, in the file
// DIR/state.json. It is on disk before the kernel can learn anything of what
// it says: a device that the kernel knows is always in it.
type state struct {
	Version int `json:"version"`
	// Epoch names the connection with the kernel that nodes belong to.
	Epoch string `json:"epoch"`
	// NextNode is above all that were given out on this connection.
	NextNode uint64        `json:"next_node"`
	Devices  []deviceState `json:"devices"`
	// Images by directory.
	Images map[string]imageState `json:"images"`
}

type deviceState struct {
	Name string `json:"name"`
	Node uint64 `json:"node"`
	Size int64  `json:"size"`
}

// imageState is in the file before the image is mounted and until it has been
// unmounted.
type imageState struct {
	// Epoch of the connection that the mount's devices were opened on. If it
	// is not the state's, and Devices not empty, the mount is stale.
	Epoch string `json:"epoch"`
	// Devices that are read through the plane; those with a File are not.
	Devices []string `json:"devices"`
}

const (
	stateVersion = 1
	stateFile    = "state.json"
	maxStateSize = 64 << 20
)

// loadState reads the state of dir, whose nodes are not below first; an empty
// one if there is none. A file that
// doesn't make sense is an error, not a reason to trust it.
func loadState(dir string, first uint64) (state, error) {
	name := filepath.Join(dir, stateFile)
	info, err := os.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return state{Version: stateVersion}, nil
	}
	if err != nil {
		return state{}, err
	}
	if info.Size() > maxStateSize {
		return state{}, fmt.Errorf("%s: %d bytes are too many", name, info.Size())
	}
	data, err := os.ReadFile(name)
	if err != nil {
		return state{}, err
	}
	var s state
	if err := json.Unmarshal(data, &s); err != nil {
		return state{}, fmt.Errorf("%s: %w", name, err)
	}
	if err := s.check(first); err != nil {
		return state{}, fmt.Errorf("%s: %w", name, err)
	}
	return s, nil
}

// check tells what can't be.
func (s state) check(first uint64) error {
	if s.Version != stateVersion {
		return fmt.Errorf("version %d, want %d", s.Version, stateVersion)
	}
	nodes, names := map[uint64]bool{}, map[string]bool{}
	for _, d := range s.Devices {
		if d.Node < first || d.Node >= s.NextNode || nodes[d.Node] || names[d.Name] || d.Size < 0 {
			return fmt.Errorf("device %q: node %d or size %d is impossible", d.Name, d.Node, d.Size)
		}
		nodes[d.Node], names[d.Name] = true, true
	}
	for dir, img := range s.Images {
		for _, d := range img.Devices {
			if img.Epoch == s.Epoch && !names[d] {
				return fmt.Errorf("image at %s has the device %q, which is not listed", dir, d)
			}
		}
	}
	return nil
}

func (s state) save(dir string) error {
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(filepath.Join(dir, stateFile), data, 0o600); err != nil {
		return fmt.Errorf("save the plane's state: %w", err)
	}
	return nil
}

// prune drops devices that no image on this connection has.
func (s *state) prune() {
	used := map[string]bool{}
	for _, img := range s.Images {
		if img.Epoch == s.Epoch {
			for _, name := range img.Devices {
				used[name] = true
			}
		}
	}
	var devices []deviceState
	for _, d := range s.Devices {
		if used[d.Name] {
			devices = append(devices, d)
		}
	}
	s.Devices = devices
}

func eraseState(dir string) error {
	err := os.Remove(filepath.Join(dir, stateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
