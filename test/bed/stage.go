package bed

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// Stage is what tests of whole programs stand on. The tests of a package share
// one, which the first of them sets up.
type Stage struct {
	Src      string // the checkout
	Tools    Tools
	Sluice   string // the program under test
	Work     string // of everything; others may pass through, as through /run
	Registry *Registry
}

// NewStage builds what is needed and starts a registry. name begins the name of
// the stage's directory, and should be short: overlayfs's options have little
// room for paths. The working directory is that of a package two levels below
// the checkout, where `go test` runs. What there is of a stage is returned along
// with an error, to be closed.
func NewStage(ctx context.Context, name string, say func(string)) (*Stage, error) {
	s := &Stage{}
	for _, step := range []func() error{
		func() (err error) { s.Src, err = filepath.Abs("../.."); return },
		func() (err error) { s.Work, err = os.MkdirTemp("", "sluice-"+name+"-"); return },
		func() error { return os.Chmod(s.Work, 0o711) },
		func() (err error) { s.Tools, err = BuildTools(ctx, s.Src, say); return },
		func() (err error) { s.Sluice, err = BuildSluice(ctx, s.Src, s.Work); return },
		func() (err error) { s.Registry, err = StartRegistry(ctx, s.Sluice, s.Work); return },
	} {
		if err := step(); err != nil {
			return s, err
		}
	}
	return s, nil
}

// Close stops the registry and removes everything.
func (s *Stage) Close() error {
	if s.Registry != nil {
		s.Registry.Stop()
	}
	if s.Work == "" {
		return nil
	}
	if err := UnmountAll(s.Work); err != nil {
		return err // what is still mounted must not be removed
	}
	return os.RemoveAll(s.Work)
}

// Ref is how a node calls an image of the registry.
func (s *Stage) Ref(name string) string { return s.Registry.Addr + "/" + name }

// Push pushes an OCI layout to the registry.
func (s *Stage) Push(ctx context.Context, layout, name string) error {
	return s.Registry.Push(ctx, s.Tools, layout, name)
}

// Convert makes the streaming artifact of an image in any registry, with flags
// of `sluice artifact-streaming create`.
func (s *Stage) Convert(ctx context.Context, ref string, flags ...string) error {
	return run(exec.CommandContext(ctx, s.Sluice, append([]string{"artifact-streaming", "create", ref}, flags...)...))
}

// CloseAfter closes a stage after the tests, whose exit code it returns unless
// that fails.
func (s *Stage) CloseAfter(code int) int {
	if err := s.Close(); err != nil {
		fmt.Fprintln(os.Stderr, "the stage of the tests doesn't go away:", err)
		return 1
	}
	return code
}
