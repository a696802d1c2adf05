package control_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/node/disks/control"
	"sluice/internal/node/mount"
	"sluice/oci"
)

func TestTeleportedMount(t *testing.T) {
	d := newDaemon(t)
	img := d.teleport(image)
	m, lines, err := d.mount(control.Mount{PID: os.Getpid()})
	if err != nil {
		t.Fatal(err)
	}
	want := []control.Line{
		{Stage: control.StageManifest},
		{Stage: control.StageTeleporting, Manifest: img.Manifest, Platform: "linux/arm64/v8", Layers: 2, Requests: 3, Bytes: 4000},
		{Stage: control.StageTeleported},
	}
	if diff := cmp.Diff(want, lines); diff != "" {
		t.Errorf("stages (-want +got): %s", diff)
	}
	if !m.Teleported || m.ID == "" || len(m.Dirs) != 2 || filepath.Base(m.Dirs[0]) != "top" || m.Why != "" || m.Layers != 2 || !strings.Contains(string(m.Config), "arm64") {
		t.Errorf("mounted: %+v", m)
	}
	second, _, err := d.mount(control.Mount{PID: os.Getpid()})
	if err != nil || second.ID == m.ID {
		t.Errorf("a second one: %+v, %v", second, err)
	}
	if diff := cmp.Diff([]string{"claim mounted", "claim mounted", "orca held"}, d.disks.have()); diff != "" {
		t.Error(diff)
	}
	if err := d.client.Remove(t.Context(), image); !errors.Is(err, control.ErrInUse) {
		t.Errorf("removing what is mounted: %v", err)
	}
	for _, id := range []string{m.ID, second.ID} {
		if err := d.client.Unmount(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
	if err := d.client.Unmount(t.Context(), m.ID); !errors.Is(err, control.ErrUnknown) {
		t.Errorf("unmounted twice: %v", err)
	}
	list, err := d.client.Images(t.Context())
	if err != nil || len(list) != 1 || list[0].Reference != image || list[0].Size != 2000 {
		t.Errorf("images: %+v, %v", list, err)
	}
	if err := d.client.Remove(t.Context(), img.Manifest.Encoded()[:12]); err != nil {
		t.Error(err)
	}
	if len(d.disks.have()) != 0 {
		t.Errorf("after all: %v", d.disks.have())
	}
	for _, name := range []string{image, "", "sha256:", "abc", "registry.test/other"} {
		if err := d.client.Remove(t.Context(), name); !errors.Is(err, control.ErrUnknown) {
			t.Errorf("removing %q: %v", name, err)
		}
	}
}

func TestOrdinaryMount(t *testing.T) {
	d := newDaemon(t)
	id := d.reg.push(t, "content")
	for _, ordinary := range []bool{false, true} {
		m, lines, err := d.mount(control.Mount{PID: os.Getpid(), Ordinary: ordinary})
		if err != nil {
			t.Fatal(err)
		}
		want := []control.Stage{control.StageManifest, control.StageOrdinary, control.StagePulled}
		if ordinary {
			want = []control.Stage{control.StageManifest, control.StagePulled}
		} else if why := lines[1]; why.Why != "the repository isn't enabled" || why.Reason != mount.NoStreamingArtifact || m.Why != why.Why {
			t.Errorf("why: %+v; %q", why, m.Why)
		}
		if diff := cmp.Diff(want, stages(lines)); diff != "" {
			t.Error(diff)
		}
		if m.Teleported || m.Manifest != id || m.Platform != "linux/amd64" || m.Size == 0 || len(m.Dirs) != 1 {
			t.Fatalf("mounted: %+v", m)
		}
		if content, err := os.ReadFile(filepath.Join(m.Dirs[0], "file")); err != nil || string(content) != "content" {
			t.Errorf("%q, %v", content, err)
		}
		if err := d.client.Unmount(t.Context(), m.ID); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(m.Dirs[0]); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("still mounted: %v", err)
		}
	}
	if err := d.client.Remove(t.Context(), image); err != nil || len(d.store.Images()) != 0 {
		t.Errorf("%v; %d images are left", err, len(d.store.Images()))
	}
}

// What can be teleported by the registry's word, and then can't, is pulled.
func TestTeleportFailsLate(t *testing.T) {
	d := newDaemon(t)
	d.teleport(image)
	d.reg.push(t, "content")
	d.disks.broken = errors.New("the share doesn't answer")
	m, lines, err := d.mount(control.Mount{PID: os.Getpid()})
	if err != nil || m.Teleported || m.Why != "the share doesn't answer" {
		t.Fatalf("mounted: %+v, %v", m, err)
	}
	want := []control.Stage{control.StageManifest, control.StageTeleporting, control.StageOrdinary, control.StagePulled}
	if diff := cmp.Diff(want, stages(lines)); diff != "" {
		t.Error(diff)
	}
	// When the share is back, the image is teleported again, and isn't kept twice.
	d.disks.mu.Lock()
	d.disks.broken = nil
	d.disks.mu.Unlock()
	if err := d.client.Unmount(t.Context(), m.ID); err != nil {
		t.Error(err)
	}
	if m, _, err = d.mount(control.Mount{PullOnly: true}); err != nil || !m.Teleported || m.ID != "" || m.Dirs != nil {
		t.Errorf("pulled: %+v, %v", m, err)
	}
	if n := len(d.store.Images()); n != 0 {
		t.Errorf("%d images are there the ordinary way, too", n)
	}
}

func TestRegistryAway(t *testing.T) {
	for _, teleported := range []bool{true, false} {
		d := newDaemon(t)
		d.reg.push(t, "content")
		if teleported {
			d.teleport(image)
		}
		if m, _, err := d.mount(control.Mount{PullOnly: true}); err != nil || m.Teleported != teleported {
			t.Fatalf("pulled: %+v, %v", m, err)
		}
		d.reg.down.Store(true)
		d.disks.mu.Lock()
		d.disks.err = &mount.NotStreaming{Reason: mount.RegistryUnavailable, Err: errors.New("connection refused")}
		d.disks.mu.Unlock()
		for round := range 2 {
			m, lines, err := d.mount(control.Mount{PID: os.Getpid()})
			if err != nil || m.Teleported != teleported || len(m.Dirs) == 0 {
				t.Fatalf("mounted: %+v, %v", m, err)
			}
			if last := lines[len(lines)-1]; last.Stage != control.StageKept || !strings.Contains(last.Why, "connection refused") {
				t.Errorf("last stage: %+v", last)
			}
			if round == 0 { // and so it is after a restart
				d.stop()
				d.start()
			}
		}
		_, lines, err := d.mount(control.Mount{Reference: "registry.test/team/other", PID: os.Getpid()})
		if err == nil || !strings.Contains(err.Error(), "connection refused") {
			t.Errorf("what isn't here: %v, %+v", err, lines)
		}
	}
}

// A claim survives the daemon, and ends with its process.
func TestClaimEndsWithItsProcess(t *testing.T) {
	d := newDaemon(t)
	d.teleport(image)
	d.reg.push(t, "content")
	sleep := exec.CommandContext(t.Context(), "sleep", "600")
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sleep.Process.Kill(); sleep.Wait() })
	var dirs []string
	for _, ordinary := range []bool{false, true} {
		m, _, err := d.mount(control.Mount{PID: sleep.Process.Pid, Ordinary: ordinary})
		if err != nil {
			t.Fatal(err)
		}
		dirs = m.Dirs
	}
	d.stop()
	d.disks.mu.Lock()
	clear(d.disks.owners) // they aren't remembered
	d.disks.mu.Unlock()
	d.start()
	if n := len(d.server.Claims()); n != 2 || d.server.Idle() {
		t.Fatalf("%d claims after a restart", n)
	}
	if diff := cmp.Diff([]string{"claim mounted"}, d.disks.have()); diff != "" {
		t.Error(diff) // by now the ordinary image is what the reference means
	}
	if content, err := os.ReadFile(filepath.Join(dirs[0], "file")); err != nil || string(content) != "content" {
		t.Errorf("%q, %v", content, err)
	}
	if err := sleep.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	sleep.Wait()
	eventually(t, "the claims end", func() bool { return len(d.server.Claims()) == 0 && d.server.Idle() })
	if _, err := os.Stat(dirs[0]); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("still mounted: %v", err)
	}
	// Also while there's no daemon.
	sleep = exec.CommandContext(t.Context(), "sleep", "600")
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := d.mount(control.Mount{PID: sleep.Process.Pid, Ordinary: true}); err != nil {
		t.Fatal(err)
	}
	d.stop()
	sleep.Process.Kill()
	sleep.Wait()
	d.start()
	eventually(t, "nothing is mounted", func() bool {
		_, err := os.Stat(dirs[0])
		return len(d.server.Claims()) == 0 && errors.Is(err, os.ErrNotExist)
	})
}

