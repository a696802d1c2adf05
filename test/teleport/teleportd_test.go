package teleport

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sluice/internal/teleport/mountapi"
	"sluice/oci"
	"sluice/test/bed"
)

// nodeStage is a stage with nodes: real containerds with teleportd.
type nodeStage struct {
	*stage
	tools     bed.Tools
	teleportd string
}

// nodeLifetime is that of credentials, short, but of use to a node.
const nodeLifetime = 40 * time.Second

func newNodeStage(t *testing.T) *nodeStage {
	t.Helper()
	s := &nodeStage{stage: newStage(t, nodeLifetime)}
	src, err := filepath.Abs("../..")
	must(t, err)
	s.tools, err = bed.BuildTools(t.Context(), src, func(what string) { t.Log(what) })
	must(t, err)
	s.teleportd, err = bed.BuildTeleportd(t.Context(), src, t.TempDir())
	must(t, err)
	return s
}

// node starts a node that the end of the test takes down.
func (s *nodeStage) node(flags ...string) *bed.Node {
	s.t.Helper()
	n := s.newNode(flags...)
	s.startNode(n)
	return n
}

func (s *nodeStage) startNode(n *bed.Node) {
	s.t.Helper()
	must(s.t, n.StartTeleportd(s.t.Context()))
	must(s.t, n.StartContainerd(s.t.Context()))
}

// newNode is node, of which nothing runs yet.
func (s *nodeStage) newNode(flags ...string) *bed.Node {
	s.t.Helper()
	dir, err := os.MkdirTemp("", "teleport-") // short: overlayfs's options have little room
	must(s.t, err)
	n, err := bed.NewTeleportNode(s.tools, s.teleportd, dir, flags...)
	must(s.t, err)
	s.t.Cleanup(func() {
		if err := n.Stop(); err != nil {
			s.t.Error(err)
		}
		if s.t.Failed() {
			for _, log := range []string{"teleportd.log", "containerd.log"} {
				b, _ := os.ReadFile(filepath.Join(dir, log))
				s.t.Logf("%s:\n%s", log, b[max(0, len(b)-6000):])
			}
			if err := n.Clear(); err != nil {
				s.t.Error(err)
			}
		}
		if err := os.RemoveAll(dir); err != nil {
			s.t.Error(err)
		}
	})
	return n
}

// push pushes an image that is expanded, and returns how a node calls it.
func (s *nodeStage) push(box bed.Toolbox, name string) string {
	s.t.Helper()
	s.pushPlain(box, name)
	must(s.t, s.registry.Expand(s.t.Context(), name))
	return s.registry.Addr + "/" + name
}

// pushPlain pushes an image.
func (s *nodeStage) pushPlain(box bed.Toolbox, name string) string {
	s.t.Helper()
	if _, err := s.run("import", "oci:"+box.Layout, s.registry.Addr+"/"+name); err != nil {
		s.t.Fatal(err)
	}
	return s.registry.Addr + "/" + name
}

// listing prints every file's attributes and content, but of what the runtime puts
// into a container.
const listing = `cd /; for f in $(ls -a bin data etc); do for d in bin data etc; do [ -e $d/$f ] && [ ! -d $d/$f ] && case $d/$f in etc/hosts|etc/resolv.conf) ;; *) stat -c '%n %F %a %u:%g %s %Y' $d/$f; sha256sum $d/$f;; esac; done; done; stat -c '%n %a %u:%g' bin data etc`

// sh runs a shell command in a new container of an image that was pulled.
func (s *nodeStage) sh(n *bed.Node, snapshotter, ref, script string) string {
	s.t.Helper()
	r, err := n.Run(s.t.Context(), snapshotter, ref, fmt.Sprintf("c%d", time.Now().UnixNano()), "/bin/sh", "-c", script)
	must(s.t, err)
	return r.Output
}

// erofs lists where a node has EROFS mounted.
func erofs(t *testing.T, n *bed.Node) (all []string) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], n.Dir+"/") && slices.Contains(f, "erofs") {
			all = append(all, f[4])
		}
	}
	return all
}

// awaitErofs waits until a node has n mounts of EROFS.
func awaitErofs(t *testing.T, n *bed.Node, want int) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); len(erofs(t, n)) != want; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("EROFS is mounted at %q, want %d mounts", erofs(t, n), want)
		}
	}
}

