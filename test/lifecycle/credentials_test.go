package lifecycle

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sluice/internal/node/credentials"
	"sluice/internal/node/mount"
	"sluice/test/bed"
)

// vault is a registry with accounts, which has app:1 and secret:1.
type vault struct {
	*bed.Registry
	sluice   string
	password string // the admin user's
	secret   bed.Toolbox
}

func (s *stage) newVault(t *testing.T) *vault {
	t.Helper()
	dir := t.TempDir()
	reg, err := bed.StartRegistry(t.Context(), s.Sluice, dir, "SLUICE_REGISTRY_AUTH_ENABLED=true", "SLUICE_REGISTRY_AUTH_ADMIN_ENABLED=true")
	must(t, err)
	t.Cleanup(reg.Stop)
	password, err := os.ReadFile(filepath.Join(reg.Dir, "registry", "admin-password"))
	must(t, err)
	v := &vault{Registry: reg, sluice: s.Sluice, password: strings.TrimSpace(string(password))}
	v.secret, err = bed.NewToolbox(t.Context(), filepath.Join(dir, "secret"), 3, 40_000)
	must(t, err)
	t.Setenv("DOCKER_CONFIG", v.login(t, "admin", v.password))
	must(t, reg.Push(t.Context(), s.Tools, s.app.Layout, "app:1"))
	must(t, reg.Push(t.Context(), s.Tools, v.secret.Layout, "secret:1"))
	v.do(t, "artifact-streaming", "create", v.ref())
	t.Setenv("DOCKER_CONFIG", filepath.Join(dir, "none")) // the nodes aren't the admin user
	return v
}

func (v *vault) ref() string { return v.Addr + "/app:1" }

// login returns a directory of docker's configuration with a password.
func (v *vault) login(t *testing.T, user, password string) string {
	t.Helper()
	dir := t.TempDir()
	content := fmt.Sprintf(`{"auths": {%q: {"username": %q, "password": %q}}}`, v.Addr, user, password)
	must(t, os.WriteFile(filepath.Join(dir, "config.json"), []byte(content), 0o600))
	return dir
}

// do runs a verb of sluice as the admin user.
func (v *vault) do(t *testing.T, verb ...string) []byte {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), v.sluice, append(verb, "--username", "admin", "--password-stdin", "--output", "json")...)
	cmd.Stdin = strings.NewReader(v.password)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%q: %v\n%s", verb, err, out)
	}
	return out
}

// account makes an account that may pull, and returns what kubelet would pass.
func (v *vault) account(t *testing.T, name string) *runtimeapi.AuthConfig {
	t.Helper()
	var answer struct {
		Passwords []struct{ Value string }
	}
	must(t, json.Unmarshal(v.do(t, "token", "create", "--registry", v.Addr, name, "--repository", "app=content/read,metadata/read"), &answer))
	return &runtimeapi.AuthConfig{Username: name, Password: answer.Passwords[0].Value}
}

// provider is a credential-provider plugin of kubelet's.
type provider struct{ dir string }

func newProvider(t *testing.T, host string) provider {
	t.Helper()
	p := provider{t.TempDir()}
	must(t, os.WriteFile(filepath.Join(p.dir, "provider"), fmt.Appendf(nil, "#!/bin/sh\ncat >/dev/null; exec cat %s/answer\n", p.dir), 0o755))
	must(t, os.WriteFile(filepath.Join(p.dir, "config.yaml"), fmt.Appendf(nil, `kind: CredentialProviderConfig
providers:
- name: provider
  apiVersion: credentialprovider.kubelet.k8s.io/v1
  matchImages: [%q]
  defaultCacheDuration: 0s
`, host), 0o600))
	return p
}

func (p provider) says(t *testing.T, host string, a *runtimeapi.AuthConfig) {
	t.Helper()
	content := fmt.Sprintf(`{"kind": "CredentialProviderResponse", "apiVersion": "credentialprovider.kubelet.k8s.io/v1", "cacheKeyType": "Image",
		"auth": {%q: {"username": %q, "password": %q}}}`, host, a.Username, a.Password)
	must(t, os.WriteFile(filepath.Join(p.dir, "new"), []byte(content), 0o600))
	must(t, os.Rename(filepath.Join(p.dir, "new"), filepath.Join(p.dir, "answer")))
}

