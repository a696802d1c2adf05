package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/node/mount"
	"sluice/internal/node/mount/control"
	"sluice/internal/node/serve"
)

// TestNodeDisk is an operator who looks where the disk went, and takes it back.
func TestNodeDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("the node daemon mounts")
	}
	addr, _ := startRegistry(t, "--data", filepath.Join(t.TempDir(), "data"))
	pushShell(t, addr, "shell")
	image := addr + "/shell:v1"
	root, dir := t.TempDir(), t.TempDir()
	sockets := filepath.Join(root, "run")
	flags := []string{"--root", filepath.Join(root, "state"), "--run", sockets}
	daemon := exec.Command(os.Args[0], append([]string{"node", "--cache-free", "0", "--cache-quota", "1GiB"}, flags...)...)
	daemon.Env = append(os.Environ(), programVariable+"=1")
	var log bytes.Buffer
	daemon.Stderr = &log
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		endDaemon(t, sockets, dir)
		daemon.Wait() // killed
		if t.Failed() {
			t.Logf("the daemon's log:\n%s", &log)
		}
	})
	must := func(args ...string) string {
		t.Helper()
		out, stderr, code := runProgram(t, append(args, flags...)...)
		if code != 0 {
			t.Fatalf("sluice %s: exit code %d: %s", strings.Join(args, " "), code, stderr)
		}
		return out
	}
	du := func() (u mount.DiskUsage) {
		t.Helper()
		if err := json.Unmarshal([]byte(must("node", "du", "-o", "json")), &u); err != nil {
			t.Fatal(err)
		}
		return u
	}
	prune := func(args ...string) (p mount.Pruned) {
		t.Helper()
		if err := json.Unmarshal([]byte(must(append([]string{"node", "prune", "-o", "json"}, args...)...)), &p); err != nil {
			t.Fatal(err)
		}
		return p
	}
	waitFor := func(what string, ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(50 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("never %s", what)
			}
		}
	}
	client := control.NewClient(serve.Control(sockets))
	waitFor("answers", func() bool { _, err := client.Status(t.Context()); return err == nil })

	must("mount", image, dir)
	waitFor("complete", func() bool { u := du(); return len(u.Images) == 1 && u.Images[0].Complete })
	u := du()
	i := u.Images[0]
	if !i.InUse || i.Pinned || i.Shared != 0 || i.Own != i.Here || i.Here < i.Size/2 || u.Unneeded != 0 || u.High != 1<<30 || u.Cache < i.Size/2 || u.DiskFree == 0 {
		t.Errorf("usage %+v", u)
	}
	if p := prune("--all"); len(p.Removed) != 0 || len(p.Kept) != u.Layers || p.Kept[0].Why != "in use" || !cmp.Equal(p.Kept[0].Images, []string{image}) {
		t.Errorf("pruning what is in use: %+v", p)
	}
	if _, err := os.ReadFile(filepath.Join(dir, "bin/cat")); err != nil {
		t.Error(err)
	}

	must("umount", dir)
	must("node", "pin", image)
	if p := prune("--all"); len(p.Removed) != 0 || p.Kept[0].Why != "pinned" {
		t.Errorf("pruning what is pinned: %+v", p)
	}
	if u := du(); !u.Images[0].Pinned || u.Images[0].InUse {
		t.Errorf("usage of a pinned image: %+v", u)
	}
	must("node", "unpin", image)
	if _, stderr, code := runProgram(t, append([]string{"node", "pin", "no.such/image:1"}, flags...)...); code == 0 || !strings.Contains(stderr, "not an image of this node") {
		t.Errorf("pinning nonsense: exit code %d: %s", code, stderr)
	}
	for _, c := range []struct {
		args []string
		why  string
	}{
		{nil, "an image has it"},
		{[]string{"--all", "--older-than", "1h"}, "used recently"},
		{[]string{"--all", "--keep", "1GiB"}, "there is room"},
	} {
		if p := prune(c.args...); len(p.Removed) != 0 || p.Kept[0].Why != c.why {
			t.Errorf("prune %v: %+v, want all kept because %s", c.args, p, c.why)
		}
	}
	if p := prune("--all", "--dry-run"); p.Freed < i.Size/2 || du().Cache < i.Size/2 {
		t.Errorf("a dry run says %+v, leaves %+v", p, du())
	}
	t.Log("\n" + must("node", "prune", "--all", "--dry-run") + must("node", "du"))
	if out := must("node", "prune", "--all"); !strings.Contains(out, "FREED") || !strings.Contains(out, image) {
		t.Errorf("prune says\n%s", out)
	}
	if u := du(); u.Cache != 0 || u.Images[0].Complete || u.Images[0].Here == 0 {
		t.Errorf("usage after pruning: %+v", u)
	}
	if out := must("node", "du"); !strings.Contains(out, image) || !strings.Contains(out, "partial") {
		t.Errorf("du says\n%s", out)
	}

	// The image is still usable.
	must("mount", image, dir)
	want, err := os.ReadFile("/bin/cat")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "bin/cat")); err != nil || !bytes.Equal(got, want) {
		t.Errorf("after pruning, the mounted file differs, %v", err)
	}
}

// TestNodeDiskBadInput needs no daemon: it's refused before one is asked.
func TestNodeDiskBadInput(t *testing.T) {
	nowhere := t.TempDir()
	for _, c := range []struct {
		args, says string
	}{
		{"du --output yaml", "use table or json"},
		{"du now", "du"},
		{"prune --output yaml", "use table or json"},
		{"prune --keep 20%", "--keep takes bytes"},
		{"prune --keep much", "keep"},
		{"prune --keep -1", "keep"},
		{"prune --older-than -1h", "must not be negative"},
		{"prune --older-than 7days", "older-than"},
		{"pin", "IMAGE"},
		{"pin a b", "pin"},
		{"unpin", "IMAGE"},
		{"du", "is sluice node running?"},
		{"prune", "is sluice node running?"},
		{"pin image", "is sluice node running?"},
	} {
		args := append([]string{"node"}, strings.Fields(c.args)...)
		out, stderr, code := runProgram(t, append(args, "--root", nowhere)...)
		if code == 0 || out != "" || !strings.Contains(stderr, c.says) {
			t.Errorf("sluice node %s: exit code %d, prints %q and %q, want %q", c.args, code, out, stderr, c.says)
		}
	}
}
