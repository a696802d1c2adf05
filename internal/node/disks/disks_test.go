package disks

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"sluice/internal/durable"
	"sluice/internal/node/attribution"
	"sluice/internal/node/mount"
	"sluice/internal/node/plane"
	"sluice/internal/node/snapshot"
	"sluice/oci"
)

var (
	_ snapshot.Images    = (*Manager)(nil)
	_ attribution.Images = (*Manager)(nil)
)

// stacked mounts an image for owner and compares what it shows.
func (n *node) stacked(id oci.Digest, owner string, want map[string]string) []string {
	n.t.Helper()
	dirs, err := n.m.Stack(n.t.Context(), id, owner)
	if err != nil {
		n.t.Fatal(err)
	}
	within(n.t, dirs, func(dir string) {
		if diff := cmp.Diff(want, tree(n.t, dir)); diff != "" {
			n.t.Errorf("the image (-want +got):\n%.2000s", diff)
		}
	})
	return dirs
}

func TestImage(t *testing.T) {
	n := newNode(t)
	manifest := n.push(testRepo, "v1", testLayers()...)
	m := n.start()
	img := n.pull(testRepo, "v1", manifest)
	if len(img.DiffIDs) != 3 || !img.Layered || img.Manifest != manifest || img.Reference != n.ref(testRepo, "v1") {
		t.Errorf("%+v", img)
	}
	dirs := n.stacked(img.ID, "me", want())
	if dir, err := m.Attach(t.Context(), img.ID, 0, "me too"); err != nil || dir != dirs[2] {
		t.Errorf("the lowest layer is at %s, %v; want %s", dir, err, dirs[2])
	}
	if _, err := m.Attach(t.Context(), img.ID, mount.Merged, "me"); err == nil {
		t.Error("there is something merged")
	}
	config, err := m.Config(t.Context(), img.ID)
	if err != nil {
		t.Fatal(err)
	}
	var c oci.ImageConfig
	if err := json.Unmarshal(config, &c); err != nil || !slices.Equal(c.RootFS.DiffIDs, img.DiffIDs) {
		t.Errorf("%+v, %v", c, err)
	}

	// What is here needs neither the registry nor the file server.
	n.files.Down()
	n.server.Close()
	if again := n.pull(testRepo, "v1", manifest); again.ID != img.ID {
		t.Errorf("%+v, and then %+v", img, again)
	}
	if _, err := m.Config(t.Context(), img.ID); err != nil {
		t.Error(err)
	}
	n.stacked(img.ID, "another", want())
	if used, err := m.Usage(t.Context(), img.ID, 0); err != nil || used < 3<<20 {
		t.Errorf("usage: %d, %v", used, err)
	}
	s := m.Status(t.Context())
	if len(s.Images) != 1 || len(s.Disks) != 3 || len(s.Shares) != 1 || s.Shares[0].Share != "files.test/"+testRepo || len(s.Images[0].Layers) != 3 {
		t.Errorf("%+v", s)
	}
	for _, d := range s.Disks {
		if d.Path == "" || !slices.Contains(d.Owners, "me") || d.Problem != "" || d.Cached == 0 {
			t.Errorf("%+v", d)
		}
	}
}

// removed waits for nothing: it checks that nothing is left of any image.
func (n *node) removed() {
	n.t.Helper()
	for _, dir := range []string{"node/images", "node/disks", "node/m"} {
		entries, err := os.ReadDir(filepath.Join(n.root, dir))
		if err != nil || len(entries) != 0 {
			n.t.Errorf("left in %s: %v, %v", dir, entries, err)
		}
	}
	if u := n.c.Usage(); u.Layers != 0 {
		n.t.Errorf("left in the cache: %+v", u)
	}
	if mounts, err := plane.MountsBelow(filepath.Join(n.root, "node")); err != nil || len(mounts) != 0 {
		n.t.Errorf("left mounted: %q, %v", mounts, err)
	}
}

