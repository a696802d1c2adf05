package run

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"sluice/internal/node/plane"
	"sluice/oci"
)

// rootfs makes a root file system of statically linked busybox or skips.
func rootfs(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("running containers needs root")
	}
	if _, err := exec.LookPath("runc"); err != nil {
		t.Skip("runc is not installed")
	}
	dir := t.TempDir()
	for _, d := range []string{"bin", "etc", "tmp", "proc", "sys", "dev"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, dir, "etc/passwd", "root:x:0:0:root:/root:/bin/sh\nweb:x:33:44:web:/srv:/bin/sh\n")
	write(t, dir, "etc/group", "root:x:0:\nweb:x:44:\nlog:x:55:other,web\n")
	// The machine's own shell with the libraries it needs.
	for _, tool := range []string{"sh", "id", "cat", "sleep"} {
		path, err := exec.LookPath(tool)
		if err != nil {
			t.Skipf("%s is not installed", tool)
		}
		copyTo(t, path, filepath.Join(dir, "bin", tool))
		out, err := exec.Command("ldd", path).Output()
		if err != nil {
			t.Skipf("ldd %s: %v", path, err)
		}
		for field := range strings.FieldsSeq(string(out)) {
			if strings.HasPrefix(field, "/") {
				copyTo(t, field, filepath.Join(dir, field))
			}
		}
	}
	return dir
}

func write(t *testing.T, dir, name, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func copyTo(t *testing.T, from, to string) {
	t.Helper()
	content, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, content, 0o755); err != nil {
		t.Fatal(err)
	}
}

func TestRun(t *testing.T) {
	root := rootfs(t)
	opts := Options{Dir: t.TempDir()}
	for name, test := range map[string]struct {
		user, script string
		env          []string
		stdin        string
		code         int
		stdout       string
	}{
		"exit code":    {script: "exit 7", code: 7},
		"killed":       {script: "sh -c 'kill -9 $$'; exit $?", code: 137},
		"output":       {script: "echo hello", stdout: "hello\n"},
		"input":        {script: "cat", stdin: "from outside", stdout: "from outside"},
		"environment":  {script: "echo $A $B", env: []string{"A=changed"}, stdout: "changed image\n"},
		"user by name": {user: "web", script: "id -u; id -g; id -G", stdout: "33\n44\n44 55\n"},
		"user:group":   {user: "web:55", script: "id -u; id -G", stdout: "33\n55\n"},
		"number":       {user: "1234", script: "id -u; id -g", stdout: "1234\n0\n"},
		"writes":       {script: "echo x > /new && cat /new", stdout: "x\n"},
		"working dir":  {script: "pwd", stdout: "/work/here\n"},
		"process tree": {script: "echo $$", stdout: "1\n"},
	} {
		t.Run(name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			c := Container{
				Rootfs: []string{root}, Args: []string{"-c", test.script}, Env: test.env,
				Stdin: strings.NewReader(test.stdin), Stdout: &stdout, Stderr: &stderr,
			}
			c.Config.Config.Entrypoint = []string{"/bin/sh"}
			c.Config.Config.Cmd = []string{"-c", "exit 99"}
			c.Config.Config.Env = []string{"A=image", "B=image"}
			c.Config.Config.User = test.user
			c.Config.Config.WorkingDir = "/work/here"
			code, err := Run(t.Context(), c, opts)
			if err != nil {
				t.Fatalf("%v; stderr: %s", err, &stderr)
			}
			if code != test.code || stdout.String() != test.stdout {
				t.Errorf("exit code %d, want %d; stdout %q, want %q; stderr: %s", code, test.code, &stdout, test.stdout, &stderr)
			}
		})
	}
	left, err := os.ReadDir(opts.Dir)
	if err != nil || len(left) != 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
	if _, err := os.Stat(filepath.Join(root, "new")); err == nil {
		t.Error("a container wrote into its image")
	}
}

// Layers that are mounted by themselves are one root: the upper hide what the
// lower have, also by whiteouts and opaque directories.
func TestRunOnStackedLayers(t *testing.T) {
	base, middle, top := rootfs(t), t.TempDir(), t.TempDir()
	write(t, base, "data/gone", "base")
	write(t, base, "data/changed", "base")
	write(t, base, "hidden/old", "base")
	write(t, middle, "data/changed", "middle")
	write(t, middle, "data/back", "middle")
	if err := unix.Mknod(filepath.Join(middle, "data/gone"), unix.S_IFCHR, 0); err != nil {
		t.Fatal(err)
	}
	write(t, middle, "hidden/new", "middle")
	if err := unix.Setxattr(filepath.Join(middle, "hidden"), "trusted.overlay.opaque", []byte("y"), 0); err != nil {
		t.Skipf("no xattrs of overlayfs on this file system: %v", err)
	}
	write(t, top, "data/added", "top")
	if err := unix.Mknod(filepath.Join(top, "data/back"), unix.S_IFCHR, 0); err != nil {
		t.Fatal(err)
	}
	var stdout, stderr bytes.Buffer
	code, err := Run(t.Context(), Container{
		Rootfs: []string{top, middle, base}, Stdout: &stdout, Stderr: &stderr,
		Args: []string{"/bin/sh", "-c", "cd /data; echo *; cat changed; cd /hidden; echo \"\" *; echo x >/data/gone; exit 5"},
	}, Options{Dir: t.TempDir()})
	if want := "added changed\nmiddle new\n"; err != nil || code != 5 || stdout.String() != want {
		t.Errorf("exit code %d, %v, stdout %q, want 5 and %q; stderr: %s", code, err, &stdout, want, &stderr)
	}
	for _, dir := range []string{base, middle, top} {
		if content, err := os.ReadFile(filepath.Join(dir, "data/gone")); err == nil && string(content) == "x\n" {
			t.Errorf("the container wrote into %s", dir)
		}
	}
	if _, err := Run(t.Context(), Container{Args: []string{"/bin/sh"}}, Options{Dir: t.TempDir()}); err == nil {
		t.Error("a container without a root ran")
	}
}

