package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/node/mount/control"
	"sluice/internal/node/plane"
	"sluice/internal/node/serve"
	"sluice/internal/node/timeline"
	"sluice/internal/remote"
	"sluice/oci"
)

// The test binary is also the program, for the processes that verbs start.
const programVariable = "SLUICE_TEST_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(programVariable) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// runProgram runs the real program with args and returns what it printed and its
// exit code.
func runProgram(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	cmd.Env = append(os.Environ(), programVariable+"=1")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("sluice %s: %v", strings.Join(args, " "), err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// shellLayer is a layer with this machine's shell and what it needs.
func shellLayer(t *testing.T) []byte {
	t.Helper()
	files := []string{"/bin/sh", "/bin/cat"}
	for _, tool := range files {
		out, err := exec.Command("ldd", tool).Output()
		if err != nil {
			t.Skipf("ldd %s: %v", tool, err)
		}
		for field := range strings.FieldsSeq(string(out)) {
			if strings.HasPrefix(field, "/") {
				files = append(files, field)
			}
		}
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	seen := make(map[string]bool)
	for _, name := range append(files, "/etc/hostname") {
		content, err := os.ReadFile(name)
		if err != nil || seen[name] {
			continue
		}
		seen[name] = true
		if err := w.WriteHeader(&tar.Header{Name: name[1:], Mode: 0o755, Size: int64(len(content)), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// pushShell pushes an image of a shell and makes its streaming artifact.
func pushShell(t *testing.T, addr, repo string) {
	t.Helper()
	reg, err := remote.New(addr, remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	push := func(mediaType string, content []byte) oci.Descriptor {
		desc := oci.Descriptor{MediaType: mediaType, Digest: oci.DigestOf(content), Size: int64(len(content))}
		if _, err := reg.PushBlob(t.Context(), repo, desc, bytes.NewReader(content)); err != nil {
			t.Fatal(err)
		}
		return desc
	}
	layer := shellLayer(t)
	config := oci.ImageConfig{Platform: oci.Platform{OS: "linux", Architecture: runtime.GOARCH}}
	config.Config.Entrypoint = []string{"/bin/sh", "-c"}
	config.Config.Env = []string{"WHO=image"}
	config.RootFS.Type, config.RootFS.DiffIDs = "layers", []oci.Digest{oci.DigestOf(layer)}
	content, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	m := oci.ImageManifest{Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageManifest, Config: push(oci.MediaTypeImageConfig, content)}
	m.Layers = []oci.Descriptor{push(oci.MediaTypeLayer, layer)}
	if content, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	if _, err := reg.PushManifest(t.Context(), repo, "v1", m.MediaType, content); err != nil {
		t.Fatal(err)
	}
	if _, stderr, err := runSluice(t, "artifact-streaming", "create", addr+"/"+repo+":v1"); err != nil {
		t.Fatalf("%v\n%s", err, stderr)
	}
}

// TestWithoutContainerd is what a person does on a machine that has nothing
// but this program, root, and runc.
func TestWithoutContainerd(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting needs root")
	}
	addr, _ := startRegistry(t, "--data", filepath.Join(t.TempDir(), "data"))
	pushShell(t, addr, "shell")
	root, dir := t.TempDir(), t.TempDir()
	sockets := filepath.Join(root, "run")
	flags := []string{"--root", filepath.Join(root, "state"), "--run", sockets}
	verb := func(name string, args ...string) (stdout, stderr string, code int) {
		return runProgram(t, append(append([]string{name}, flags...), args...)...)
	}
	t.Cleanup(func() { endDaemon(t, sockets, dir) })

	if _, stderr, code := verb("mount", "--registry", addr, "shell:v1", dir); code != 0 {
		t.Fatalf("mount: exit code %d: %s", code, stderr)
	}
	want, err := os.ReadFile("/bin/cat")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "bin/cat")); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the mounted file differs, %v", err)
	}

	// The daemon is killed; the next command starts another, and reads go on.
	client := control.NewClient(serve.Control(sockets))
	status, err := client.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(status.Daemon.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	awaitEnded(t, sockets, status.Daemon.PID)
	if _, err := exec.LookPath("runc"); err != nil {
		t.Log("runc is not installed: running is not tested")
	} else {
		stdout, stderr, code := verb("run", "-e", "WHO=me", addr+"/shell:v1", "echo $WHO; exit 7")
		if stdout != "me\n" || code != 7 {
			t.Errorf("run: exit code %d, stdout %q, stderr %s", code, stdout, stderr)
		}
		checkTrace(t, flags, addr+"/shell:v1")
		if _, stderr, code := verb("run", addr+"/nothing:v1"); code != 125 || !strings.Contains(stderr, "isn't in the registry") {
			t.Errorf("run of what isn't there: exit code %d: %s", code, stderr)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "bin/sh")); err != nil {
		t.Errorf("after the daemon was killed: %v", err)
	}
	if _, stderr, code := verb("umount", dir); code != 0 {
		t.Errorf("umount: exit code %d: %s", code, stderr)
	}
	if _, err := os.Stat(filepath.Join(dir, "bin/sh")); err == nil {
		t.Error("the image is still mounted")
	}
	if _, stderr, code := verb("umount", dir); code == 0 || !strings.Contains(stderr, "was not mounted") {
		t.Errorf("umount again: exit code %d: %s", code, stderr)
	}
	if _, stderr, code := verb("mount", addr+"/shell:v1", dir+"/none"); code != 1 || !strings.Contains(stderr, "doesn't exist") {
		t.Errorf("mounting where nothing is: exit code %d: %s", code, stderr)
	}
	if _, stderr, code := verb("mount", addr+"/nothing:v1", dir); code == 0 || !strings.Contains(stderr, "isn't in the registry") {
		t.Errorf("mounting what isn't there: exit code %d: %s", code, stderr)
	}
	// Nothing is mounted any more: the daemon ends by itself, and its holder.
	awaitEnded(t, sockets)
	if _, err := client.Status(t.Context()); !errors.Is(err, control.ErrNoDaemon) {
		t.Errorf("afterwards: %v", err)
	}
}

// checkTrace checks what sluice node trace shows of a start, and remembers.
func checkTrace(t *testing.T, flags []string, image string) {
	t.Helper()
	trace := func(args ...string) (stdout, stderr string, code int) {
		return runProgram(t, append(append([]string{"node", "trace"}, flags...), args...)...)
	}
	stdout, stderr, code := trace(image, "echo hi; exit 7")
	if code != 7 || !strings.HasPrefix(stdout, "hi\n\nSTEP ") {
		t.Errorf("trace: exit code %d, stdout %q, stderr %s", code, stdout, stderr)
	}
	for _, step := range []string{"start", "  mount image", "    resolve", "    reads", "  run", "    first output"} {
		if !strings.Contains(stdout, "\n"+step+" ") {
			t.Errorf("no step %q in\n%s", step, stdout)
		}
	}
	stdout, stderr, code = trace("--output", "json", image, "echo hi")
	var spans []timeline.Span
	if err := json.Unmarshal([]byte(stdout), &spans); err != nil || code != 0 || stderr != "hi\n" || len(spans) < 6 {
		t.Errorf("as JSON: exit code %d, %d spans, %v, stderr %q", code, len(spans), err, stderr)
	}
	if stdout, stderr, code = trace("--last", image); code != 0 || !strings.Contains(stdout, "resolve ") || strings.Contains(stdout, "first output") {
		t.Errorf("the last one: exit code %d, stdout %s, stderr %s", code, stdout, stderr)
	}
	if _, stderr, code = trace("--last", "host.test/never:1"); code != 1 || !strings.Contains(stderr, "remembers no start") {
		t.Errorf("one that never was: exit code %d, stderr %s", code, stderr)
	}
	if stdout, stderr, code = trace("--time", "5s", image, "echo on; while :; do read x </dev/zero; done"); code != 0 || !strings.HasPrefix(stdout, "on\n") {
		t.Errorf("a process that doesn't end: exit code %d, stdout %q, stderr %s", code, stdout, stderr)
	}
}

// checkMetrics checks that metrics, and nothing else, are at a URL.
func checkMetrics(t *testing.T, url string) {
	t.Helper()
	get := func(url string) (int, string) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(body)
	}
	if code, body := get(url); code != 200 || !strings.Contains(body, `sluice_node_images{state="streaming"} 0`) {
		t.Errorf("metrics: %d, %s", code, body)
	}
	if code, _ := get(strings.TrimSuffix(url, "/metrics") + "/v1/status"); code != 404 {
		t.Errorf("the control API answers the network: %d", code)
	}
}

// TestNodeDaemon starts the daemon that serves containerd.
func TestNodeDaemon(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("the node daemon mounts")
	}
	root := t.TempDir()
	sockets := filepath.Join(root, "run")
	flags := []string{"--root", filepath.Join(root, "state"), "--run", sockets}
	cmd := exec.Command(os.Args[0], append([]string{"node", "--log-format", "json", "--metrics-listen", "127.0.0.1:0"}, flags...)...)
	cmd.Env = append(os.Environ(), programVariable+"=1")
	var log bytes.Buffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { endDaemon(t, sockets, "") })
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		out, _, code := runProgram(t, append([]string{"node", "status", "--output", "json"}, flags...)...)
		var s control.Status
		if code == 0 {
			if err := json.Unmarshal([]byte(out), &s); err != nil || s.Daemon.Snapshotter != filepath.Join(sockets, "snapshotter.sock") {
				t.Errorf("status is %s, %v", out, err)
			}
			checkMetrics(t, s.Daemon.Metrics)
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("it doesn't answer:\n%s", &log)
		}
	}
	if out, _, code := runProgram(t, append([]string{"node", "status"}, flags...)...); code != 0 || !strings.Contains(out, "pid "+strconv.Itoa(cmd.Process.Pid)) {
		t.Errorf("status for people: %d, %s", code, out)
	}
	// Somebody takes the FUSE mount away: the daemon goes on with a new one.
	if err := unix.Unmount(filepath.Join(sockets, "plane", "blobs"), unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	client := control.NewClient(serve.Control(sockets))
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		at, err := plane.MountAt(filepath.Join(sockets, "plane", "blobs"))
		if err != nil {
			t.Fatal(err)
		}
		if s, err := client.Status(t.Context()); at != nil && err == nil && s.Daemon.PID == cmd.Process.Pid {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("it doesn't recover from the loss of its FUSE mount:\n%s", &log)
		}
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("it ended with %v:\n%s", err, &log)
	}
}

// endDaemon ends what a test's daemon left: its mounts, itself, its holder. They have
// ended when it returns: their directories go next.
func endDaemon(t *testing.T, sockets, dir string) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	if dir != "" {
		unix.Unmount(dir, unix.MNT_DETACH)
	}
	if s, err := control.NewClient(serve.Control(sockets)).Status(ctx); err == nil {
		for _, img := range s.Images {
			for _, m := range img.Mounts {
				unix.Unmount(m.Path, unix.MNT_DETACH)
			}
		}
		syscall.Kill(s.Daemon.PID, syscall.SIGKILL)
	}
	// Without its mount the holder has nothing to keep, and ends.
	unix.Unmount(filepath.Join(sockets, "plane", "blobs"), unix.MNT_DETACH)
	awaitEnded(t, sockets)
}

// awaitEnded waits for the end of the daemon with these sockets and of its holder; of
// only some processes, if they are given.
func awaitEnded(t *testing.T, sockets string, only ...int) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		left := slices.DeleteFunc(processes(t, sockets), func(pid int) bool { return len(only) > 0 && !slices.Contains(only, pid) })
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("processes %v don't end", left)
			return
		}
	}
}

// processes returns those of this program that have to do with a directory: daemons
// and holders are told of it by their arguments.
func processes(t *testing.T, dir string) (pids []int) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if exe, err := os.Readlink(filepath.Join("/proc", e.Name(), "exe")); err != nil || exe != self {
			continue // another program, or it has ended
		}
		if args, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline")); err == nil && strings.Contains(string(args), dir) {
			pids = append(pids, pid)
		}
	}
	return pids
}
