package main

import (
	"bytes"
	"context"
	"strings"

	"sluice/test/bed"
)

// exampleImage is what the plain manifests call the image. Who applies them puts
// the real one there.
const exampleImage = "registry.example.com/sluice"

// manifest is one plain manifest.
type manifest struct {
	file  string
	about string // its first lines, without "# "
	space string // namespace
	set   []string
}

// manifests returns all of them.
func manifests() []manifest {
	return []manifest{
		{"sluice-node.yaml", `Streaming on every node: the daemon, and what tells the API server of it.
docs/kubernetes.md is the guide. Put your image in its place:

  sed 's|` + exampleImage + `|YOUR/IMAGE|' sluice-node.yaml | kubectl apply -f -`,
			"sluice", []string{"namespace.create=true"}},
		{"uninstall.yaml", `Removes Sluice from every node. Put your image here as in sluice-node.yaml.

  kubectl -n sluice delete daemonset sluice-node
  kubectl apply -f uninstall.yaml
  kubectl -n sluice rollout status daemonset/sluice-uninstall
  kubectl delete -f uninstall.yaml -f sluice-node.yaml`,
			"sluice", []string{"node.uninstall=true"}},
		{"registry-pvc.yaml", `A registry on a volume. It starts when it has the admin user's password:

  kubectl -n sluice-registry create secret generic sluice-registry --from-literal=admin-password=…`,
			"sluice-registry", []string{"namespace.create=true", "node.enabled=false", "registry.enabled=true", "registry.existingSecret=sluice-registry"}},
		{"registry-objectstore.yaml", `A registry of several replicas on an object store of the kind S3 and PostgreSQL.
Put your endpoint, bucket and access key below. It starts when it has its secrets:

  kubectl -n sluice-registry create secret generic sluice-registry --from-literal=admin-password=… \
    --from-literal=s3-secret-key=… --from-literal=database-url=postgres://USER:PASSWORD@HOST/DATABASE

For Azure Blob Storage render the chart with registry.storage.kind=azure.`,
			"sluice-registry", []string{"namespace.create=true", "node.enabled=false", "registry.enabled=true", "registry.replicas=2", "registry.existingSecret=sluice-registry",
				"registry.storage.kind=s3", "registry.storage.s3.endpoint=s3.example.com", "registry.storage.s3.bucket=images", "registry.storage.s3.accessKey=registry"}},
	}
}

// render returns the manifest's content.
func (m manifest) render(ctx context.Context, h bed.Helm) ([]byte, error) {
	flags := []string{"--namespace", m.space, "--set", "image.repository=" + exampleImage}
	for _, s := range m.set {
		flags = append(flags, "--set", s)
	}
	rendered, err := h.Render(ctx, flags...)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	b.WriteString("# Made from deploy/chart by `make manifests`.\n#\n")
	for line := range strings.Lines(m.about) {
		b.WriteString(strings.TrimRight("# "+strings.TrimSuffix(line, "\n"), " ") + "\n")
	}
	for line := range strings.Lines(string(rendered)) {
		text := strings.TrimSpace(line)
		if text == "" || strings.HasPrefix(text, "# Source: ") || text == "app.kubernetes.io/managed-by: Helm" {
			continue
		}
		b.WriteString(strings.TrimRight(line, " \n") + "\n")
	}
	return b.Bytes(), nil
}
