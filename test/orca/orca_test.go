package orca

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"sluice/internal/node/disks/control"
	"sluice/test/bed"
)

func app() string { return all.teleport.Addr + "/team/app:v1" }

// begun is what a teleported start says.
var begun = []string{
	"requesting manifest\n", "teleporting linux/", " sha256:", " using the loopback snapshotter...\n", "Successfully teleported!\n",
	"All mounts set up\n", "Creating the container...\n", "Starting the container...\n",
}

func TestTeleportedRun(t *testing.T) {
	n := newNode(t)
	sum := all.box.Sums["/data/0"] + "  /data/0\n"
	n.orca("run", app(), "sha256sum", "/data/0").is(t, 0, sum, begun...)
	n.orca("run", app(), "sh", "-c", "exit 7").is(t, 7, "")
	n.orca("run", app(), "nonesuch").is(t, 127, "", "nonesuch")
	n.orca("run", app(), "/etc").is(t, 126, "")
	n.orca("run", "-e", "A=1", "-e", "B=2", app(), "-e", "B=3", "--env=C=4", "sh", "-c", "echo $A $B $C").is(t, 0, "1 3 4\n")
	n.orca("run", "-u", "7:8", app(), "id", "-u").is(t, 0, "7\n")
	n.orca("run", app(), "sh", "-c", "echo lost >/new && cat /new; echo noise >&2").is(t, 0, "lost\n", "noise")
	n.orca("run", app(), "cat", "/new").is(t, 1, "")
	finish(t, n.command("run", app(), "cat"), "through\n").is(t, 0, "through\n")
	n.orca("run", "--debug", app(), "sh", "-c", ":").is(t, 0, "", "debug: requesting the manifest, and what mounting takes, took", "debug: the image has 4 layers", "debug: mount 1 of 4", "debug: all that took")
	n.orca("run", "--runc", "nonesuch", app()).is(t, 125, "", "install runc, or name it with --runc")
	n.orca("run", all.teleport.Addr+"/team/none:v1").is(t, 125, "", "orca: "+all.teleport.Addr+"/team/none:v1:")
	if s := n.status(); len(s.Claims) != 0 || len(s.Images) != 1 || !s.Images[0].Teleported || s.Images[0].Layers != 4 {
		t.Errorf("status %+v", s)
	}
	if left, err := os.ReadDir(filepath.Join(n.root(), "containers")); err != nil || len(left) != 0 {
		t.Errorf("left are %v, %v", left, err)
	}
}

func TestPullImagesRemove(t *testing.T) {
	n := newNode(t)
	n.orca("images").is(t, 0, "There are no images. Pull one: orca pull IMAGE\n")
	for _, image := range []string{app(), all.Ref("app:v1")} {
		r := n.orca("pull", "-o", "json", image)
		var m control.Mounted
		if err := json.Unmarshal([]byte(r.stdout), &m); err != nil || r.code != 0 || m.Teleported != (image == app()) || m.Layers != 4 || m.ID != "" {
			t.Errorf("%v: %+v", err, r)
		}
	}
	n.orca("pull", app()).is(t, 0, "", "requesting manifest\n", "Successfully teleported!\n")
	if m := n.mounts(); m > 4 {
		t.Errorf("%d mounts of what was only pulled", m)
	}
	list := n.orca("images")
	if lines := strings.Split(list.stdout, "\n"); len(lines) != 4 || !strings.Contains(list.stdout, " teleported ") || !strings.Contains(list.stdout, " pulled ") {
		t.Errorf("images:\n%s%s", list.stdout, list.stderr)
	}
	r := n.startWaiting(app(), waiting)
	n.orca("rm", app()).is(t, 1, "", "in use by process "+strconv.Itoa(r.cmd.Process.Pid))
	r.stdin.Close()
	if err := r.cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, r.stderr)
	}
	n.orca("rm", app(), all.Ref("app:v1")).is(t, 0, "removed "+app()+"\nremoved "+all.Ref("app:v1")+"\n")
	n.orca("rm", app()).is(t, 1, "", "there's no image "+app())
	n.orca("images").is(t, 0, "There are no images. Pull one: orca pull IMAGE\n")
	if left, err := filepath.Glob(filepath.Join(n.root(), "pulled/layers/*")); err != nil || len(left) != 0 {
		t.Errorf("left are %v, %v", left, err)
	}
}