// Images are what they are when they are pulled the ordinary way, one mount a
// layer, which images share; containers write apart; containerd's removal takes the
// mounts away.
func TestTeleportd(t *testing.T) {
	s := newNodeStage(t)
	second, err := bed.NewToolbox(t.Context(), filepath.Join(t.TempDir(), "second"), 7, 3<<20, 1<<20)
	must(t, err)
	n := s.newNode()
	must(t, n.StartContainerd(t.Context())) // in the other order than usual
	must(t, n.StartTeleportd(t.Context()))
	must(t, n.AwaitConnection(t.Context()))
	a, b := s.push(s.box, "team/app:v1"), s.push(second, "team/app:v2")
	for _, ref := range []string{a, b} {
		must(t, n.Pull(t.Context(), bed.Overlayfs, ref))
		must(t, n.Pull(t.Context(), bed.Teleportd, ref))
		want := s.sh(n, bed.Overlayfs, ref, listing)
		if got := s.sh(n, bed.Teleportd, ref, listing); got != want || strings.Count(want, "\n") < 20 {
			t.Errorf("%s has\n%s\nwant\n%s", ref, got, want)
		}
	}
	var ids []string
	for _, ref := range []string{a, b} {
		ids = append(ids, s.container(n, ref))
	}
	if all := erofs(t, n); len(all) != 4 {
		t.Errorf("4 layers of two images are mounted at %q", all)
	}
	if out := s.sh(n, bed.Teleportd, a, "echo mine >> /etc/passwd; rm /data/0; grep mine /etc/passwd; ls /data"); out != "mine\n" {
		t.Errorf("a container that writes sees %q", out)
	}
	if out := s.sh(n, bed.Teleportd, a, "grep mine /etc/passwd; ls /data"); out != "0\n" {
		t.Errorf("the next one sees %q", out)
	}
	for _, id := range ids {
		_, err := n.Ctr(t.Context(), "tasks", "rm", "--force", id)
		must(t, err)
		_, err = n.Ctr(t.Context(), "containers", "rm", id)
		must(t, err)
	}
	_, err = n.Ctr(t.Context(), "images", "rm", "--sync", a, b)
	must(t, err)
	awaitErofs(t, n, 0)
}

// container starts a container that sleeps, and returns its ID.
func (s *nodeStage) container(n *bed.Node, ref string) string {
	s.t.Helper()
	id := fmt.Sprintf("sleeper-%d", time.Now().UnixNano()) // runc's are the machine's
	_, err := n.Ctr(s.t.Context(), "run", "-d", "--net-host", "--snapshotter", bed.Teleportd, ref, id, "/bin/sleep", "100000")
	must(s.t, err)
	return id
}

// sum returns the SHA-256 of a file as a running container reads it.
func sum(ctx context.Context, n *bed.Node, id, file string) (string, error) {
	out, err := n.Exec(ctx, id, "/bin/sh", "-c", "sha256sum "+file+" 2>&1")
	if err != nil {
		return "", err
	}
	sum, ok := strings.CutSuffix(out, "  "+file+"\n")
	if !ok {
		return "", fmt.Errorf("no sum of %s in %q", file, out)
	}
	return sum, nil
}

// disturbed reads a running container's file again and again, with nothing in the
// kernel's memory, while disturb is called n times. No read may fail, or be wrong.
func (s *nodeStage) disturbed(n *bed.Node, id string, times int, disturb func()) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 10*time.Minute)
	var reads atomic.Int64
	var wg sync.WaitGroup
	wg.Go(func() {
		defer cancel()
		for ctx.Err() == nil {
			got, err := sum(s.t.Context(), n, id, "/data/0")
			if err != nil || got != s.box.Sums["/data/0"] {
				s.t.Errorf("a read while it was disturbed: %q, %v", got, err)
				return
			}
			reads.Add(1)
			if err := bed.DropCaches(); err != nil {
				s.t.Error(err)
				return
			}
		}
	})
	for range times {
		before := reads.Load()
		disturb()
		for reads.Load() < before+2 && ctx.Err() == nil {
			time.Sleep(10 * time.Millisecond)
		}
	}
	if ctx.Err() != nil && !s.t.Failed() {
		s.t.Error("reads take too long")
	}
	cancel()
	wg.Wait()
	s.t.Logf("%d reads, %d disturbances", reads.Load(), times)
}

