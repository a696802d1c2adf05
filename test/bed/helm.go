package bed

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
)

var helmTool = tool{
	module:   "helm",
	packages: []string{"helm.sh/helm/v4/cmd/helm"},
	env:      []string{"CGO_ENABLED=0"},
}

// Helm is helm, and the chart of the checkout.
type Helm struct {
	Bin   string
	Chart string // directory
}

// NewHelm returns helm, built from its module unless it is cached. src is the
// checkout of Sluice; say tells a person what takes long.
func NewHelm(ctx context.Context, src string, say func(string)) (Helm, error) {
	dir, err := helmTool.build(ctx, src, say)
	return Helm{Bin: filepath.Join(dir, "helm"), Chart: filepath.Join(src, "deploy/chart")}, err
}

// Lint checks the chart.
func (h Helm) Lint(ctx context.Context, flags ...string) error {
	return run(exec.CommandContext(ctx, h.Bin, append([]string{"lint", "--strict", h.Chart}, flags...)...))
}

// Render returns what a release "sluice" of the chart consists of, as YAML
// documents. flags are of `helm template`, as in --set.
func (h Helm) Render(ctx context.Context, flags ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, h.Bin, append([]string{"template", "sluice", h.Chart}, flags...)...)
	var out, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problems
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("helm template %q: %w\n%s", flags, err, tail(problems.Bytes(), 4<<10))
	}
	return out.Bytes(), nil
}