// Where there's no Teleport, images are pulled, and a sentence says why.
func TestOrdinaryRun(t *testing.T) {
	sum := all.box.Sums["/data/1"] + "  /data/1\n"
	for what, image := range map[string]string{
		"a repository that isn't enabled":  all.teleport.Addr + "/team/plain:v1",
		"a registry of ours without it":    all.Ref("app:v1"),
		"a registry of others":             all.foreign.Addr + "/app:v1",
		"the same, by Docker's media type": all.foreign.Addr + "/docker:v1",
	} {
		t.Run(what, func(t *testing.T) {
			if strings.HasSuffix(image, "docker:v1") {
				pushDocker(t, image)
			}
			n := newNode(t)
			for range 2 {
				n.orca("run", image, "sha256sum", "/data/1").is(t, 0, sum, "requesting manifest\n", image+" can't be teleported (", "): pulling it the ordinary way\n",
					"pulled linux/", "All mounts set up\n", "Creating the container...\n", "Starting the container...\n")
			}
			n.orca("run", image, "sh", "-c", "exit 7").is(t, 7, "")
			if s := n.status(); len(s.Images) != 1 || s.Images[0].Teleported {
				t.Errorf("status %+v", s)
			}
		})
	}
	n := newNode(t)
	r := n.orca("run", "--ordinary", app(), "sha256sum", "/data/1")
	r.is(t, 0, sum, "requesting manifest\n", app()+": pulling 4 layers", "pulled linux/")
	if strings.Contains(r.stderr, "teleport") {
		t.Errorf("it said:\n%s", r.stderr)
	}
}

// pushDocker pushes the image to the foreign registry with Docker's media types.
func pushDocker(t *testing.T, image string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), all.Tools.Crane, "mutate", "--insecure", all.foreign.Addr+"/app:v1", "--env", "X=y", "--tag", image).CombinedOutput()
	if err != nil {
		t.Fatalf("crane: %v: %s", err, out)
	}
	manifest, err := exec.CommandContext(t.Context(), all.Tools.Crane, "manifest", "--insecure", image).Output()
	if err != nil {
		t.Fatal(err)
	}
	put(t, image, strings.NewReplacer(
		"application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json",
		"application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json",
		"application/vnd.oci.image.layer.v1.tar+gzip", "application/vnd.docker.image.rootfs.diff.tar.gzip",
	).Replace(string(manifest)))
}

// An image that is being expanded is pulled; when it's expanded, it is teleported.
func TestWhileItExpands(t *testing.T) {
	n := newNode(t)
	box, err := bed.NewToolbox(t.Context(), filepath.Join(n.dir, "image"), 12, 8<<20)
	if err != nil {
		t.Fatal(err)
	}
	repo := "team/new-" + filepath.Base(n.dir)
	if err := all.teleport.Push(t.Context(), all.Tools, box.Layout, repo+":v1"); err != nil {
		t.Fatal(err)
	}
	if err := all.teleport.Expand(t.Context(), repo+":v1"); err != nil {
		t.Fatal(err)
	}
	front, expands := expanding(t)
	image := front + "/" + repo + ":v1"
	n.orca("run", image, "sh", "-c", "echo ok").is(t, 0, "ok\n", "can't be teleported (", "expand", "): pulling it the ordinary way\n")
	expands.Store(false)
	eventually(t, "it is teleported", func() bool {
		return strings.Contains(n.orca("run", image, "sha256sum", "/data/0").stderr, "Successfully teleported!")
	})
	eventually(t, "it isn't here twice", func() bool {
		left, err := filepath.Glob(filepath.Join(n.root(), "pulled/images/*"))
		return err == nil && len(left) == 0
	})
}

// expanding returns the address of a front of the teleporting registry that says, as
// long as it's told to, that layers are being expanded: the registry itself does that
// in no time.
func expanding(t *testing.T) (addr string, expands *atomic.Bool) {
	t.Helper()
	expands = new(atomic.Bool)
	expands.Store(true)
	back := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: all.teleport.Addr})
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !expands.Load() || !strings.HasPrefix(r.URL.Path, "/mount/v1/") {
			back.ServeHTTP(w, r)
			return
		}
		w.Header().Set("Retry-After", "2")
		w.WriteHeader(http.StatusConflict)
		fmt.Fprint(w, `{"errors":[{"code":"TELEPORT_EXPANDING","message":"the layers are being expanded, 50%: ask again","detail":{"status":"Running","progress":50}}]}`)
	}))
	t.Cleanup(front.Close)
	return strings.TrimPrefix(front.URL, "http://"), expands
}