// What can't be started has docker's exit codes, and a sentence that says why.
func TestRunOfWhatCannotStart(t *testing.T) {
	root := rootfs(t)
	for name, test := range map[string]struct {
		args []string
		code int
	}{
		"nothing in PATH": {[]string{"nonesuch"}, CodeNotFound},
		"no such file":    {[]string{"/bin/nonesuch"}, CodeNotFound},
		"no program":      {[]string{"/etc/passwd"}, CodeNotRunnable},
		"exits with 1":    {[]string{"/bin/sh", "-c", "exit 1"}, 1},
	} {
		var stderr bytes.Buffer
		c := Container{Rootfs: []string{root}, Args: test.args, Stderr: &stderr}
		code, err := Run(t.Context(), c, Options{Dir: t.TempDir()})
		if err != nil || code != test.code {
			t.Errorf("%s: exit code %d, %v, want %d", name, code, err, test.code)
		}
		if said := stderr.String(); (code > 1) != strings.Contains(said, test.args[0]) {
			t.Errorf("%s: it said %q", name, said)
		}
	}
}

func TestRunEndsWithItsContext(t *testing.T) {
	root := rootfs(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	dir := t.TempDir()
	c := Container{Rootfs: []string{root}, Args: []string{"/bin/sh", "-c", "echo it runs; exec sleep 600"}, Stdout: told(cancel)}
	began := time.Now()
	code, err := Run(ctx, c, Options{Dir: dir, Patience: time.Second})
	if err != nil || code == 0 {
		t.Errorf("exit code %d, %v", code, err)
	}
	if d := time.Since(began); d > 2*time.Minute {
		t.Errorf("it took %v", d)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
}

// told is called when something is written to it.
type told func()

// Write implements io.Writer.
func (f told) Write(p []byte) (int, error) {
	f()
	return len(p), nil
}

func TestSweep(t *testing.T) {
	root := rootfs(t)
	dir := t.TempDir()
	runc, err := exec.LookPath("runc")
	if err != nil {
		t.Fatal(err)
	}
	dead, err := newBundle(dir, runc)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dead.rootfs(), unix.MNT_DETACH) })
	if err := plane.MountOverlay([]string{root}, dead.dir, dead.rootfs()); err != nil {
		t.Fatal(err)
	}
	alive, err := newBundle(dir, runc)
	if err != nil {
		t.Fatal(err)
	}
	dead.lock.Close() // as if its process had been killed
	sweep(Options{Dir: dir}.withDefaults(), runc)
	if _, err := os.Stat(dead.dir); err == nil {
		t.Error("the dead container's directory is still there")
	}
	if _, err := os.Stat(alive.dir); err != nil {
		t.Error("a running container's directory was removed")
	}
	if err := alive.remove(); err != nil {
		t.Error(err)
	}
}

func TestFindUser(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "etc/passwd", "# comment\nroot:x:0:0::/:\nbroken\nweb:x:33:44::/:\n:x:7:8::/:\nbig:x:99999999999:1::/:\n")
	write(t, dir, "etc/group", "root:x:0:\nlog:x:55:web,other\nown:x:44:web\nbad:x:zz:web\n")
	for spec, want := range map[string]specs.User{
		"":        {},
		"root":    {},
		"0":       {},
		"web":     {UID: 33, GID: 44, AdditionalGids: []uint32{55}},
		"33":      {UID: 33, GID: 44, AdditionalGids: []uint32{55}},
		"web:log": {UID: 33, GID: 55},
		"web:77":  {UID: 33, GID: 77},
		"500:600": {UID: 500, GID: 600},
		"500":     {UID: 500},
	} {
		got, err := findUser(dir, spec)
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("%q: %v (-want +got):\n%s", spec, err, diff)
		}
	}
	for _, spec := range []string{"nobody", "web:nogroup", "-1", "big", "99999999999"} {
		if got, err := findUser(dir, spec); err == nil {
			t.Errorf("%q is %+v", spec, got)
		}
	}
}

func TestUserFilesStayInTheImage(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(dir, "etc/passwd")); err != nil {
		t.Fatal(err)
	}
	if got, err := findUser(dir, "daemon"); err == nil {
		t.Errorf("the host's user %+v was found", got)
	}
}

func TestSpecNeedsACommand(t *testing.T) {
	if _, err := newSpec(Container{Config: oci.ImageConfig{}}, "sluice-x", t.TempDir()); err == nil {
		t.Error("an image without a command got a spec")
	}
}

func TestMergeEnv(t *testing.T) {
	got := mergeEnv([]string{"PATH=/a", "X=1"}, []string{"PATH=/b", "Y=2", "X="})
	if diff := cmp.Diff([]string{"PATH=/b", "X=", "Y=2"}, got); diff != "" {
		t.Error(diff)
	}
}

// Who clears away what killed processes left spares what others are just making.
func TestSweepSparesNewContainers(t *testing.T) {
	dir := t.TempDir()
	opts := Options{Dir: dir}.withDefaults()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 300 {
				sweep(opts, "true")
				b, err := newBundle(dir, "true")
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := os.Stat(b.rootfs()); err != nil {
					t.Error(err)
				}
				if err := b.remove(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}
