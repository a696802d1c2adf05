package book

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
)

func TestState(t *testing.T) {
	dir := t.TempDir()
	if s, err := loadState(dir, 3); err != nil || s.Epoch != "" {
		t.Errorf("of an empty directory: %+v, %v", s, err)
	}
	good := state{
		Version: stateVersion, Epoch: "e", NextNode: 5,
		Devices: []deviceState{{"a", 3, 10}, {"b", 4, 20}},
		Images:  map[string]imageState{"/x": {Epoch: "e", Devices: []string{"a"}}, "/old": {Epoch: "d", Devices: []string{"gone"}}},
	}
	if err := good.save(dir); err != nil {
		t.Fatal(err)
	}
	s, err := loadState(dir, 3)
	if err != nil {
		t.Fatal(err)
	}
	s.prune()
	if len(s.Devices) != 1 || s.Devices[0].Name != "a" || s.NextNode != 5 {
		t.Errorf("pruned to %+v", s)
	}
	for name, spoil := range map[string]func(*state){
		"version":        func(s *state) { s.Version = 9 },
		"node twice":     func(s *state) { s.Devices[1].Node = 3 },
		"name twice":     func(s *state) { s.Devices[1].Name = "a" },
		"root's node":    func(s *state) { s.Devices[0].Node = 1 },
		"future node":    func(s *state) { s.Devices[0].Node = 5 },
		"negative size":  func(s *state) { s.Devices[0].Size = -1 },
		"unknown device": func(s *state) { s.Images["/x"] = imageState{Epoch: "e", Devices: []string{"c"}} },
	} {
		bad := good
		bad.Devices = append([]deviceState(nil), good.Devices...)
		bad.Images = map[string]imageState{}
		spoil(&bad)
		if err := bad.save(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := loadState(dir, 3); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, stateFile), []byte(`{"version":1`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := loadState(dir, 3); err == nil {
		t.Error("half a file was accepted")
	}
}

// FuzzState: what is accepted can be used.
func FuzzState(f *testing.F) {
	f.Add([]byte(`{"version":1,"epoch":"e","next_node":4,"devices":[{"name":"a","node":3,"size":1}],"images":{"/x":{"epoch":"e","devices":["a"]}}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var s state
		if json.Unmarshal(data, &s) != nil || s.check(3) != nil {
			return
		}
		s.prune()
		if err := s.check(3); err != nil {
			t.Errorf("pruning broke it: %v", err)
		}
	})
}
