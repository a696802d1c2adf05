package main

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// run makes the events of `go test -json`, one per line of script: a test's name,
// empty for the package, then an action or, after "> ", a line of output.
func run(t *testing.T, script string) (tally, string) {
	t.Helper()
	var in, out strings.Builder
	for line := range strings.Lines(script) {
		line = strings.TrimSuffix(line, "\n")
		test, action, _ := strings.Cut(line, " ")
		e := event{Package: "p", Test: test, Action: action}
		if text, ok := strings.CutPrefix(action, "> "); ok {
			e.Action, e.Output = "output", text+"\n"
		}
		content, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		in.Write(append(content, '\n'))
	}
	return readEvents(strings.NewReader(in.String()), &out), out.String()
}

func TestReadEvents(t *testing.T) {
	got, out := run(t, `TestA run
TestA >     FIGURE speed: 1
TestA pass
TestB run
TestB/x run
TestB/x >     b_test.go:1: wrong
TestB/x fail
TestB fail
TestC run
TestC >     c_test.go:1: not here
TestC skip
 > FAIL p
 fail
`)
	if got.passed != 1 || !slices.Equal(got.failures, []string{"p TestB/x", "p TestB"}) || !slices.Equal(got.skips, []string{"p TestC: c_test.go:1: not here"}) {
		t.Errorf("%+v", got)
	}
	if want := "   FIGURE speed: 1\n   FAIL p TestB/x\n          b_test.go:1: wrong\n   FAIL p TestB\n"; out != want {
		t.Errorf("printed %q, want %q", out, want)
	}
}

// A package that fails without any of its tests is told by itself.
func TestReadEventsOfAPackage(t *testing.T) {
	got, out := run(t, " > no such directory\n fail\n")
	if !slices.Equal(got.failures, []string{"p"}) || !strings.Contains(out, "no such directory") {
		t.Errorf("%+v, printed %q", got, out)
	}
}

// Tests that never ended are named, with the part of the dump that is about them.
func TestReadEventsOfATimeout(t *testing.T) {
	var script strings.Builder
	script.WriteString("TestDone run\nTestDone pass\nTestA run\nTestA/sub run\nTestB run\n")
	for i := range 300 {
		fmt.Fprintf(&script, "TestA/sub >     a_test.go:1: step %d.\n", i)
	}
	script.WriteString("TestA/sub > panic: test timed out after 1s\nTestA/sub > \trunning tests:\nTestA/sub > \t\tTestB (1s)\nTestA/sub > \n")
	for i := range 300 {
		fmt.Fprintf(&script, "TestA/sub > goroutine %d [IO wait]:\nTestA/sub > \tnet.go:1\nTestA/sub > \n", i+100)
	}
	script.WriteString("TestA/sub > goroutine 7 [chan receive]:\nTestA/sub > p.TestB()\nTestA/sub > \tb_test.go:9\nTestA/sub > \n > FAIL p\n fail\n")
	got, out := run(t, script.String())
	if want := []string{"p TestA, which didn't end", "p TestA/sub, which didn't end", "p TestB, which didn't end"}; !slices.Equal(got.failures, want) || got.passed != 1 {
		t.Errorf("%+v, want failures %q", got, want)
	}
	for _, want := range []string{"panic: test timed out after 1s", "TestB (1s)", "b_test.go:9", "step 299.", "FAIL p TestA/sub, which didn't end"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q isn't in\n%s", want, out)
		}
	}
	if n := strings.Count(out, "\n"); n > maxSaid+maxDump+10 || strings.Contains(out, "step 1.") {
		t.Errorf("%d lines:\n%s", n, out)
	}
}

// A test binary that exits has no dump.
func TestReadEventsOfAnExit(t *testing.T) {
	got, out := run(t, "TestA run\nTestA >     a_test.go:1: bye\n > exit status 3\n fail\n")
	if !slices.Equal(got.failures, []string{"p TestA, which didn't end"}) || !strings.Contains(out, "bye") {
		t.Errorf("%+v, printed %q", got, out)
	}
}