func TestRemoval(t *testing.T) {
	n := newNode(t)
	manifest := n.push(testRepo, "v1", testLayers()...)
	m := n.start()
	img := n.pull(testRepo, "v1", manifest)
	for i := range img.DiffIDs {
		if err := m.Hold(t.Context(), img.ID, i, "snapshot"); err != nil {
			t.Fatal(err)
		}
	}
	dirs := n.stacked(img.ID, "container", want())
	if err := m.Release(t.Context(), "container"); err != nil {
		t.Fatal(err)
	}
	if err := m.Release(t.Context(), "nobody"); err != nil {
		t.Error(err)
	}
	m.Sweep(t.Context(), time.Now())
	if _, err := os.Stat(filepath.Join(dirs[0], "top")); err != nil {
		t.Errorf("before all owners are known: %v", err)
	}
	m.Settled()
	m.Sweep(t.Context(), time.Now().Add(-time.Hour))
	if _, err := os.Stat(filepath.Join(dirs[0], "top")); err != nil {
		t.Errorf("while it may linger: %v", err)
	}
	// Somebody who shows it elsewhere keeps it.
	within(t, dirs, func(dir string) {
		m.Sweep(t.Context(), time.Now())
		if diff := cmp.Diff(want(), tree(t, dir)); diff != "" {
			t.Errorf("what is in use (-want +got):\n%.2000s", diff)
		}
	})
	m.Sweep(t.Context(), time.Now())
	if _, err := os.Stat(filepath.Join(dirs[0], "top")); err == nil {
		t.Error("it is still mounted")
	}
	n.stacked(img.ID, "container", want())
	if err := m.Release(t.Context(), "container"); err != nil {
		t.Fatal(err)
	}
	if err := m.Release(t.Context(), "snapshot"); err != nil {
		t.Fatal(err)
	}
	m.Collect(t.Context())
	n.removed()
	if _, err := m.Stack(t.Context(), img.ID, "container"); err == nil {
		t.Error("a removed image can be mounted")
	}
	if s := m.Status(t.Context()); len(s.Images)+len(s.Disks)+len(s.Shares) != 0 {
		t.Errorf("%+v", s)
	}
	n.stacked(n.pull(testRepo, "v1", manifest).ID, "again", want())
}

// A layer that images share is mounted once, and goes with the last of them.
func TestSharedLayers(t *testing.T) {
	n := newNode(t)
	layers := testLayers()
	first := n.push(testRepo, "v1", layers...)
	second := n.push("team/other", "v1", layers[0], []file{{name: "own", content: []byte("own")}})
	twice := n.push("team/twice", "v1", layers[2], layers[1], layers[2])
	m := n.start()
	m.Settled()
	a, b, c := n.pull(testRepo, "v1", first), n.pull("team/other", "v1", second), n.pull("team/twice", "v1", twice)
	dirs, others := n.stacked(a.ID, "a", want()), n.stacked(b.ID, "b", map[string]string{
		"etc/hello": "first", "etc/gone": "removed by the second layer", "big": want()["big"], "own": "own",
	})
	if dirs[2] != others[1] {
		t.Errorf("the shared layer is at %s and at %s", dirs[2], others[1])
	}
	if got := n.stacked(c.ID, "c", map[string]string{"etc/hello": "second", "top": want()["top"]}); len(got) != 2 || got[0] != dirs[0] {
		t.Errorf("an image that has a layer twice: %q", got)
	}
	for _, img := range []struct {
		mount.Image
		owner string
	}{{a, "a"}, {c, "c"}} {
		if err := m.Hold(t.Context(), img.ID, len(img.DiffIDs)-1, img.owner); err != nil {
			t.Fatal(err)
		}
		if err := m.Release(t.Context(), img.owner); err != nil {
			t.Fatal(err)
		}
	}
	m.Collect(t.Context())
	if s := m.Status(t.Context()); len(s.Images) != 1 || len(s.Disks) != 2 || len(s.Shares) != 1 {
		t.Errorf("%+v", s)
	}
	if _, err := os.Stat(filepath.Join(others[1], "big")); err != nil {
		t.Error(err)
	}
}

func TestRestart(t *testing.T) {
	n := newNode(t)
	manifest := n.push(testRepo, "v1", testLayers()...)
	m := n.start()
	img := n.pull(testRepo, "v1", manifest)
	dirs, err := m.Stack(t.Context(), img.ID, "me")
	if err != nil {
		t.Fatal(err)
	}
	hello := filepath.Join(dirs[1], "etc/hello")
	if got, err := os.ReadFile(hello); err != nil || string(got) != "second" {
		t.Fatalf("%q, %v", got, err)
	}
	open, err := os.Open(filepath.Join(dirs[2], "big"))
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	n.stop()
	asked := n.asked.Load()
	m = n.start()
	if err := m.Own(t.Context(), img.ID, 0, "me"); err != nil {
		t.Fatal(err)
	}
	if n.asked.Load() != asked {
		t.Error("the start asks the registry")
	}
	// What wasn't read yet comes from the share, with a credential that is asked for.
	buf := make([]byte, 1<<20)
	if _, err := open.ReadAt(buf, 1<<20); err != nil || string(buf) != want()["big"][1<<20:2<<20] {
		t.Fatalf("after a restart: %v", err)
	}
	if n.asked.Load() == asked {
		t.Error("nobody asked for a credential")
	}
	m.Settled()
	m.Sweep(t.Context(), time.Now())
	if got, err := m.Stack(t.Context(), img.ID, "me"); err != nil || !slices.Equal(got, dirs) {
		t.Errorf("%q, %v; want %q", got, err, dirs)
	}
	n.stacked(img.ID, "me", want())
}

// After a reboot what was read works without anybody else.
func TestReboot(t *testing.T) {
	n := newNode(t)
	manifest := n.push(testRepo, "v1", testLayers()...)
	n.start()
	img := n.pull(testRepo, "v1", manifest)
	n.stacked(img.ID, "me", want())
	n.reboot()
	n.files.Down()
	n.server.Close()
	m := n.start()
	for i := range img.DiffIDs {
		if err := m.Hold(t.Context(), img.ID, i, "snapshot"); err != nil {
			t.Fatal(err)
		}
	}
	m.Settled()
	n.stacked(img.ID, "me", want())
	if again := n.pull(testRepo, "v1", manifest); again.ID != img.ID {
		t.Errorf("%+v", again)
	}
}

