package kube

import (
	"context"
	"net/http"
	"strings"
	"testing"

	"sluice/test/bed"
)

// TestHelm installs, changes and removes a release as docs/kubernetes.md says. Its
// image doesn't exist, so nothing of it runs; TestInstallUpgradeUninstall is about
// what runs.
func TestHelm(t *testing.T) {
	s := theStage(t)
	h, err := bed.NewHelm(t.Context(), s.Src, func(text string) { t.Log(text) })
	must(t, err)
	n := s.newNamespace(t)
	home := t.TempDir()
	helm := func(ctx context.Context, args ...string) error {
		return s.Run(ctx, "env", append([]string{"HOME=" + home, h.Bin, "--kubeconfig", "/etc/kubernetes/admin.kubeconfig", "-n", n.name}, args...)...)
	}
	daemonSets := func() string {
		var list struct {
			Items []struct{ Metadata struct{ Name string } }
		}
		must(t, s.API.Do(t.Context(), http.MethodGet, "/apis/apps/v1/namespaces/"+n.name+"/daemonsets", nil, &list))
		var names []string
		for _, d := range list.Items {
			names = append(names, d.Metadata.Name)
		}
		return strings.Join(names, " ")
	}

	must(t, s.API.Patch(t.Context(), "/api/v1/namespaces/"+n.name, map[string]any{
		"metadata": map[string]any{"labels": map[string]string{"pod-security.kubernetes.io/enforce": "privileged"}},
	}))
	must(t, helm(t.Context(), "install", "sluice", h.Chart, "--set", "image.repository="+s.ref("none")))
	removed := false
	t.Cleanup(func() {
		if !removed { // it has objects that belong to no namespace
			t.Error(helm(context.Background(), "uninstall", "sluice"))
		}
	})
	if got := daemonSets(); got != "sluice-node" {
		t.Errorf("installed: %q", got)
	}
	must(t, helm(t.Context(), "upgrade", "sluice", h.Chart, "--reuse-values", "--set", "node.uninstall=true"))
	eventually(t, patience, "sluice-uninstall is in the place of sluice-node", func() bool { return daemonSets() == "sluice-uninstall" })
	must(t, helm(t.Context(), "uninstall", "sluice"))
	removed = true
	eventually(t, patience, "the release is gone", func() bool { return daemonSets() == "" })
	var role struct{ Metadata struct{ Name string } }
	if err := s.API.Do(t.Context(), http.MethodGet, "/apis/rbac.authorization.k8s.io/v1/clusterroles/sluice-reporter", nil, &role); err == nil {
		t.Errorf("left over: ClusterRole %s", role.Metadata.Name)
	}
}