// Records that can't be used are in nobody's way.
func TestStrangeRecords(t *testing.T) {
	d := newDaemon(t)
	d.reg.push(t, "content")
	if _, _, err := d.mount(control.Mount{PullOnly: true}); err != nil {
		t.Fatal(err)
	}
	d.stop()
	for name, content := range map[string]string{
		"claims/a.json": "{", "claims/b.json": `{"id":"c"}`, "claims/d.json": `{"id":"d","image":"x","pid":1}`, "claims/.tmp-e": "", "claims/f": "",
		"images/a.json": `{"reference":"x"}`, "images/b.json": strings.Repeat("x", 100_000),
	} {
		if err := os.WriteFile(filepath.Join(d.root, "control", name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d.start()
	if s, err := d.client.Status(t.Context()); err != nil || len(s.Claims) != 0 || len(s.Images) != 1 || s.Daemon.PID != os.Getpid() {
		t.Errorf("status %+v, %v", s, err)
	}
	if left, err := filepath.Glob(filepath.Join(d.root, "control/*/*")); err != nil || len(left) != 1 {
		t.Errorf("left are %v, %v", left, err)
	}
}

func TestBadRequests(t *testing.T) {
	d := newDaemon(t)
	raw := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(d.root, "control.sock"))
	}}}
	defer raw.CloseIdleConnections()
	for _, body := range []string{
		"", "{", "[]", `{"reference":"a/b"}`, `{"reference":"a/b","pid":-1}`, `{"reference":"a/b","pid":"1"}`, `{"reference":"a/b","pullOnly":true,"force":1}`,
		`{"reference":"` + strings.Repeat("x", 100_000) + `","pid":1}`,
	} {
		resp, err := raw.Post("http://teleportd/v1/mounts", "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		answer, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusBadRequest || !strings.Contains(string(answer), `"message"`) {
			t.Errorf("%.40q is answered %d %s, %v", body, resp.StatusCode, answer, err)
		}
	}
	for _, req := range []control.Mount{
		{Reference: "no reference", PullOnly: true}, {Reference: image, PID: 1 << 30}, {Reference: "-", PullOnly: true},
	} {
		if m, _, err := d.mount(req); err == nil {
			t.Errorf("%+v: %+v", req, m)
		}
	}
	if s, err := d.client.Status(t.Context()); err != nil || len(s.Claims) != 0 || len(s.Images) != 0 {
		t.Errorf("status %+v, %v", s, err)
	}
	if _, err := control.NewClient(filepath.Join(d.root, "none")).Status(t.Context()); !errors.Is(err, control.ErrNoDaemon) {
		t.Errorf("no daemon: %v", err)
	}
}

// A reference that means another image by now keeps only that.
func TestTagMoves(t *testing.T) {
	d := newDaemon(t)
	var ids []oci.Digest
	for _, content := range []string{"one", "two"} {
		ids = append(ids, d.reg.push(t, content))
		if _, _, err := d.mount(control.Mount{PullOnly: true}); err != nil {
			t.Fatal(err)
		}
	}
	images := d.store.Images()
	if len(images) != 1 || images[0].ID != ids[1] {
		t.Errorf("images %+v", images)
	}
}
