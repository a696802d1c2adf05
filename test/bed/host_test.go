package bed

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A host has processes, mounts and a network of its own, and leaves none.
func TestHost(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a host needs root")
	}
	src, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	outside, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	other := t.TempDir()
	if err := unix.Mount("tmpfs", other, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(other, unix.MNT_DETACH)
	h, err := StartHost(ctx, src, filepath.Join(t.TempDir(), "host"), "bed-host")
	if err != nil {
		t.Fatal(err)
	}
	stopped := false
	defer func() {
		if !stopped {
			h.Stop()
		}
	}()
	out, err := h.Output(ctx, "sh", "-euc", `hostname; cat /proc/1/comm /proc/sys/vm/overcommit_memory; echo ours >/etc/bed-host; ls /run; ip -o addr show dev node0`)
	if err != nil {
		t.Fatal(err)
	}
	if want := "bed-host\nhostinit\n1\n"; !strings.HasPrefix(string(out), want) || !strings.Contains(string(out), hostIP) {
		t.Errorf("inside it is\n%swant\n%s and the address %s", out, want, hostIP)
	}
	if now, err := os.Readlink("/proc/self/ns/mnt"); err != nil || now != outside {
		t.Errorf("this process is in mount namespace %s, was in %s: %v", now, outside, err)
	}
	if out, err := h.Output(ctx, "cat", "/proc/self/mountinfo"); err != nil || strings.Contains(string(out), " "+other+" ") {
		t.Errorf("what another test has mounted is mounted on the host, too: %v\n%s", err, out)
	}
	if _, err := os.Stat("/etc/bed-host"); err == nil {
		t.Error("a file that was written to /etc is this machine's, too")
	}
	if b, err := os.ReadFile(h.Path("/etc/bed-host")); err != nil || string(b) != "ours\n" {
		t.Errorf("a file of the host, read from outside: %q, %v", b, err)
	}

	ln, err := h.Listen(hostIP + ":80")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := h.Dial(ctx, "tcp", hostIP+":80")
	if err != nil {
		t.Fatal(err)
	}
	c.Close()

	// A daemon whose parent has ended is the host's, and ends with it.
	if err := h.Run(ctx, "sh", "-c", "sleep 100000 >/dev/null 2>&1 & echo $! >/run/pid"); err != nil {
		t.Fatal(err)
	}
	p, err := h.Start("child", nil, "sleep", "100000")
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Run(ctx, "sh", "-c", `kill "$(cat /run/pid)"; while [ -e "/proc/$(cat /run/pid)" ]; do sleep 0.01; done`); err != nil {
		t.Error("nobody waits for orphans:", err)
	}
	if p.Ended() {
		t.Error("a process ended before its host")
	}
	stopped = true
	h.Stop()
	select {
	case <-p.done:
	case <-time.After(patience):
		t.Error("a process outlived its host")
	}
}
