package mount_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sluice/internal/node/mount"
	"sluice/internal/node/plane"
	"sluice/oci"
)

func blobsOf(t *testing.T, manifest []byte) []oci.Descriptor {
	t.Helper()
	var m oci.ImageManifest
	if err := json.Unmarshal(manifest, &m); err != nil {
		t.Fatal(err)
	}
	return m.Layers
}

func TestClaims(t *testing.T) {
	n, _ := prepared(t)
	m := n.start()
	dir := filepath.Join(n.root, "mnt")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	c, config, err := m.Mount(t.Context(), mount.Request{Reference: testRef, Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	var parsed oci.ImageConfig
	if err := json.Unmarshal(config, &parsed); err != nil || len(parsed.Config.Cmd) != 1 {
		t.Errorf("config %s: %v", config, err)
	}
	checkImage(t, dir)
	checkRestricted(t, dir)
	if err := os.WriteFile(filepath.Join(dir, "new"), nil, 0o644); err == nil {
		t.Error("a read-only mount took a file")
	}
	if _, _, err := m.Mount(t.Context(), mount.Request{Reference: testRef, Dir: dir}); err == nil {
		t.Error("a second mount on the same directory")
	}

	// It survives a restart and a reboot, without the registry.
	n.reg.down.Store(true)
	n.stop()
	m = n.start()
	if got := m.Claims(); len(got) != 1 || got[0].ID != c.ID {
		t.Fatalf("claims after a restart: %+v", got)
	}
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Unmount(t.Context(), dir); !errors.Is(err, plane.ErrBusy) {
		t.Errorf("unmounting what is in use: %v", err)
	}
	f.Close()
	n.reboot()
	m = n.start()
	if got, err := os.ReadFile(filepath.Join(dir, "etc/hello")); err != nil || string(got) != "second" {
		t.Errorf("after a reboot: %q, %v", got, err)
	}
	unmount(t, m, dir)
	if at, _ := plane.MountAt(dir); at != nil {
		t.Error("it's still mounted")
	}
	if err := m.Unmount(t.Context(), dir); !errors.Is(err, mount.ErrUnknownClaim) {
		t.Errorf("unmounting twice: %v", err)
	}
}

// checkRestricted checks that an image's device nodes and set-user-ID programs
// are of no use to the users of this machine.
func checkRestricted(t *testing.T, dir string) {
	t.Helper()
	at, err := plane.MountAt(dir)
	if err != nil || at == nil {
		t.Fatalf("the mount at %s: %v, %v", dir, at, err)
	}
	for _, want := range []string{"nosuid", "nodev"} {
		if !slices.Contains(strings.Split(at.Options, ","), want) {
			t.Errorf("%s is mounted with %s, not with %s", dir, at.Options, want)
		}
	}
}

func TestWritableClaim(t *testing.T) {
	n, _ := prepared(t)
	m := n.start()
	dir := filepath.Join(n.root, "mnt")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	c, _, err := m.Mount(t.Context(), mount.Request{Reference: testRef, Dir: dir, Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	checkRestricted(t, dir)
	if err := os.WriteFile(filepath.Join(dir, "etc/hello"), []byte("changed"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(c.Path, "etc/hello")); err != nil || string(got) != "second" {
		t.Errorf("the image itself has %q, %v", got, err)
	}
	unmount(t, m, c.ID)
	left, err := os.ReadDir(filepath.Join(n.root, "node", "claims"))
	if err != nil || len(left) != 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
}

func TestClaimEndsWithItsProcess(t *testing.T) {
	n, _ := prepared(t)
	n.opts.Linger = 200 * time.Millisecond
	m := n.start()
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c, _, err := m.Mount(t.Context(), mount.Request{Reference: testRef, PID: cmd.Process.Pid})
	if err != nil {
		t.Fatal(err)
	}
	checkImage(t, c.Path)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	eventually(t, "the claim is gone", func() bool { return len(m.Claims()) == 0 })
}

func TestClaimEndsWithItsProcessWhileTheDaemonIsDown(t *testing.T) {
	n, _ := prepared(t)
	m := n.start()
	dirs := []string{filepath.Join(n.root, "free"), filepath.Join(n.root, "busy")}
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for _, dir := range dirs {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if _, _, err := m.Mount(t.Context(), mount.Request{Reference: testRef, Dir: dir, Writable: true, PID: cmd.Process.Pid}); err != nil {
			t.Fatal(err)
		}
	}
	user, err := os.Open(dirs[1])
	if err != nil {
		t.Fatal(err)
	}
	defer user.Close()
	n.stop()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	n.opts.Linger = 200 * time.Millisecond
	m = n.start()
	if at, err := plane.MountAt(dirs[0]); err != nil || at != nil {
		t.Errorf("the mount of a process that ended stays: %+v, %v", at, err)
	}
	if got := m.Claims(); len(got) != 1 || got[0].Dir != dirs[1] {
		t.Errorf("claims %+v; want the one that is in use", got)
	}
	user.Close()
	eventually(t, "the other claim is gone", func() bool { return len(m.Claims()) == 0 })
	if at, err := plane.MountAt(dirs[1]); err != nil || at != nil {
		t.Errorf("its mount stays: %+v, %v", at, err)
	}
}

func TestMountChecksTheConfig(t *testing.T) {
	n, _ := prepared(t)
	other := n.push(testRepo, "other", testLayers()[:1], here)[0]
	n.convert(testRepo, "other")
	// The artifact of another image, its subject changed.
	content := n.manifest(testRepo, n.artifactOf(other.Digest).Digest)
	var lie oci.ImageManifest
	if err := json.Unmarshal(content, &lie); err != nil {
		t.Fatal(err)
	}
	victim := n.push(testRepo, "victim", testLayers(), here)[0]
	lie.Subject = &oci.Descriptor{MediaType: victim.MediaType, Digest: victim.Digest, Size: victim.Size}
	content, err := json.Marshal(lie)
	if err != nil {
		t.Fatal(err)
	}
	for d := range n.reg.Registry.Referrers(t.Context(), testRepo, victim.Digest, "") {
		if err := n.reg.DeleteManifest(t.Context(), testRepo, d.Digest); err != nil {
			t.Fatal(err)
		}
	}
	n.pushManifest(testRepo, oci.DigestOf(content).String(), oci.MediaTypeImageManifest, content)
	m := n.start()
	_, _, err = m.Mount(t.Context(), mount.Request{Reference: testHost + "/" + testRepo + ":victim"})
	if mount.ReasonOf(err) != mount.IntegrityFailure {
		t.Errorf("an artifact of other layers: %v", err)
	}
}

// Of two claims of one directory, as there are when one couldn't be mounted at a
// start and somebody asked again, one is mounted.
func TestTwoClaimsOfOneDirectory(t *testing.T) {
	n, _ := prepared(t)
	m := n.start()
	dir := filepath.Join(n.root, "mnt")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	c, _, err := m.Mount(t.Context(), mount.Request{Reference: testRef, Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	n.reboot()
	claims := filepath.Join(n.root, "node", "claims")
	record, err := os.ReadFile(filepath.Join(claims, c.ID+".json"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 8 {
		id := fmt.Sprintf("00000000000%d", i)
		if err := os.WriteFile(filepath.Join(claims, id+".json"), bytes.Replace(record, []byte(c.ID), []byte(id), 1), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	m = n.start()
	checkImage(t, dir)
	unmount(t, m, dir)
	if at, err := plane.MountAt(dir); err != nil || at != nil {
		t.Errorf("after it was unmounted something is still mounted: %+v, %v", at, err)
		_ = plane.Unmount(dir, true)
	}
}
