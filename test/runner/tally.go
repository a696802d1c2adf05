package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
)

// tally is what a step found.
type tally struct {
	passed   int
	failures []string
	skips    []string
}

func (t *tally) add(o tally) {
	t.passed += o.passed
	t.failures = append(t.failures, o.failures...)
	t.skips = append(t.skips, o.skips...)
}

func (t tally) String() string {
	return fmt.Sprintf("%d passed, %d failed, %d skipped", t.passed, len(t.failures), len(t.skips))
}

// event is one line of `go test -json`.
type event struct {
	Action      string
	Package     string
	ImportPath  string
	Test        string
	Output      string
	FailedBuild string
}

// id names a test or, when Test is empty, a package.
type id struct{ pkg, test string }

func (i id) String() string {
	if i.test == "" {
		return i.pkg
	}
	return i.pkg + " " + i.test
}

// readEvents counts what a `go test -json` run did. It shows the output of
// what failed at once, and lines that begin with "FIGURE" of what passed:
// measurements that a person wants to see.
func readEvents(r io.Reader) tally {
	var t tally
	output := map[id][]string{}
	failedChild := map[id]bool{}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			fmt.Fprintln(os.Stderr, lines.Text()) // a build error, or a panic of go itself
			continue
		}
		key := id{e.Package, e.Test}
		switch e.Action {
		case "build-output":
			fmt.Print("   " + e.Output)
		case "output":
			output[key] = append(output[key], e.Output)
			if s := strings.TrimSpace(e.Output); strings.Contains(s, "FIGURE") {
				fmt.Println("   " + s[strings.Index(s, "FIGURE"):])
			}
		case "pass":
			if e.Test != "" {
				t.passed++
			}
			delete(output, key)
		case "skip":
			if e.Test != "" {
				t.skips = append(t.skips, fmt.Sprintf("%s: %s", key, reason(output[key])))
			}
			delete(output, key)
		case "fail":
			parent, _, nested := strings.Cut(e.Test, "/")
			if nested {
				failedChild[id{e.Package, parent}] = true
			}
			failedChild[id{e.Package, ""}] = failedChild[id{e.Package, ""}] || e.Test != ""
			if e.Test == "" && failedChild[key] {
				continue // its tests have been told
			}
			t.failures = append(t.failures, key.String())
			fmt.Printf("   FAIL %s\n", key)
			for _, o := range output[key] {
				fmt.Print("      " + o)
			}
			delete(output, key)
		}
	}
	if err := lines.Err(); err != nil {
		t.failures = append(t.failures, "reading test output: "+err.Error())
	}
	return t
}

// reason finds what a skipped test said.
func reason(output []string) string {
	for i := len(output) - 1; i >= 0; i-- {
		s := strings.TrimSpace(output[i])
		if s == "" || strings.HasPrefix(s, "---") || strings.HasPrefix(s, "===") {
			continue
		}
		return s
	}
	return "no reason given"
}
