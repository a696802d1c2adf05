package mount_test

import (
	"os"
	"slices"
	"strings"
	"testing"

	"sluice/internal/node/mount"
)

// The operators' guide has the reasons in the program's own words: all of them,
// and no others.
func TestGuideListsReasons(t *testing.T) {
	guide, err := os.ReadFile("../../../docs/containerd.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, found := strings.Cut(string(guide), "| reason | meaning | what to do |\n|---|---|---|\n")
	if !found {
		t.Fatal("docs/containerd.md has no table of reasons")
	}
	table, _, _ = strings.Cut(table, "\n\n")
	got := strings.Split(strings.ReplaceAll(strings.TrimSpace(table), "`", ""), "\n")
	var want []string
	for _, r := range mount.Reasons() {
		want = append(want, "| "+string(r)+" | "+r.Meaning()+" | "+r.Remedy()+" |")
	}
	if !slices.Equal(got, want) {
		t.Errorf("the guide's table, without backticks:\n%s\nthe program's:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestUnknownReasonsHaveWords(t *testing.T) {
	if r := mount.Reason("New"); r.Meaning() == "" || r.Remedy() == "" {
		t.Error("a reason of a newer daemon has no words")
	}
}
