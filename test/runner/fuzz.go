package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"
)

// fuzzed is a package that has fuzz targets.
type fuzzed struct {
	path, dir string
	targets   []string
	binary    string // once it's built
}

// fuzzAll runs every fuzz target of the main module for a while: one worker each,
// as many side by side as there are processors, so that none waits for another
// to start and collect its corpus. Each package is built once.
func fuzzAll(ctx context.Context, src string, each time.Duration) tally {
	packages, err := fuzzedPackages(ctx, src)
	if err != nil {
		return outcome("listing the fuzz targets", err)
	}
	out, err := exec.CommandContext(ctx, "go", "env", "GOCACHE").Output()
	if err != nil {
		return outcome("go env", err)
	}
	corpus := filepath.Join(strings.TrimSpace(string(out)), "fuzz") // where `go test -fuzz` has it
	work, err := os.MkdirTemp("", "sluice-fuzz-")
	if err != nil {
		return outcome("fuzz", err)
	}
	defer os.RemoveAll(work)

	var (
		mu      sync.Mutex // of t, and of what is printed
		t       tally
		jobs    = make(chan func() (name string, err error))
		workers sync.WaitGroup
	)
	note := func(name string, err error) {
		mu.Lock()
		defer mu.Unlock()
		t.add(outcome(name, err))
	}
	for range runtime.NumCPU() {
		workers.Go(func() {
			for job := range jobs {
				note(job())
			}
		})
	}
	for i, p := range packages {
		p.binary = filepath.Join(work, fmt.Sprint(i))
		if err := quiet(ctx, src, nil, "go", "test", "-c", "-fuzz=.", "-o", p.binary, p.path); err != nil {
			note(p.path, err)
			continue
		}
		for _, target := range p.targets {
			jobs <- func() (string, error) { return p.path + " " + target, p.fuzz(ctx, target, corpus, each) }
		}
	}
	close(jobs)
	workers.Wait()
	return t
}

// fuzz runs a target. Its corpus lies where `go test -fuzz` has it.
func (p fuzzed) fuzz(ctx context.Context, target, corpus string, each time.Duration) error {
	run := func() error {
		return quiet(ctx, p.dir, nil, p.binary, "-test.run=^$", "-test.fuzz=^"+target+"$", "-test.fuzztime="+each.String(),
			"-test.fuzzminimizetime=1x", "-test.parallel=1", "-test.fuzzcachedir="+filepath.Join(corpus, p.path))
	}
	err := run()
	if err != nil && !strings.Contains(err.Error(), "Failing input written") {
		// Go's fuzzing sometimes takes the end of its time for a failure
		// ("context deadline exceeded"); it has no input to show then.
		err = run()
	}
	return err
}

// fuzzedPackages lists the packages of a module that have fuzz targets.
func fuzzedPackages(ctx context.Context, src string) ([]fuzzed, error) {
	cmd := exec.CommandContext(ctx, "go", "list", "-f", `{{.ImportPath}} {{.Dir}}{{range .TestGoFiles}} {{.}}{{end}}{{range .XTestGoFiles}} {{.}}{{end}}`, "./...")
	cmd.Dir = src
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	var all []fuzzed
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		p := fuzzed{path: fields[0], dir: fields[1]}
		for _, file := range fields[2:] {
			text, err := os.ReadFile(filepath.Join(p.dir, file))
			if err != nil {
				return nil, err
			}
			p.targets = append(p.targets, fuzzTargets(text)...)
		}
		if len(p.targets) > 0 {
			all = append(all, p)
		}
	}
	return all, nil
}

// fuzzTargets returns the names of the fuzz functions in a test file.
func fuzzTargets(text []byte) []string {
	var names []string
	for line := range bytes.Lines(text) {
		if rest, ok := bytes.CutPrefix(line, []byte("func Fuzz")); ok {
			name, _, _ := bytes.Cut(rest, []byte("("))
			names = append(names, "Fuzz"+string(name))
		}
	}
	return names
}
