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

// The guide for Kubernetes says in a cluster's words what to do about each of the
// reasons: all of them, and no others.
func TestKubernetesGuideListsReasons(t *testing.T) {
	guide, err := os.ReadFile("../../../docs/kubernetes.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(guide), "| reason | meaning | what to do |\n|---|---|---|\n")
	table, _, _ = strings.Cut(table, "\n\n")
	var got []mount.Reason
	for line := range strings.Lines(table) {
		reason, rest, _ := strings.Cut(strings.TrimPrefix(line, "| `"), "` | ")
		if meaning, remedy, _ := strings.Cut(rest, " | "); len(meaning) < 10 || len(remedy) < 10 {
			t.Errorf("%s has no meaning or no remedy", reason)
		}
		got = append(got, mount.Reason(reason))
	}
	if want := mount.Reasons(); !slices.Equal(got, want) {
		t.Errorf("docs/kubernetes.md has the reasons %q, the program %q", got, want)
	}
}

func TestUnknownReasonsHaveWords(t *testing.T) {
	if r := mount.Reason("New"); r.Meaning() == "" || r.Remedy() == "" {
		t.Error("a reason of a newer daemon has no words")
	}
}
