package bed

import (
	"bufio"
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// StargzTools are the peer's programs: stargz-snapshotter's libraries with
// mains of ours, in one directory.
type StargzTools string

// Node returns the path of the snapshotter's daemon.
func (t StargzTools) Node() string { return filepath.Join(string(t), "stargz-node") }

func (t StargzTools) convert() string { return filepath.Join(string(t), "stargz-convert") }

var stargzTool = tool{
	module:   "stargz",
	packages: []string{"./cmd/stargz-node", "./cmd/stargz-convert"},
	env:      []string{"CGO_ENABLED=0"},
}

// BuildStargz returns the peer's programs, built from their module unless they
// are cached.
func BuildStargz(ctx context.Context, src string, say func(string)) (StargzTools, error) {
	dir, err := stargzTool.build(ctx, src, say)
	return StargzTools(dir), err
}

// StargzCommand is the workload that the optimized images are optimized for.
func StargzCommand() []string { return []string{"python3", "-c", `print("hi")`} }

// DebianStargz returns the images of Debian as eStargz, optimized for
// StargzCommand: the peer's best case, for which the workload was run before.
// They are made unless they are cached.
func DebianStargz(ctx context.Context, t StargzTools, plain Images, say func(string)) (Images, error) {
	dir, err := cached("images/stargz-"+filepath.Base(string(t))+"-"+filepath.Base(debianKey), func(tmp string) error {
		files, err := filesRead(ctx, tmp, plain.OneLayer, StargzCommand())
		if err != nil {
			return err
		}
		say("converting the images to eStargz (once; a minute or two)")
		for from, to := range map[string]string{plain.OneLayer: "1", plain.ManyLayers: "28"} {
			if err := run(exec.CommandContext(ctx, t.convert(), append([]string{from, filepath.Join(tmp, to)}, files...)...)); err != nil {
				return err
			}
		}
		return nil
	})
	return Images{OneLayer: filepath.Join(dir, "1"), ManyLayers: filepath.Join(dir, "28")}, err
}

// filesRead runs a command in the root file system of a one-layer image and
// returns the files that it opened, as absolute paths there, each once, in
// that order.
func filesRead(ctx context.Context, work, layout string, command []string) ([]string, error) {
	if err := Install(ctx, "strace"); err != nil {
		return nil, err
	}
	layers, err := LayerFiles(layout)
	if err != nil {
		return nil, err
	}
	root, log := filepath.Join(work, "root"), filepath.Join(work, "opened")
	if err := os.Mkdir(root, 0o755); err != nil {
		return nil, err
	}
	defer os.RemoveAll(root)
	defer os.Remove(log)
	for _, l := range layers {
		if err := run(exec.CommandContext(ctx, "tar", "-C", root, "-xzf", l)); err != nil {
			return nil, err
		}
	}
	// -y names the file that a descriptor is, symbolic links resolved.
	args := append([]string{"-f", "-y", "-e", "trace=open,openat", "-o", log, "chroot", root}, command...)
	if err := run(exec.CommandContext(ctx, "strace", args...)); err != nil {
		return nil, err
	}
	text, err := os.ReadFile(log)
	if err != nil {
		return nil, err
	}
	// What the kernel opens for execve isn't a system call.
	files := []string{}
	for _, p := range []string{"usr/bin/" + command[0], "lib64/ld-linux-x86-64.so.2"} {
		if real, err := filepath.EvalSymlinks(filepath.Join(root, p)); err == nil {
			files = append(files, strings.TrimPrefix(real, root))
		}
	}
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		_, result, _ := strings.Cut(lines.Text(), ") = ")
		_, path, opened := strings.Cut(result, "<"+root)
		path = strings.TrimSuffix(strings.TrimSpace(path), ">")
		fi, err := os.Lstat(filepath.Join(root, path))
		if opened && err == nil && fi.Mode().IsRegular() && !slices.Contains(files, path) {
			files = append(files, path)
		}
	}
	return files, nil
}
