package progress

import (
	"bytes"
	"os"
	"strings"
	"testing"
)

// However many parts a work has, a log gets a few lines.
func TestLinesAreFew(t *testing.T) {
	var out bytes.Buffer
	l := &lines{Writer: &out}
	s := Step{Name: "linux/arm64", Verb: "converting", Ended: "published", Parts: "100 layers", Size: 100_000_000, Label: "layer", Total: 1_000_000}
	for s.Part = range 100 {
		if s.Part == 50 {
			l.last = l.last.Add(-lineEvery) // ten seconds pass
		}
		for _, s.Done = range []int64{500_000, 1_000_000} {
			s.Finished = s.Done == s.Total
			l.Show(s)
		}
	}
	s.Label = ""
	l.Show(s) // something else is being done
	s.Complete = true
	l.Show(s)
	want := "linux/arm64: converting 100 layers, 100.0 MB\n" +
		"linux/arm64: 50 of 100 layers, 50.5 MB of 100.0 MB\n" +
		"linux/arm64: published\n"
	if out.String() != want {
		t.Errorf("got %q, want %q", &out, want)
	}
	l.Show(s)
	if out.String() != want {
		t.Errorf("of what was done before it said %q", strings.TrimPrefix(out.String(), want))
	}
}

// Bars are for terminals; anywhere else they would be garbage.
func TestFilesGetLines(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "log")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, ok := New(f).(*lines); !ok {
		t.Error("a file got bars")
	}
}