func TestRegistryDown(t *testing.T) {
	n := newNode(t)
	plain := all.teleport.Addr + "/team/plain:v1"
	n.orca("pull", app()).is(t, 0, "")
	n.orca("run", app(), "sh", "-c", "sha256sum /data/0 /data/1 >/dev/null").is(t, 0, "") // all of it is here now
	n.orca("pull", plain).is(t, 0, "")
	all.teleport.Kill()
	defer func() {
		if err := all.teleport.Restart(t.Context()); err != nil {
			t.Error(err)
		}
	}()
	sum := all.box.Sums["/data/0"] + "  /data/0\n"
	for _, restart := range []bool{false, true} {
		if restart {
			n.stop()
			n.start()
		}
		for _, image := range []string{app(), plain} {
			n.orca("run", image, "sha256sum", "/data/0").is(t, 0, sum, "requesting manifest\n", "All mounts set up\n")
		}
	}
	n.orca("run", all.teleport.Addr+"/team/other:v1").is(t, 125, "", "connection refused")
}

func TestShareDown(t *testing.T) {
	n := newNode(t)
	all.samba.Crash()
	r := n.orca("run", app(), "sha256sum", "/data/0")
	if err := all.samba.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.is(t, 0, all.box.Sums["/data/0"]+"  /data/0\n", "can't be teleported (", "): pulling it the ordinary way\n", "pulled linux/")
	eventually(t, "it is teleported again", func() bool {
		return strings.Contains(n.orca("run", app(), "sh", "-c", ":").stderr, "Successfully teleported!")
	})
}

// Whoever ends orca ends its mounts, and only those.
func TestKilledOrca(t *testing.T) {
	for _, image := range []string{app(), all.Ref("app:v1")} {
		n := newNode(t)
		one, two := n.startWaiting(image, waiting), n.startWaiting(image, waiting)
		if s := n.status(); len(s.Claims) != 2 {
			t.Errorf("claims: %+v", s.Claims)
		}
		if m := n.mounts(); m != 4 && m != 1 {
			t.Errorf("%d mounts for two containers of one image", m)
		}
		if err := one.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		one.cmd.Wait()
		eventually(t, "its claim ends", func() bool { return len(n.status().Claims) == 1 })
		two.stdin.Close()
		if err := two.cmd.Wait(); err != nil {
			t.Errorf("%v: %s", err, two.stderr)
		}
		if s := n.status(); len(s.Claims) != 0 {
			t.Errorf("claims: %+v", s.Claims)
		}
		// The next container clears away what the killed one left.
		n.orca("run", image, "sh", "-c", "echo next").is(t, 0, "next\n")
		if left, err := os.ReadDir(filepath.Join(n.root(), "containers")); err != nil || len(left) != 0 {
			t.Errorf("left are %v, %v", left, err)
		}
	}
}

func TestSignals(t *testing.T) {
	n := newNode(t)
	r := n.startWaiting(app(), "trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done")
	if err := r.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = r.cmd.Wait() // the code is what counts
	if code := r.cmd.ProcessState.ExitCode(); code != 3 {
		t.Errorf("exit code %d; it said: %s", code, r.stderr)
	}
	if s := n.status(); len(s.Claims) != 0 {
		t.Errorf("claims: %+v", s.Claims)
	}
}

// A daemon that is killed comes back, and containers don't notice.
func TestKilledDaemon(t *testing.T) {
	n := newNode(t)
	one, two := n.startWaiting(app(), waiting), n.startWaiting(all.Ref("app:v1"), waiting)
	n.daemon.Kill()
	n.start()
	if s := n.status(); len(s.Claims) != 2 {
		t.Errorf("claims: %+v", s.Claims)
	}
	for _, r := range []*running{one, two} {
		r.stdin.Close() // then it reads what nobody has read
		if err := r.cmd.Wait(); err != nil {
			t.Errorf("%v: %s", err, r.stderr)
		}
	}
	if s := n.status(); len(s.Claims) != 0 {
		t.Errorf("claims: %+v", s.Claims)
	}
}