// Who reads while the daemon is replaced sees a delay, and the right bytes.
func TestRestartDuringReads(t *testing.T) {
	n := newNode(t)
	manifest := n.push(testRepo, "v1", testLayers()...)
	m := n.start()
	img := n.pull(testRepo, "v1", manifest)
	dirs, err := m.Stack(t.Context(), img.ID, "me")
	if err != nil {
		t.Fatal(err)
	}
	n.files.Delay(300 * time.Millisecond)
	before := n.files.Requests()
	read := make(chan error, 1)
	go func() {
		got, err := os.ReadFile(filepath.Join(dirs[2], "big"))
		if err == nil && string(got) != want()["big"] {
			err = errors.New("WRONG BYTES")
		}
		read <- err
	}()
	for n.files.Requests() == before {
		time.Sleep(time.Millisecond)
	}
	n.stop()
	n.start()
	if err := <-read; err != nil {
		t.Error(err)
	}
}

// A mount whose connection to its content is gone for ever is made anew at the start.
func TestStaleMounts(t *testing.T) {
	n := newNode(t)
	manifest := n.push(testRepo, "v1", testLayers()...)
	n.start()
	img := n.pull(testRepo, "v1", manifest)
	dirs := n.stacked(img.ID, "me", want())
	ctl := t.TempDir()
	if err := unix.Mount("fusectl", ctl, "fusectl", 0, ""); err != nil {
		t.Skip("no fusectl: ", err)
	}
	defer plane.Unmount(ctl, true)
	at, err := plane.MountAt(filepath.Join(n.root, "plane", "blobs"))
	if err != nil || at == nil {
		t.Fatal(at, err)
	}
	if err := os.WriteFile(filepath.Join(ctl, fmt.Sprint(at.Minor), "abort"), []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	<-n.p.Lost()
	n.stop()
	n.start()
	if got := n.stacked(img.ID, "me", want()); !slices.Equal(got, dirs) {
		t.Errorf("%q, and before that %q", got, dirs)
	}
}

// Images that aren't wanted any more don't keep the layers that others hold of them.
func TestPartsOfAnImage(t *testing.T) {
	n := newNode(t)
	manifest := n.push(testRepo, "v1", testLayers()...)
	m := n.start()
	m.Settled()
	img := n.pull(testRepo, "v1", manifest)
	n.stacked(img.ID, "container", want())
	if err := m.Hold(t.Context(), img.ID, 0, "of another image"); err != nil {
		t.Fatal(err)
	}
	if err := m.Hold(t.Context(), img.ID, 2, "of the image"); err != nil {
		t.Fatal(err)
	}
	for _, owner := range []string{"container", "of the image"} {
		if err := m.Release(t.Context(), owner); err != nil {
			t.Fatal(err)
		}
	}
	m.Collect(t.Context())
	for i, want := range []bool{true, false, false} {
		if used, err := m.Usage(t.Context(), img.ID, i); err != nil || used > 0 != want {
			t.Errorf("layer %d has %d bytes here, %v", i, used, err)
		}
	}
	n.stacked(img.ID, "container", want()) // it's a matter of space only
}

// What a crash left of pulls is removed, and what is needed isn't.
func TestLeftOver(t *testing.T) {
	n := newNode(t)
	manifest := n.push(testRepo, "v1", testLayers()...)
	m := n.start()
	img := n.pull(testRepo, "v1", manifest)
	if _, err := m.Config(t.Context(), img.ID); err != nil {
		t.Fatal(err)
	}
	n.stacked(img.ID, "me", want())
	n.stop()
	state := filepath.Join(n.root, "node")
	id := oci.DigestOf([]byte("another")).Encoded()
	for _, name := range []string{
		"disks/" + durable.TempPrefix + "123/head", "disks/" + id + "/sums", "disks/" + id + "/head",
		"images/" + durable.TempPrefix + "123", "images/" + id + recordSuffix, "images/" + id + configSuffix,
	} {
		name = filepath.Join(state, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o700), os.WriteFile(name, []byte("{}"), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	m = n.start()
	if err := m.Hold(t.Context(), img.ID, 2, "snapshot"); err != nil {
		t.Fatal(err)
	}
	m.Settled()
	m.Sweep(t.Context(), time.Now())
	for dir, want := range map[string]int{"disks": 3, "images": 3} {
		entries, err := os.ReadDir(filepath.Join(state, dir))
		if err != nil || len(entries) != want {
			t.Errorf("%s has %v, %v; want %d", dir, entries, err, want)
		}
	}
	n.files.Down()
	n.server.Close()
	n.stacked(img.ID, "me", want())
	if _, err := m.Config(t.Context(), img.ID); err != nil {
		t.Error(err)
	}
}
