package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
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

// readEvents counts what a `go test -json` run did. It shows on out the output of
// what failed at once, and lines that begin with "FIGURE" of what passed:
// measurements that a person wants to see. Tests that have begun and didn't end
// when their package failed have failed too: a timeout, a panic or an exit of the
// test binary ends them without a word.
func readEvents(r io.Reader, out io.Writer) tally {
	e := events{out: out, output: map[id][]string{}, running: map[id]bool{}, failedChild: map[id]bool{}}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var ev event
		if json.Unmarshal(lines.Bytes(), &ev) != nil {
			fmt.Fprintln(os.Stderr, lines.Text()) // a build error, or a panic of go itself
			continue
		}
		e.take(ev)
	}
	if err := lines.Err(); err != nil {
		e.failures = append(e.failures, "reading test output: "+err.Error())
	}
	return e.tally
}

// events is what is known of a run so far.
type events struct {
	tally
	out         io.Writer
	output      map[id][]string
	running     map[id]bool // tests that have begun
	failedChild map[id]bool // by the test or package around it
}

func (e *events) take(ev event) {
	key := id{ev.Package, ev.Test}
	switch ev.Action {
	case "build-output":
		fmt.Fprint(e.out, "   "+ev.Output)
	case "run":
		e.running[key] = true
	case "output":
		e.output[key] = append(e.output[key], ev.Output)
		if s := strings.TrimSpace(ev.Output); strings.Contains(s, "FIGURE") {
			fmt.Fprintln(e.out, "   "+s[strings.Index(s, "FIGURE"):])
		}
	case "pass":
		if ev.Test != "" {
			e.passed++
		}
		e.forget(key)
	case "skip":
		if ev.Test != "" {
			e.skips = append(e.skips, fmt.Sprintf("%s: %s", key, reason(e.output[key])))
		}
		e.forget(key)
	case "fail":
		e.fail(key)
		e.forget(key)
	}
}

func (e *events) forget(key id) {
	delete(e.output, key)
	delete(e.running, key)
}

func (e *events) fail(key id) {
	if key.test == "" {
		e.failUnended(key)
		if e.failedChild[key] {
			return // its tests have been told
		}
	}
	if parent, _, nested := strings.Cut(key.test, "/"); nested {
		e.failedChild[id{key.pkg, parent}] = true
	}
	if key.test != "" {
		e.failedChild[id{key.pkg, ""}] = true
	}
	e.failures = append(e.failures, key.String())
	fmt.Fprintf(e.out, "   FAIL %s\n", key)
	for _, o := range e.output[key] {
		fmt.Fprint(e.out, "      "+o)
	}
}

// failUnended fails the tests of a package that have begun and didn't end.
func (e *events) failUnended(pkg id) {
	var unended []id
	for key := range e.running {
		if key.pkg == pkg.pkg {
			unended = append(unended, key)
		}
	}
	slices.SortFunc(unended, func(a, b id) int { return strings.Compare(a.test, b.test) })
	for _, key := range unended {
		e.failedChild[pkg] = true
		e.failures = append(e.failures, key.String()+", which didn't end")
		fmt.Fprintf(e.out, "   FAIL %s, which didn't end\n", key)
		for _, o := range excerpt(e.output[key]) {
			fmt.Fprint(e.out, "      "+o)
		}
		e.forget(key)
	}
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
