package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sluice/test/bed"
)

// step is one part of the run.
type step struct {
	name string
	run  func(ctx context.Context) tally
}

// steps lists them, the quick ones first.
func steps(src string, fuzz time.Duration) []step {
	modules := []string{src, filepath.Join(src, "test"), filepath.Join(src, "test/conformance"), filepath.Join(src, "test/converters")}
	s := []step{
		{"install: Debian packages", func(ctx context.Context) tally {
			return outcome("apt-get install", bed.Install(ctx, "gcc", "libc6-dev", "pkg-config", "libseccomp-dev", "erofs-utils", "attr", "zstd", "debootstrap", "iproute2",
				"postgresql", "nginx-light", "containernetworking-plugins", "isal", "pigz", "zlib1g-dev", "qemu-utils", "samba", "smbclient", "libnss-extrausers")) // Azurite's node comes with its first use: there are many ways to have one
		}},
		{"format: gofmt", func(ctx context.Context) tally { return gofmt(ctx, src) }},
	}
	for _, m := range modules {
		s = append(s, step{"vet: " + rel(src, m), func(ctx context.Context) tally {
			return outcome("go vet", quiet(ctx, m, nil, "go", "vet", "./..."))
		}}, step{"tidy: " + rel(src, m), func(ctx context.Context) tally {
			return outcome("go mod tidy -diff", quiet(ctx, m, nil, "go", "mod", "tidy", "-diff"))
		}})
	}
	s = append(s,
		step{"lint: golangci-lint", func(ctx context.Context) tally { return lint(ctx, modules) }},
		step{"unit: go test -race ./...", func(ctx context.Context) tally {
			runc, err := bed.Runc(ctx, src, func(s string) { fmt.Println("   " + s) })
			if err != nil {
				return outcome("building runc", err)
			}
			path := "PATH=" + filepath.Dir(runc) + ":" + os.Getenv("PATH")
			return goTest(ctx, src, []string{path}, "-race", "-timeout=20m", "./...")
		}},
		step{"fuzz: every target, briefly", func(ctx context.Context) tally { return fuzzAll(ctx, src, fuzz) }},
		step{"conformance: the official suite, on every backend", func(ctx context.Context) tally {
			return goTest(ctx, filepath.Join(src, "test/conformance"), nil, "-timeout=20m", "./...")
		}},
		step{"whole: real programs, two packages at a time", func(ctx context.Context) tally {
			return wholeTests(ctx, src, false, "-timeout=30m", "-p=2") // they wait a lot
		}},
		step{"alone: all that can go wrong, and figures", func(ctx context.Context) tally {
			return wholeTests(ctx, src, true, "-timeout=30m", "-p=1")
		}},
		step{"converters: ours and those of others", func(ctx context.Context) tally {
			return goTest(ctx, filepath.Join(src, "test/converters"), nil, "-timeout=10m", "./...")
		}},
	)
	return s
}

func rel(src, m string) string {
	r, err := filepath.Rel(src, m)
	if err != nil || r == "." {
		return "sluice"
	}
	return r
}

// outcome is a step of one check.
func outcome(name string, err error) tally {
	if err != nil {
		fmt.Printf("   FAIL %s\n%s\n", name, err)
		return tally{failures: []string{name}}
	}
	return tally{passed: 1}
}

// quiet runs a command and puts its output into the error.
func quiet(ctx context.Context, dir string, env []string, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s in %s: %w\n%s", name, dir, err, out)
	}
	return nil
}

// alone are the packages of the test module beside which nothing else may run:
// those that measure, and faults, which holds that nothing outlives a node; a
// namespace that another test makes has copies of its mounts.
var alone = []string{"sluice/test/boot", "sluice/test/faults", "sluice/test/flows", "sluice/test/kube", "sluice/test/peers", "sluice/test/starts", "sluice/test/whole"}

// wholeTests runs the packages of the test module that are to be alone, or all
// others.
func wholeTests(ctx context.Context, src string, one bool, args ...string) tally {
	dir := filepath.Join(src, "test")
	cmd := exec.CommandContext(ctx, "go", "list", "./...")
	cmd.Dir = dir
	out, err := cmd.Output()
	if err != nil {
		return outcome("go list in "+dir, err)
	}
	for path := range strings.FieldsSeq(string(out)) {
		if slices.Contains(alone, path) == one {
			args = append(args, path)
		}
	}
	return goTest(ctx, dir, []string{"SLUICE_SRC=" + src}, args...)
}

// goTest runs `go test` and counts.
func goTest(ctx context.Context, dir string, env []string, args ...string) tally {
	cmd := exec.CommandContext(ctx, "go", append([]string{"test", "-json"}, args...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return outcome("go test", err)
	}
	if err := cmd.Start(); err != nil {
		return outcome("go test", err)
	}
	t := readEvents(out, os.Stdout)
	if err := cmd.Wait(); err != nil && len(t.failures) == 0 {
		t.failures = append(t.failures, fmt.Sprintf("go test in %s: %v", dir, err))
	}
	return t
}

func gofmt(ctx context.Context, src string) tally {
	out, err := exec.CommandContext(ctx, "gofmt", "-l", src).CombinedOutput()
	if err == nil && len(out) > 0 {
		err = fmt.Errorf("not formatted:\n%s", out)
	}
	return outcome("gofmt", err)
}

// lint runs golangci-lint with the configuration of the main module on each.
func lint(ctx context.Context, modules []string) tally {
	bin, err := bed.Linter(ctx, modules[0], func(s string) { fmt.Println("   " + s) })
	if err != nil {
		return outcome("golangci-lint", err)
	}
	var t tally
	for _, m := range modules {
		err := quiet(ctx, m, nil, bin, "run", "--config", filepath.Join(modules[0], ".golangci.yml"), "./...")
		t.add(outcome("golangci-lint in "+rel(modules[0], m), err))
	}
	return t
}