// Readers don't notice that teleportd is killed, restarted, or stopped for a while.
// What was read before needs neither the registry nor the file server, also when the
// machine is rebooted.
func TestTeleportdRestarts(t *testing.T) {
	s := newNodeStage(t)
	n := s.node()
	ref := s.push(s.box, "team/app:v1")
	must(t, n.Pull(t.Context(), bed.Teleportd, ref))
	reader := s.container(n, ref)
	if got, err := sum(t.Context(), n, reader, "/data/0"); err != nil || got != s.box.Sums["/data/0"] {
		t.Fatalf("the first read: %q, %v", got, err)
	}
	before := erofs(t, n)
	s.registry.Stop() // what was read is here
	s.samba.Crash()
	s.disturbed(n, reader, 5, func() {
		n.Teleportd.Kill()
		must(t, n.StartTeleportd(t.Context()))
	})
	n.Teleportd.Stop()
	if all := erofs(t, n); !slices.Equal(all, before) {
		t.Errorf("without teleportd, EROFS is mounted at %q, before at %q", all, before)
	}
	must(t, n.StartTeleportd(t.Context()))
	if out := s.sh(n, bed.Teleportd, ref, "sha256sum /data/0"); !strings.HasPrefix(out, s.box.Sums["/data/0"]) {
		t.Errorf("a container without the registry prints %q", out)
	}
	if all := erofs(t, n); len(all) != 3 {
		t.Errorf("3 layers are mounted at %q", all)
	}
	must(t, n.PowerOff(t.Context()))
	s.startNode(n)
	if out := s.sh(n, bed.Teleportd, ref, "sha256sum /data/0"); !strings.HasPrefix(out, s.box.Sums["/data/0"]) {
		t.Errorf("a container after a reboot prints %q", out)
	}
}

// status asks the daemon how it is.
func (s *nodeStage) status(n *bed.Node, into any) string {
	s.t.Helper()
	out, err := exec.CommandContext(s.t.Context(), s.teleportd, "status", "--run", filepath.Join(n.Dir, "run"), "--output", "json").Output()
	if err != nil {
		s.t.Fatalf("teleportd status: %v\n%s", err, out)
	}
	must(s.t, json.Unmarshal(out, into))
	return string(out)
}

// What Teleport can't have is pulled the ordinary way, and why is told.
func TestTeleportdPullsTheOrdinaryWay(t *testing.T) {
	s := newNodeStage(t)
	var expanding atomic.Bool // what the front says instead of the registry
	back := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: s.registry.Addr})
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if expanding.Load() && strings.HasPrefix(r.URL.Path, "/mount/v1/") {
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(http.StatusConflict)
			fmt.Fprint(w, `{"errors":[{"code":"TELEPORT_EXPANDING","message":"the layers are being expanded","detail":{"status":"Running","progress":50}}]}`)
			return
		}
		back.ServeHTTP(w, r)
	}))
	defer front.Close()
	n := s.node()
	pulled := func(what, ref, reason string) {
		t.Helper()
		must(t, n.Pull(t.Context(), bed.Teleportd, ref))
		if out := s.sh(n, bed.Teleportd, ref, "sha256sum /data/0"); !strings.HasPrefix(out, s.box.Sums["/data/0"]) {
			t.Errorf("%s: it prints %q", what, out)
		}
		if all := erofs(t, n); len(all) != 0 {
			t.Errorf("%s: EROFS is mounted at %q", what, all)
		}
		var st struct {
			Node struct {
				NotTeleported []struct{ Reference, Reason, Message, Remedy string }
			}
		}
		text := s.status(n, &st)
		for _, i := range st.Node.NotTeleported {
			if i.Reference == ref && i.Reason == reason && i.Message != "" && i.Remedy != "" {
				_, err := n.Ctr(t.Context(), "images", "rm", "--sync", ref)
				must(t, err)
				return
			}
		}
		t.Errorf("%s: the status doesn't say that %s is pulled because of %s:\n%s", what, ref, reason, text)
	}
	pulled("not enabled", s.pushPlain(s.box, "other/app:v1"), "NoStreamingArtifact")
	s.push(s.box, "team/app:v1")
	expanding.Store(true)
	there := strings.TrimPrefix(front.URL, "http://")
	pulled("expanding", there+"/team/app:v1", "ConversionPending")
	s.samba.Crash()
	pulled("no file server", s.registry.Addr+"/team/app:v1", "RegistryUnavailable")
}

// A file server that is away costs the reads that need it an error, no sooner than
// they may wait; when it's back they work.
func TestTeleportdWithoutFileServer(t *testing.T) {
	const patience = 3 * time.Second
	s := newNodeStage(t)
	large, err := bed.NewToolbox(t.Context(), filepath.Join(t.TempDir(), "large"), 8, 64<<20)
	must(t, err)
	n := s.node("--read-timeout", patience.String())
	ref := s.push(large, "team/app:v1")
	must(t, n.Pull(t.Context(), bed.Teleportd, ref))
	reader := s.container(n, ref)
	if _, err := sum(t.Context(), n, reader, "/etc/passwd"); err != nil { // the program is here
		t.Fatal(err)
	}
	s.samba.Crash()
	began := time.Now()
	got, err := sum(t.Context(), n, reader, "/data/0")
	if took := time.Since(began); err == nil || !strings.Contains(err.Error(), "Input/output error") || took < patience/2 || took > patience+time.Minute {
		t.Errorf("a read without the file server: %q, %v after %v", got, err, took)
	}
	must(t, s.samba.Restart(t.Context()))
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if got, err = sum(t.Context(), n, reader, "/data/0"); err == nil || time.Now().After(deadline) {
			break
		}
	}
	if err != nil || got != large.Sums["/data/0"] {
		t.Errorf("a read when it's back: %q, %v", got, err)
	}
}

