package main

import (
	"bytes"
	"fmt"

	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"sluice/test/bed"
)

func helm(t *testing.T) bed.Helm {
	t.Helper()
	src, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	h, err := bed.NewHelm(t.Context(), src, func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func TestManifestsAreCurrent(t *testing.T) {
	h := helm(t)
	known := map[string]bool{}
	for _, m := range manifests() {
		known[m.file] = true
		want, err := m.render(t.Context(), h)
		if err != nil {
			t.Error(err)
			continue
		}
		got, err := os.ReadFile(filepath.Join("../../deploy/manifests", m.file))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("deploy/manifests/%s isn't what deploy/chart renders (%v): run `make manifests`", m.file, err)
		}
	}
	files, err := filepath.Glob("../../deploy/manifests/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !known[filepath.Base(f)] {
			t.Errorf("%s is made from nothing", f)
		}
	}
}

// variants are values of all kinds, each with what its registry is.
func variants() map[string][]string {
	secret := "registry.existingSecret=s"
	return map[string][]string{
		"node":  {},
		"bare":  {"reporter.enabled=false", "node.kubelet=false"},
		"gone":  {"node.uninstall=true", "node.uninstallArgs={--wait=2h}"},
		"nodes": {"node.registries={r.example.com,r.example.com:5000}", "node.extraArgs={--no-fill}", "node.installArgs={--replace-snapshotter}", "imagePullSecrets={a,b}", "image.digest=sha256:" + strings.Repeat("0", 64)},
		"local": {"registry.enabled=true", "registry.secrets.adminPassword=p"},
		"open":  {"registry.enabled=true", "registry.auth.enabled=false", "registry.config=[soft_delete]\ndays = 7"},
		"tls":   {"registry.enabled=true", secret, "registry.tls.existingSecret=t", "registry.externalURL=https://r.example.com", "registry.metrics.enabled=true"},
		"s3":    {"registry.enabled=true", secret, "registry.replicas=3", "registry.storage.kind=s3", "registry.storage.s3.endpoint=s3", "registry.storage.s3.bucket=images", "registry.storage.s3.accessKey=k", "registry.storage.redirect=10m"},
		"azure": {"registry.enabled=true", "registry.replicas=2", "registry.storage.kind=azure", "registry.storage.azure.container=images", "registry.secrets.adminPassword=p", "registry.secrets.azureConnectionString=c", "registry.secrets.databaseURL=postgres://u:p@h/d"},
		"identity": {"registry.enabled=true", secret, "registry.storage.kind=azure", "registry.storage.azure.container=images", "registry.storage.azure.serviceURL=https://a.blob.core.windows.net",
			"registry.serviceAccountAnnotations.a=b", "registry.podLabels.c=d"},
		"around": {"registry.enabled=true", secret, "registry.ingress.enabled=true", "registry.ingress.host=r.example.com", "registry.ingress.tlsSecret=t", "registry.ingress.className=n",
			"registry.networkPolicy.enabled=true", "registry.metrics.enabled=true", "registry.networkPolicy.metricsFrom[0].podSelector.matchLabels.app=p", "registry.service.type=NodePort", "registry.service.nodePort=30500"},
	}
}

// flagsOf returns the flags of helm that set values.
func flagsOf(values []string) []string {
	flags := []string{"--namespace", "sluice", "--set", "image.repository=registry.example.com/sluice"}
	for _, v := range values {
		flags = append(flags, "--set", v)
	}
	return flags
}

