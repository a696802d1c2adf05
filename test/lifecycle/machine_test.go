package lifecycle

import (
	"archive/tar"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sluice/internal/node/mount/control"
	"sluice/test/bed"
)

// machine looks from inside like a machine of its own, without systemd: it has
// processes, mounts and directories of its own, and containerd where every
// distribution has it, which a loop starts again when it ends.
type machine struct {
	*stage
	t      *testing.T
	dir    string
	pid    int // of its first process, as this machine sees it
	images runtimeapi.ImageServiceClient
	pods   runtimeapi.RuntimeServiceClient
	n      int // pods so far
}

// machineInit is the first process. $1 is the machine's directory, $2 where
// containerd's programs are, $3 where runc is.
const machineInit = `
mount --make-rprivate /
mount --make-rshared /
mount -t proc proc /proc
` + bed.LetMountsGo + `cd "$1"
mkdir etc etc-work local local-work lib log bin
cp "$2"/* "$3"/runc bin/
mount -t overlay -o lowerdir=/etc,upperdir=etc,workdir=etc-work overlay /etc
mount -t overlay -o lowerdir=/usr/local,upperdir=local,workdir=local-work overlay /usr/local
mount -t tmpfs -o mode=755 tmpfs /run
mount --bind lib lib # what is mounted at one place mustn't be at the other, too
mount --make-private lib
mount --bind lib /var/lib
mount --make-shared /var/lib
mount --bind log /var/log
rm -rf /etc/containerd /usr/local/bin/sluice /etc/sluice
mkdir /etc/containerd
cp config.toml /etc/containerd/config.toml
export PATH="$1/bin:$PATH"
while :; do
	containerd >>containerd.log 2>&1
	sleep 0.1
done
`

// machineConfig is containerd's configuration; the image is of pods' own
// container.
const machineConfig = `# Somebody's comment.
version = 3

[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true # not everywhere allowed
  disable_apparmor = true
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = %q
`

func (s *stage) newMachine(t *testing.T) *machine {
	t.Helper()
	dir, err := os.MkdirTemp(s.Work, "machine-")
	must(t, err)
	m := &machine{stage: s, t: t, dir: dir}
	must(t, os.WriteFile(filepath.Join(dir, "config.toml"), fmt.Appendf(nil, machineConfig, s.Ref("plain:1")), 0o644))
	cmd := exec.Command("unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child=KILL",
		"sh", "-euc", machineInit, "init", dir, s.Tools.ContainerdDir, filepath.Dir(s.Tools.Runc))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	log, err := os.Create(filepath.Join(dir, "init.log"))
	must(t, err)
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	must(t, cmd.Start())
	t.Cleanup(func() { m.end(cmd) })
	children := fmt.Sprintf("/proc/%d/task/%d/children", cmd.Process.Pid, cmd.Process.Pid)
	eventually(t, patience, "the machine has a first process", func() bool {
		b, _ := os.ReadFile(children)
		m.pid, _ = strconv.Atoi(strings.TrimSpace(string(b)))
		return m.pid != 0
	})
	conn, err := grpc.NewClient("unix://"+m.path("/run/containerd/containerd.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	m.images, m.pods = runtimeapi.NewImageServiceClient(conn), runtimeapi.NewRuntimeServiceClient(conn)
	m.containerdAnswers()
	return m
}

// end ends everything on the machine.
func (m *machine) end(cmd *exec.Cmd) {
	_ = cmd.Process.Kill() // and with it the machine's first process
	_ = cmd.Wait()
	if m.t.Failed() {
		for _, log := range []string{"init.log", "containerd.log", "log/sluice-node.log"} {
			b, _ := os.ReadFile(filepath.Join(m.dir, log))
			m.t.Logf("%s:\n%s", log, b[max(0, len(b)-4000):])
		}
	}
	if err := bed.UnmountAll(m.dir); err != nil {
		m.t.Error(err)
	}
}

// path is how this machine gets at a file of that one.
func (m *machine) path(name string) string {
	return filepath.Join(fmt.Sprintf("/proc/%d/root", m.pid), name)
}

func (m *machine) containerdAnswers() {
	m.t.Helper()
	eventually(m.t, patience, "containerd answers", func() bool {
		ctx, cancel := context.WithTimeout(m.t.Context(), 5*time.Second)
		defer cancel()
		s, err := m.pods.Status(ctx, &runtimeapi.StatusRequest{})
		return err == nil && len(s.Status.Conditions) > 0 && s.Status.Conditions[0].Status
	})
}

// command runs a program on the machine.
func (m *machine) command(args ...string) (string, error) {
	cmd := exec.CommandContext(m.t.Context(), "nsenter", append([]string{"--target", strconv.Itoa(m.pid), "--all", "env", "PATH=" + m.dir + "/bin:" + os.Getenv("PATH")}, args...)...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// pull has containerd pull an image as kubelet does.
func (m *machine) pull(name string) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.t.Context(), patience)
	defer cancel()
	_, err := m.images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: m.Ref(name)}})
	must(m.t, err)
}