// Reads go on, and are right, while what they need goes away and comes back.
func TestTeleportdReadsGoOn(t *testing.T) {
	s := newNodeStage(t)
	n := s.node()
	for i, c := range []struct {
		what    string
		disturb func()
	}{
		{"the file server restarts", func() {
			s.samba.Crash()
			time.Sleep(2 * time.Second) // an outage that is noticed
			must(t, s.samba.Restart(t.Context()))
		}},
		{"teleportd is killed", func() {
			n.Teleportd.Kill()
			must(t, n.StartTeleportd(t.Context()))
		}},
		{"both", func() {
			s.samba.Crash()
			n.Teleportd.Kill()
			must(t, n.StartTeleportd(t.Context()))
			must(t, s.samba.Restart(t.Context()))
		}},
	} {
		// Each has content that nobody has read.
		box, err := bed.NewToolbox(t.Context(), filepath.Join(t.TempDir(), "image"), uint64(100+i), 48<<20)
		must(t, err)
		ref := s.push(box, fmt.Sprintf("team/app:v%d", i))
		must(t, n.Pull(t.Context(), bed.Teleportd, ref))
		id := s.container(n, ref)
		if _, err := sum(t.Context(), n, id, "/etc/passwd"); err != nil { // the program is here
			t.Fatal(err)
		}
		read := make(chan error, 1)
		go func() {
			got, err := sum(t.Context(), n, id, "/data/0")
			if err == nil && got != box.Sums["/data/0"] {
				err = errors.New("wrong content: " + got)
			}
			read <- err
		}()
		c.disturb()
		if err := <-read; err != nil {
			t.Errorf("a read while %s: %v", c.what, err)
		}
		if err := n.AwaitConnection(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// tree prints every file's attributes and content; the runtime's own are left out.
const tree = `cd /; find . -xdev -mindepth 1 \( -path ./proc -o -path ./sys -o -path ./dev -o -path ./run -o -path ./etc/resolv.conf -o -path ./etc/hosts \) -prune -o \
	\( -path ./etc -printf '%p d %m %U:%G\n' -o -type d -printf '%p d %m %U:%G %T@\n' -o -type l -printf '%p l %U:%G %T@ %l\n' -o -printf '%p %y %m %U:%G %s %T@ %n\n' \) | LC_ALL=C sort
find . -xdev -type f -not -path './proc/*' -not -path './sys/*' -not -path './run/*' -not -path ./etc/resolv.conf -not -path ./etc/hosts -print0 | LC_ALL=C sort -z | xargs -0 sha256sum`

// A Debian in 28 layers is, to its last file, what it is when it's pulled.
func TestTeleportdDebian(t *testing.T) {
	s := newNodeStage(t)
	images, err := bed.Debian(t.Context(), func(what string) { t.Log(what) })
	must(t, err)
	n := s.node()
	ref := s.push(bed.Toolbox{Layout: images.ManyLayers}, "team/debian:28")
	must(t, n.Pull(t.Context(), bed.Overlayfs, ref))
	must(t, n.Pull(t.Context(), bed.Teleportd, ref))
	want, got := s.sh(n, bed.Overlayfs, ref, tree), s.sh(n, bed.Teleportd, ref, tree)
	if got != want || strings.Count(want, "\n") < 20_000 {
		g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
		for i := range min(len(g), len(w)) {
			if g[i] != w[i] {
				t.Fatalf("line %d is %s, want %s", i, g[i], w[i])
			}
		}
		t.Fatalf("%d lines, want %d", len(g), len(w))
	}
	m, err := mountapi.Get(t.Context(), s.client, mountapi.Query{Repository: "team/debian", Reference: "28"})
	must(t, err)
	different := map[oci.Digest]bool{} // some layers are empty
	for _, l := range m.Layers {
		different[l.VHDDigest] = true
	}
	if all := erofs(t, n); len(m.Layers) != bed.ManyLayers || len(all) != len(different) {
		t.Errorf("%d layers, of which %d differ, are mounted at %q", len(m.Layers), len(different), all)
	}
}
