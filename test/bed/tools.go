package bed

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Tools are the programs of others, by path.
type Tools struct {
	// ContainerdDir holds containerd, containerd-shim-runc-v2 and ctr.
	ContainerdDir string
	Runc          string
	Crane         string
}

// Containerd returns the path of the daemon.
func (t Tools) Containerd() string { return filepath.Join(t.ContainerdDir, "containerd") }

// Ctr returns the path of its client.
func (t Tools) Ctr() string { return filepath.Join(t.ContainerdDir, "ctr") }

// tool is one nested module below test/tools: its go.mod pins the version, its
// packages are the programs.
type tool struct {
	module   string
	packages []string
	env      []string
	flags    []string
	apt      []string // Debian packages that the build needs
}

// containerdModules are the versions of containerd there are, the usual one
// first.
var containerdModules = []string{"containerd", "containerd-2.1", "containerd-2.2", "containerd-2.4"}

// containerdTool is the containerd of one of containerdModules.
func containerdTool(module string) tool {
	return tool{
		module: module,
		packages: []string{
			"github.com/containerd/containerd/v2/cmd/containerd",
			"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
			"github.com/containerd/containerd/v2/cmd/ctr",
		},
		env:   []string{"CGO_ENABLED=0"},
		flags: []string{"-tags", "no_btrfs no_devmapper no_zfs no_aufs"},
	}
}

// BuildOlderAndNewer returns t with every other version of containerd that is
// supported, built from their modules unless they are cached: by version,
// "2.1".
func BuildOlderAndNewer(ctx context.Context, t Tools, src string, say func(string)) (map[string]Tools, error) {
	all := map[string]Tools{}
	for _, module := range containerdModules[1:] {
		dir, err := containerdTool(module).build(ctx, src, say)
		if err != nil {
			return nil, err
		}
		other := t
		other.ContainerdDir = dir
		all[strings.TrimPrefix(module, "containerd-")] = other
	}
	return all, nil
}

var runcTool = tool{
	module:   "runc",
	packages: []string{"github.com/opencontainers/runc"},
	flags:    []string{"-tags", "seccomp"},
	apt:      []string{"gcc", "libseccomp-dev", "pkg-config"},
}

var craneTool = tool{
	module:   "crane",
	packages: []string{"github.com/google/go-containerregistry/cmd/crane"},
	env:      []string{"CGO_ENABLED=0"},
}

// BuildTools returns the tools, built from their modules unless they are
// cached. src is the checkout of Sluice; say tells a person what takes long.
func BuildTools(ctx context.Context, src string, say func(string)) (Tools, error) {
	var t Tools
	for _, b := range []struct {
		tool tool
		bin  string // file below the tool's directory; empty: the directory
		into *string
	}{
		{containerdTool(containerdModules[0]), "", &t.ContainerdDir},
		{runcTool, "runc", &t.Runc},
		{craneTool, "crane", &t.Crane},
	} {
		dir, err := b.tool.build(ctx, src, say)
		if err != nil {
			return Tools{}, err
		}
		*b.into = filepath.Join(dir, b.bin)
	}
	return t, nil
}

// build returns the directory with the tool's programs.
func (t tool) build(ctx context.Context, src string, say func(string)) (string, error) {
	moduleDir := filepath.Join(src, "test/tools", t.module)
	key, err := keyOf(filepath.Join(moduleDir, "go.mod"), filepath.Join(moduleDir, "go.sum"))
	if err != nil {
		return "", err
	}
	return cached("tools/"+t.module+"-"+key, func(tmp string) error {
		say("building " + t.module + " from its module (once; a minute or two)")
		if err := Install(ctx, t.apt...); err != nil {
			return err
		}
		args := append([]string{"build", "-trimpath", "-ldflags=-s -w", "-o", tmp + "/"}, t.flags...)
		cmd := exec.CommandContext(ctx, "go", append(args, t.packages...)...)
		cmd.Dir = moduleDir
		cmd.Env = append(os.Environ(), t.env...)
		return run(cmd)
	})
}

// keyOf returns a short hash of the files' content.
func keyOf(paths ...string) (string, error) {
	h := sha256.New()
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil {
			return "", err
		}
		h.Write(b)
	}
	return fmt.Sprintf("%x", h.Sum(nil)[:6]), nil
}

// missing returns those of some Debian packages that aren't installed.
func missing(ctx context.Context, packages []string) (names []string) {
	for _, p := range packages {
		out, err := exec.CommandContext(ctx, "dpkg-query", "-W", "-f=${Status}", p).Output()
		if err != nil || !bytes.Contains(out, []byte("install ok installed")) {
			names = append(names, p)
		}
	}
	return names
}

// Install makes sure that Debian packages are installed.
func Install(ctx context.Context, packages ...string) error {
	if len(missing(ctx, packages)) == 0 {
		return nil
	}
	root, err := Dir()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	unlock, err := lock(filepath.Join(root, "apt"))
	if err != nil {
		return err
	}
	defer unlock()
	missing := missing(ctx, packages)
	if len(missing) == 0 {
		return nil
	}
	for _, args := range [][]string{{"update", "-q"}, append([]string{"install", "-q", "-y", "--no-install-recommends"}, missing...)} {
		cmd := exec.CommandContext(ctx, "apt-get", args...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if err := run(cmd); err != nil {
			return fmt.Errorf("installing %v: %w", missing, err)
		}
	}
	return nil
}

// run runs cmd and puts what it printed into the error when it fails.
func run(cmd *exec.Cmd) error {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w\n%s", filepath.Base(cmd.Path), err, tail(out.Bytes(), 4<<10))
	}
	return nil
}

// tail returns the last n bytes of b at most.
func tail(b []byte, n int) []byte {
	if len(b) > n {
		b = b[len(b)-n:]
	}
	return b
}

var linterTool = tool{
	module:   "golangci-lint",
	packages: []string{"github.com/golangci/golangci-lint/v2/cmd/golangci-lint"},
	env:      []string{"CGO_ENABLED=0"},
}

// Linter returns the path of golangci-lint, built unless it is cached.
func Linter(ctx context.Context, src string, say func(string)) (string, error) {
	dir, err := linterTool.build(ctx, src, say)
	return filepath.Join(dir, "golangci-lint"), err
}

// BuildSluice builds the program under test into dir and returns its path.
// SLUICE_BINARY in the environment is used instead: another version, to compare.
func BuildSluice(ctx context.Context, src, dir string) (string, error) {
	if bin := os.Getenv("SLUICE_BINARY"); bin != "" {
		return bin, nil
	}
	return buildSluice(ctx, src, dir)
}

// buildSluice builds the program in the checkout src.
func buildSluice(ctx context.Context, src, dir string) (string, error) {
	return buildCommand(ctx, src, dir, "sluice")
}

// BuildReporter builds sluice-reporter into dir and returns its path.
func BuildReporter(ctx context.Context, src, dir string) (string, error) {
	return buildCommand(ctx, src, dir, "sluice-reporter")
}

// buildCommand builds one of the programs below cmd in the checkout src.
func buildCommand(ctx context.Context, src, dir, name string) (string, error) {
	bin := filepath.Join(dir, name)
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", bin, "./cmd/"+name)
	cmd.Dir, cmd.Env = src, append(os.Environ(), "CGO_ENABLED=0")
	return bin, run(cmd)
}

// Runc returns the path of runc, built unless it is cached.
func Runc(ctx context.Context, src string, say func(string)) (string, error) {
	dir, err := runcTool.build(ctx, src, say)
	return filepath.Join(dir, "runc"), err
}