// pod is a pod with one container.
type pod struct {
	m                  *machine
	sandbox, container string
	log                string
}

// run starts a pod on an image that was pulled. A privileged one has the
// machine's processes, and its file system at /host: what deploy/ has.
func (m *machine) run(name string, privileged bool, command ...string) pod {
	m.t.Helper()
	m.n++
	id := fmt.Sprintf("%s-%d", strings.ReplaceAll(name, ":", "-"), m.n)
	ctx, cancel := context.WithTimeout(m.t.Context(), patience)
	defer cancel()
	spaces := &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE, Pid: runtimeapi.NamespaceMode_CONTAINER}
	var mounts []*runtimeapi.Mount
	if privileged {
		spaces.Pid = runtimeapi.NamespaceMode_NODE
		mounts = []*runtimeapi.Mount{{HostPath: "/", ContainerPath: "/host", Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER}}
	}
	config := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: id, Namespace: "default", Uid: id},
		LogDirectory: filepath.Join(m.dir, "pods"),
		Labels:       map[string]string{"io.kubernetes.pod.uid": id},
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: spaces, Privileged: privileged},
		},
	}
	must(m.t, os.MkdirAll(config.LogDirectory, 0o755))
	sandbox, err := m.pods.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: config})
	must(m.t, err)
	p := pod{m: m, sandbox: sandbox.PodSandboxId, log: filepath.Join(config.LogDirectory, id+".log")}
	container, err := m.pods.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId: p.sandbox, SandboxConfig: config,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "main"}, Image: &runtimeapi.ImageSpec{Image: m.Ref(name)},
			Command: command, LogPath: id + ".log", Mounts: mounts, Labels: map[string]string{"io.kubernetes.pod.uid": id},
			Linux: &runtimeapi.LinuxContainerConfig{
				SecurityContext: &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: spaces, Privileged: privileged},
			},
		},
	})
	must(m.t, err)
	p.container = container.ContainerId
	_, err = m.pods.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: p.container})
	must(m.t, err)
	return p
}

// printed is what the pod has printed.
func (p pod) printed() string {
	b, _ := os.ReadFile(p.log)
	return string(b)
}

// prints waits for the pod to print something.
func (p pod) prints(what string) {
	p.m.t.Helper()
	defer func() {
		if p.m.t.Failed() {
			p.m.t.Logf("the pod printed\n%s", p.printed())
		}
	}()
	eventually(p.m.t, patience, "the pod printed "+what, func() bool { return strings.Contains(p.printed(), what) })
}

// exits waits for the container's end and returns its exit code.
func (p pod) exits() int {
	p.m.t.Helper()
	code := -1
	eventually(p.m.t, patience, "the container has ended", func() bool {
		s, err := p.m.pods.ContainerStatus(p.m.t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: p.container})
		if err != nil || s.Status.State != runtimeapi.ContainerState_CONTAINER_EXITED {
			return false
		}
		code = int(s.Status.ExitCode)
		return true
	})
	return code
}

// remove ends and removes the pod, as its deletion does.
func (p pod) remove() {
	p.m.t.Helper()
	ctx, cancel := context.WithTimeout(p.m.t.Context(), patience)
	defer cancel()
	_, err := p.m.pods.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.sandbox})
	must(p.m.t, err)
	_, err = p.m.pods.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.sandbox})
	must(p.m.t, err)
}

// status asks the machine's node daemon.
func (m *machine) status() (s control.Status, err error) {
	out, err := m.command("/usr/local/bin/sluice", "node", "status", "--output", "json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &s)
	} else {
		err = fmt.Errorf("%w: %s", err, out)
	}
	return s, err
}

// programImage makes an image of a program, which is at /sluice.
func programImage(dir, program, more string) (layout string, err error) {
	content, err := os.ReadFile(program)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	name := filepath.Join(dir, "program.tar")
	f, err := os.Create(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	w := tar.NewWriter(f)
	size := int64(len(content) + len(more))
	if err := w.WriteHeader(&tar.Header{Name: "sluice", Typeflag: tar.TypeReg, Mode: 0o755, Size: size}); err != nil {
		return "", err
	}
	if _, err := io.WriteString(w, string(content)+more); err != nil {
		return "", err
	}
	if err := w.Close(); err != nil {
		return "", err
	}
	layout = filepath.Join(dir, "layout")
	return layout, bed.WriteLayout(layout, []string{"/sluice"}, []string{name})
}