// TestCredentials pulls with a credential that only kubelet has, and reads on
// with it after the daemon was killed, and with another after it was revoked.
func TestCredentials(t *testing.T) {
	s := theStage(t)
	v := s.newVault(t)
	right, wrong := v.account(t, "robot"), &runtimeapi.AuthConfig{Username: "robot", Password: "wr0ng"}
	plugin := newProvider(t, v.Addr)
	containerd := filepath.Join(t.TempDir(), "containerd.sock")
	n := s.newNode(t, s.Tools, "--cri-socket", containerd, "--no-fill", "--docker-config", v.login(t, "robot", "wr0ng"),
		"--image-credential-provider-config", filepath.Join(plugin.dir, "config.yaml"), "--image-credential-provider-bin-dir", plugin.dir)
	must(t, os.Symlink(n.ContainerdSocket(), containerd))
	run := filepath.Join(n.Dir, "run")
	must(t, os.Mkdir(run, 0o711))
	must(t, syscall.Mount("tmpfs", run, "tmpfs", 0, "mode=711")) // as /run is
	must(t, n.EnableCRI(bed.CRI{Sandbox: s.Ref("plain:1")}, s.Registry.Addr, v.Addr))
	start(t, n)
	direct, err := n.Kubelet("")
	must(t, err)
	defer direct.Close()
	k, err := n.Kubelet(filepath.Join(run, "cri.sock"))
	must(t, err)
	defer k.Close()

	// A pull that is refused is refused as without the proxy.
	want := grpcstatus.Code(direct.Pull(t.Context(), v.ref(), wrong))
	if got := grpcstatus.Code(k.Pull(t.Context(), v.ref(), wrong)); got != want || got == codes.OK {
		t.Errorf("a pull with a wrong password: %v, without the proxy %v", got, want)
	}
	must(t, k.Pull(t.Context(), v.ref(), right))
	streams(t, n, v.ref())
	pod, err := k.RunPod(t.Context(), v.ref(), false, "/bin/sh", "-c", "sleep 1000000")
	must(t, err)
	s.podReads(t, k, pod, "/data/0")
	if c := v.credential(t, n, "app"); c.Source != "CRI" {
		t.Errorf("the image is read with %+v", c)
	}

	// The next daemon knows it, too, and nobody else does.
	n.Sluice.Kill()
	if fi, err := os.Stat(filepath.Join(run, "credentials.json")); err != nil || fi.Mode() != 0o600 {
		t.Errorf("what is stored: %v, %v", fi, err)
	}
	must(t, n.StartSluice(t.Context()))
	s.podReads(t, k, pod, "/data/2")
	if c := v.credential(t, n, "app"); c.Source != "CRI" {
		t.Errorf("after a restart the image is read with %+v", c)
	}

	// It is revoked; a plugin of kubelet's has another.
	plugin.says(t, v.Addr, v.account(t, "robot2"))
	v.do(t, "token", "update", "--registry", v.Addr, "robot", "--status", "disabled")
	s.podReads(t, k, pod, "/data/1")
	if c := v.credential(t, n, "app"); c.Source != "credential providers" || len(c.Passed) != 1 || c.Passed[0].Source != "CRI" || !strings.Contains(c.Passed[0].Reason, "401") {
		t.Errorf("after it was revoked the image is read with %+v", c)
	}

	v.ordinaryPull(t, n, direct)

	// When nothing is accepted any more the daemon starts as ever.
	v.do(t, "token", "update", "--registry", v.Addr, "robot2", "--status", "disabled")
	n.Sluice.Kill()
	must(t, n.StartSluice(t.Context()))
	s.podReads(t, k, pod, "/data/0")
	must(t, k.RemovePod(t.Context(), pod))
	shown, err := os.ReadFile(filepath.Join(n.Dir, "sluice.log"))
	must(t, err)
	if strings.Contains(string(shown), right.Password) || strings.Contains(string(shown), "wr0ng") {
		t.Error("the daemon's log has a password")
	}
}

// ordinaryPull pulls, past the daemon, an image of which it knows no right
// password: containerd's pull works, and the daemon says why it doesn't stream.
func (v *vault) ordinaryPull(t *testing.T, n *bed.Node, k *bed.Kubelet) {
	t.Helper()
	ref := v.Addr + "/secret:1"
	must(t, k.Pull(t.Context(), ref, &runtimeapi.AuthConfig{Username: "admin", Password: v.password}))
	st := status(t, n)
	if last := st.Pulls[len(st.Pulls)-1]; last.Reference != ref || last.Reason != mount.Unauthorized || !strings.Contains(last.Message, "docker's configuration: refused") {
		t.Errorf("the daemon says %+v", last)
	}
	if c := v.credential(t, n, "secret"); !slices.ContainsFunc(c.Passed, func(o credentials.Outcome) bool {
		return o.Source == "docker's configuration" && strings.HasPrefix(o.Reason, "refused: ")
	}) {
		t.Errorf("the status says of credentials: %+v", c)
	}
	pod, err := k.RunPod(t.Context(), ref, false, "/bin/sh", "-c", "sha256sum /data/*; sleep 1000000")
	must(t, err)
	eventually(t, patience, "the container printed what its files are", func() bool { return podPrinted(pod, sumsOf(v.secret)) })
	must(t, k.RemovePod(t.Context(), pod))
}

// podReads reads a file in a pod.
func (s *stage) podReads(t *testing.T, k *bed.Kubelet, pod bed.Pod, file string) {
	t.Helper()
	got, err := k.Runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: pod.Container, Cmd: []string{"/bin/sha256sum", file}, Timeout: 60})
	must(t, err)
	if want := s.app.Sums[file] + "  " + file + "\n"; string(got.Stdout) != want {
		t.Errorf("read %s%s, want %s", got.Stdout, got.Stderr, want)
	}
}

// credential is what the status says of a repository of the vault.
func (v *vault) credential(t *testing.T, n *bed.Node, repository string) credentials.Status {
	t.Helper()
	for _, c := range status(t, n).Credentials {
		if c.Host == v.Addr && c.Repository == repository {
			return c
		}
	}
	t.Fatalf("the status has nothing about %s/%s", v.Addr, repository)
	return credentials.Status{}
}