func TestChartPassesLint(t *testing.T) {
	h := helm(t)
	for name, values := range variants() {
		if err := h.Lint(t.Context(), flagsOf(values)...); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestWrongValuesAreTold holds that whoever misspells or forgets a value reads
// which one.
func TestWrongValuesAreTold(t *testing.T) {
	h := helm(t)
	for value, told := range map[string]string{
		"image.repository=":           "image.repository",
		"node.enabeld=true":           "enabeld",
		"node.registries={https://r}": "/node/registries/0",
		"node.extraArgs={no-fill}":    "/node/extraArgs/0",
		"node.labelKey=a b":           "/node/labelKey",
		"node.maxUnavailable=0":       "/node/maxUnavailable",
		"registry.storage.kind=nfs":   "/registry/storage/kind",
		"registry.enabled=true":       "admin-password",
		"registry.enabled=true,registry.storage.kind=s3,registry.existingSecret=s":      "registry.storage.s3",
		"registry.enabled=true,registry.storage.kind=azure,registry.existingSecret=s":   "registry.storage.azure",
		"registry.enabled=true,registry.replicas=2,registry.existingSecret=s":           "registry.replicas",
		"registry.enabled=true,registry.ingress.enabled=true,registry.existingSecret=s": "registry.ingress.host",
	} {
		_, err := h.Render(t.Context(), append(flagsOf(nil), "--set", value)...)
		if err == nil || !strings.Contains(err.Error(), told) {
			t.Errorf("%s: the error doesn't name %s: %v", value, told, err)
		}
	}
}

// object is what these tests know of Kubernetes' objects.
type object struct {
	Kind     string
	Metadata struct{ Name string }
	Data     map[string]string
	Rules    []map[string][]string
	Spec     struct {
		Template struct {
			Spec struct {
				InitContainers []container `yaml:"initContainers"`
				Containers     []container
			}
		}
	}
}

type container struct {
	Name          string
	Command, Args []string
	Env           []struct{ Name, Value string }
}

func render(t *testing.T, h bed.Helm, values []string) []object {
	t.Helper()
	text, err := h.Render(t.Context(), flagsOf(values)...)
	if err != nil {
		t.Fatal(err)
	}
	var all []object
	for d := yaml.NewDecoder(bytes.NewReader(text)); ; {
		var o object
		if err := d.Decode(&o); err != nil {
			if err.Error() != "EOF" {
				t.Fatal(err)
			}
			return all
		}
		all = append(all, o)
	}
}

// TestRegistryTakesItsConfiguration has the registry itself judge what the chart
// gives it.
func TestRegistryTakesItsConfiguration(t *testing.T) {
	h := helm(t)
	sluice, err := bed.BuildSluice(t.Context(), "../..", t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	judged := 0
	for name, values := range variants() {
		etc := t.TempDir()
		var env []string
		for _, o := range render(t, h, values) {
			if o.Kind == "ConfigMap" {
				writeFiles(t, filepath.Join(etc, "config"), o.Data)
			}
			if o.Kind != "Deployment" {
				continue
			}
			for _, v := range o.Spec.Template.Spec.Containers[0].Env {
				if key, ok := strings.CutPrefix(v.Value, "/etc/sluice/secrets/"); ok {
					content := "secret"
					if key == "database-url" {
						content = "postgres://u:p@h/d"
					}
					writeFiles(t, filepath.Join(etc, "secrets"), map[string]string{key: content})
				}
				env = append(env, v.Name+"="+strings.Replace(v.Value, "/etc/sluice", etc, 1))
			}
		}
		if env == nil {
			continue // a variant without a registry
		}
		judged++
		cmd := exec.CommandContext(t.Context(), sluice, "registry", "check-config")
		cmd.Env = append(os.Environ(), env...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%s: the registry refuses its configuration: %v\n%s\n%s", name, err, out, strings.Join(env, "\n"))
			continue
		}
		for _, v := range env {
			if key, _, _ := strings.Cut(v, "="); key != "SLUICE_REGISTRY_CONFIG" && !strings.Contains(string(out), key) {
				t.Errorf("%s: %s isn't in force:\n%s", name, key, out)
			}
		}
	}
	if judged < 6 {
		t.Errorf("%d configurations were judged", judged)
	}
}

func writeFiles(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestProgramsTakeTheirFlags has the programs themselves judge the flags that the
// chart gives them.
func TestProgramsTakeTheirFlags(t *testing.T) {
	h := helm(t)
	bin := t.TempDir()
	build := exec.CommandContext(t.Context(), "go", "build", "-o", bin+"/", "./cmd/sluice", "./cmd/sluice-reporter")
	build.Dir = "../.."
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	judged := map[string]bool{}
	for name, values := range variants() {
		for _, o := range render(t, h, values) {
			for _, c := range append(o.Spec.Template.Spec.InitContainers, o.Spec.Template.Spec.Containers...) {
				judged[c.Name] = true
				words := append(c.Command, c.Args...)
				takes(t, name, filepath.Join(bin, filepath.Base(words[0])), words[1:])
			}
		}
	}
	for _, c := range []string{"install", "reporter", "registry", "unlabel", "uninstall", "removed"} {
		if !judged[c] {
			t.Errorf("no container %s was judged", c)
		}
	}
}

// takes fails the test unless a program knows the flags; those behind "--" are of
// `sluice node`.
func takes(t *testing.T, name, program string, args []string) {
	t.Helper()
	if i := slices.Index(args, "--"); i >= 0 {
		takes(t, name, program, append([]string{"node"}, args[i+1:]...))
		args = args[:i]
	}
	cmd := exec.CommandContext(t.Context(), program, append(slices.Clone(args), "--help")...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%s: %s %q: %v\n%s", name, filepath.Base(program), args, err, out)
	}
}

// TestRoleIsWhatTheReporterNeeds compares the ClusterRole with what package kube
// says that it needs.
func TestRoleIsWhatTheReporterNeeds(t *testing.T) {
	doc, err := os.ReadFile("../../internal/kube/doc.go")
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for _, line := range regexp.MustCompile(`(?m)^//   (- \{apiGroups.*)$`).FindAllSubmatch(doc, -1) {
		fmt.Fprintf(&text, "%s\n", line[1])
	}
	var want []map[string][]string
	if err := yaml.Unmarshal([]byte(text.String()), &want); err != nil || len(want) == 0 {
		t.Fatalf("no rules in internal/kube/doc.go: %v", err)
	}
	for _, o := range render(t, helm(t), nil) {
		if o.Kind == "ClusterRole" && !reflect.DeepEqual(o.Rules, want) {
			t.Errorf("the ClusterRole has %v, the reporter needs %v", o.Rules, want)
		} else if o.Kind == "ClusterRole" {
			return
		}
	}
	t.Error("no ClusterRole")
}

// TestDockerfileHasWhatTheChartRuns holds together what can't be built where no
// base image can be had.
func TestDockerfileHasWhatTheChartRuns(t *testing.T) {
	file, err := os.ReadFile("../../deploy/Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{"./cmd/sluice ./cmd/sluice-reporter", "-o /out/", "COPY --from=build /out/ /usr/local/bin/", "CGO_ENABLED=0", "USER 65532"} {
		if !strings.Contains(string(file), part) {
			t.Errorf("deploy/Dockerfile has no %q", part)
		}
	}
	mod, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	_, version, _ := strings.Cut(string(mod), "\ngo ")
	version, _, _ = strings.Cut(version, "\n")
	major := version[:strings.LastIndexByte(version, '.')]
	if !strings.Contains(string(file), "golang:"+major+".") {
		t.Errorf("deploy/Dockerfile builds with another Go than %s", version)
	}
}

// TestUnitsAreRight has systemd judge the units.
func TestUnitsAreRight(t *testing.T) {
	if err := bed.Install(t.Context(), "systemd"); err != nil {
		t.Fatal(err)
	}
	units, err := filepath.Glob("../../deploy/systemd/*.service")
	if err != nil || len(units) == 0 {
		t.Fatal("no units", err)
	}
	program := regexp.MustCompile(`=/usr/local/bin/\w+`)
	for _, name := range units {
		unit, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		// The program isn't installed where the test runs.
		copied := filepath.Join(t.TempDir(), filepath.Base(name))
		if err := os.WriteFile(copied, program.ReplaceAll(unit, []byte("=/bin/true")), 0o644); err != nil {
			t.Fatal(err)
		}
		out, err := exec.CommandContext(t.Context(), "systemd-analyze", "verify", "--man=no", copied).CombinedOutput()
		if err != nil || bytes.Contains(out, []byte(filepath.Base(name))) {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}
