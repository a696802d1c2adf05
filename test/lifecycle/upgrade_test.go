package lifecycle

import (
	"path/filepath"
	"testing"

	"sluice/test/bed"
)

// TestUpgrade has the former version of sluice start containers, and the present
// one take over its state, its holder and its mounts: after an orderly stop and
// after kill -9.
func TestUpgrade(t *testing.T) {
	s := theStage(t)
	former, err := bed.Former(t.Context(), s.Src, func(s string) { t.Log(s) })
	if err != nil {
		t.Skipf("the former version can't be built: %v", err)
	}
	for name, end := range map[string]func(*bed.Process){"stopped": (*bed.Process).Stop, "killed": (*bed.Process).Kill} {
		t.Run(name, func(t *testing.T) {
			n := s.newNode(t, s.Tools, "--no-fill")
			n.UseFormer(former)
			start(t, n)
			must(t, n.Pull(t.Context(), bed.Sluice, s.Ref("app:1")))
			must(t, n.Pull(t.Context(), bed.Sluice, s.Ref("plain:1")))
			streaming, ordinary := filepath.Base(n.Dir)+"-s", filepath.Base(n.Dir)+"-o"
			detached(t, n, s.Ref("app:1"), streaming)
			detached(t, n, s.Ref("plain:1"), ordinary)
			end(n.Sluice)
			n.Use(s.Sluice)
			must(t, n.StartSluice(t.Context()))
			look(t, n, streaming, s.app)
			look(t, n, ordinary, s.plain)
			streams(t, n, s.Ref("app:1"))
			connected(t, n)
			s.runs(t, n, bed.Sluice, "app:1", s.app)

			must(t, n.PowerOff(t.Context()))
			start(t, n)
			s.runs(t, n, bed.Sluice, "app:1", s.app)
			s.runs(t, n, bed.Sluice, "plain:1", s.plain)
			for _, name := range []string{"app:1", "plain:1"} {
				remove(t, n, s.Ref(name))
			}
		})
	}
}
