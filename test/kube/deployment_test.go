package kube

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"sluice/test/bed"
)

// TestDeployment starts three replicas from a tag, a digest, and a registry that
// wants the pod's secret; each streams and reads what is in the image.
func TestDeployment(t *testing.T) {
	s := theStage(t)
	s.newToolbox(t, "pinned:1", 10, 100_000) // an image that isn't here by a tag already
	digest, err := exec.CommandContext(t.Context(), s.Tools.Crane, "digest", "--insecure", s.Stage.Ref("pinned:1")).Output()
	must(t, err)
	vault, password := s.newVault(t, "vault.test", 13)
	secret := fmt.Sprintf("apiVersion: v1\nkind: Secret\nmetadata: {name: vault}\ntype: kubernetes.io/dockerconfigjson\ndata: {.dockerconfigjson: %s}\n",
		base64.StdEncoding.EncodeToString([]byte(dockerConfig(vault, robot, password))))
	for name, image := range map[string]string{
		"tag":    s.ref("app:1"),
		"digest": s.ref("pinned@" + strings.TrimSpace(string(digest))),
		"secret": vault + "/app:1",
	} {
		t.Run(name, func(t *testing.T) {
			n := s.newNamespace(t)
			n.apply(t, secret)
			n.apply(t, deployment("web", image, 3, "imagePullSecrets: [{name: vault}]"))
			for _, p := range n.await(t, "web", 3) {
				if name == "tag" {
					s.readsRight(t, p)
				}
			}
			s.streams(t, image)
		})
	}
	t.Run("without the secret", func(t *testing.T) {
		n := s.newNamespace(t)
		n.apply(t, deployment("web", vault+"/other:1", 1))
		eventually(t, patience, "the pull is refused", func() bool {
			pods := n.pods(t, "web")
			if len(pods) == 0 || len(pods[0].Status.ContainerStatuses) == 0 {
				return false
			}
			w := pods[0].Status.ContainerStatuses[0].State.Waiting
			return w != nil && (w.Reason == "ErrImagePull" || w.Reason == "ImagePullBackOff")
		})
	})
}

// providerRegistry is one whose credentials kubelet has from a program, which
// wants to see a token of the pod's service account.
const providerRegistry = "provider.test:5000"

// providerPassword is where the program finds the robot's password on the node.
const providerPassword = "/etc/kubernetes/provider-password"

const credentialProvider = `#!/bin/sh
if ! grep -q '"serviceAccountToken":"[^"]'; then
	echo "there's no token of a service account" >&2
	exit 1
fi
printf '{"kind": "CredentialProviderResponse", "apiVersion": "credentialprovider.kubelet.k8s.io/v1", "cacheKeyType": "Registry", "auth": {"%s": {"username": "%s", "password": "%s"}}}' \
	` + providerRegistry + ` ` + robot + ` "$(cat ` + providerPassword + `)"
`

// tokenForProvider permits kubelet to ask for such a token.
const tokenForProvider = `apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: token-for-provider}
rules: [{apiGroups: [""], resources: ["` + providerRegistry + `"], verbs: [request-serviceaccounts-token-audience]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: token-for-provider}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: token-for-provider}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: "system:nodes"}]
`

// TestCredentialProvider starts a pod without a secret from a registry for which
// kubelet asks one of its plugins, with a token of the pod's service account.
func TestCredentialProvider(t *testing.T) {
	s := theStage(t)
	host, password := s.newVault(t, strings.TrimSuffix(providerRegistry, ":5000"), 17)
	must(t, os.WriteFile(s.Path(providerPassword), []byte(password), 0o600))
	must(t, s.API.Apply(t.Context(), "", tokenForProvider))
	n := s.newNamespace(t)
	n.apply(t, pod1("provided", host+"/app:1"))
	n.await(t, "provided", 1)
	s.streams(t, host+"/app:1")
}

// robot may pull app of a vault.
const robot = "robot"

// newVault starts a registry that asks for credentials, with app:1, and returns
// how the node names it, and the robot's password.
func (s *stage) newVault(t *testing.T, name string, seed uint64) (host, password string) {
	t.Helper()
	dir := t.TempDir()
	reg, err := bed.StartRegistry(t.Context(), s.Stage.Sluice, dir, "SLUICE_REGISTRY_AUTH_ENABLED=true", "SLUICE_REGISTRY_AUTH_ADMIN_ENABLED=true")
	must(t, err)
	t.Cleanup(reg.Stop)
	b, err := os.ReadFile(filepath.Join(reg.Dir, "registry", "admin-password"))
	must(t, err)
	admin := strings.TrimSpace(string(b))
	must(t, os.WriteFile(filepath.Join(dir, "config.json"), []byte(dockerConfig(reg.Addr, "admin", admin)), 0o600))
	t.Setenv("DOCKER_CONFIG", dir)
	box, err := bed.NewToolbox(t.Context(), filepath.Join(dir, "box"), seed, 100_000)
	must(t, err)
	for _, image := range []string{"app:1", "other:1"} {
		must(t, reg.Push(t.Context(), s.Tools, box.Layout, image))
	}
	must(t, s.Convert(t.Context(), reg.Addr+"/app:1"))
	link, host, err := s.Serve(t.Context(), name, reg.Addr, linkRate, linkRTT)
	must(t, err)
	t.Cleanup(func() { link.Close() })

	cmd := exec.CommandContext(t.Context(), s.Stage.Sluice, "token", "create", "--registry", reg.Addr, robot, "--repository", "app=content/read,metadata/read",
		"--username", "admin", "--password-stdin", "--output", "json")
	cmd.Stdin = strings.NewReader(admin)
	out, err := cmd.Output()
	must(t, err)
	var created struct {
		Passwords []struct{ Value string }
	}
	must(t, json.Unmarshal(out, &created))
	return host, created.Passwords[0].Value
}

func dockerConfig(host, user, password string) string {
	return fmt.Sprintf(`{"auths": {%q: {"username": %q, "password": %q}}}`, host, user, password)
}

// TestLogs reads a pod's log through the API server, which asks kubelet.
func TestLogs(t *testing.T) {
	s := theStage(t)
	n := s.newNamespace(t)
	n.apply(t, pod1("talker", s.ref("app:1"), `command: [/bin/sh, -c, "echo said; sleep 100000"]`))
	n.await(t, "talker", 1)
	eventually(t, patience, "the log has what the container said", func() bool {
		var log string
		must(t, n.API.Do(t.Context(), http.MethodGet, n.path("pods/talker/log"), nil, &log))
		return log == "said\n"
	})
}