func TestTerminal(t *testing.T) {
	if _, err := exec.LookPath("script"); err != nil {
		t.Skip("script(1) is not installed")
	}
	n := newNode(t)
	box, err := bed.NewToolbox(t.Context(), filepath.Join(n.dir, "image"), 13, 32<<20) // it takes long enough for a picture
	if err != nil {
		t.Fatal(err)
	}
	if err := all.Push(t.Context(), box.Layout, "large:v1"); err != nil {
		t.Fatal(err)
	}
	for image, bars := range map[string]bool{app(): false, all.Ref("large:v1"): true} {
		inner := n.command("run", image, "sh", "-c", "'test -t 0 && test -t 1 && echo terminal; exit 7'")
		cmd := exec.CommandContext(t.Context(), "script", "--quiet", "--return", "--command", "stty cols 150 rows 40; "+strings.Join(inner.Args, " "), "/dev/null")
		cmd.Env = inner.Env
		r := finish(t, cmd, "")
		if r.code != 7 || !strings.Contains(r.stdout, "terminal\r\n") || strings.Contains(r.stdout, ", 3 layers  [=") != bars {
			t.Errorf("%s: exit code %d, %q", image, r.code, r.stdout)
		}
	}
}

// Several at once, of which each starts a teleportd if there's none, and the last
// ends it.
func TestStandalone(t *testing.T) {
	root, err := os.MkdirTemp(all.Work, "s")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			cmd := exec.CommandContext(t.Context(), all.orca, "run", "--root", root, app(), "sha256sum", "/data/0")
			cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(all.Tools.Runc)+":"+os.Getenv("PATH"))
			finish(t, cmd, "").is(t, 0, all.box.Sums["/data/0"]+"  /data/0\n", begun...)
		})
	}
	wg.Wait()
	eventually(t, "the daemon ends", func() bool {
		_, err := os.Stat(standaloneSocket(root))
		return os.IsNotExist(err)
	})
	eventually(t, "nothing is mounted any more", func() bool {
		left, err := bed.Mounts(root)
		return err == nil && len(left) == 0
	})
}

// Who the machine is to a registry, teleportd knows; orca needn't.
func TestPrivateRegistry(t *testing.T) {
	dir, err := os.MkdirTemp(all.Work, "p")
	if err != nil {
		t.Fatal(err)
	}
	samba, err := bed.StartFileServer(t.Context(), all.Sluice, dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(samba.Stop)
	reg, err := bed.StartRegistry(t.Context(), all.Sluice, dir, append(bed.TeleportServer(samba.Address()), "SLUICE_REGISTRY_AUTH_ENABLED=true", "SLUICE_REGISTRY_AUTH_ADMIN_ENABLED=true")...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(reg.Stop)
	password, err := os.ReadFile(filepath.Join(dir, "registry/admin-password"))
	if err != nil {
		t.Fatal(err)
	}
	login := t.TempDir()
	config := fmt.Sprintf(`{"auths": {%q: {"username": "admin", "password": %q}}}`, reg.Addr, strings.TrimSpace(string(password)))
	if err := os.WriteFile(filepath.Join(login, "config.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("DOCKER_CONFIG", login)
	if err := reg.Push(t.Context(), all.Tools, all.box.Layout, "secret/app:v1"); err != nil {
		t.Fatal(err)
	}
	if err := reg.Expand(t.Context(), "secret/app:v1"); err != nil {
		t.Fatal(err)
	}
	image := reg.Addr + "/secret/app:v1"
	knows := newNode(t)
	t.Setenv("DOCKER_CONFIG", t.TempDir()) // orca's own doesn't matter
	for _, ordinary := range []bool{false, true} {
		knows.orca("run", fmt.Sprint("--ordinary=", ordinary), image, "sh", "-c", "echo ok").is(t, 0, "ok\n", "All mounts set up\n")
	}
	stranger := newNode(t)
	stranger.orca("run", image).is(t, 125, "", "requesting manifest\n", "can't be teleported (", "): pulling it the ordinary way\n", "orca: "+image+": ", "authentication required", "docker login as root")
	if s := stranger.status(); len(s.Claims)+len(s.Images) != 0 {
		t.Errorf("status %+v", s)
	}
}
