package fuse_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/node/plane"
	"sluice/internal/node/plane/fuse"
	"sluice/internal/node/plane/planetest"
)

// What happens to nodes besides kills of the daemon, which TestKill does.

func waitUntil(t *testing.T, bound time.Duration, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(bound); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("after %v still not: %s", bound, what)
		}
	}
}

func detach(t *testing.T, p *fuse.Plane, dirs ...string) {
	t.Helper()
	for _, dir := range dirs {
		if err := p.Detach(t.Context(), dir); err != nil {
			t.Error(err)
		}
	}
}

// TestHolderKilled kills the holder alone, again and again: the daemon replaces
// it, no reader notices, and the last one is as good as the first.
func TestHolderKilled(t *testing.T) {
	needRoot(t)
	spec, files := planetest.KillImage(t, killDeviceSize)
	spec.Options = daemonOptions{}.encode(t)
	d := planetest.StartDaemon(t, spec)
	defer func() { d.Kill(); spec.Clean(t, roles()) }()
	d.Ready(t)
	readers := planetest.StartReaders(t, spec.Image.Dir, files)
	for range 5 {
		old := holderPID(t, spec.Dir)
		syscall.Kill(old, syscall.SIGKILL)
		waitUntil(t, time.Minute, "there's another holder", func() bool {
			pid, err := planetest.HolderPID(spec.Dir)
			return err == nil && pid != old && hasFUSE(pid)
		})
	}
	d.Kill()
	d = planetest.StartDaemon(t, spec)
	if s := d.Ready(t); !s.Resumed {
		t.Errorf("the daemon did not resume: %+v", s)
	}
	if r := readers.Stop(t); r.Wrong > 0 || r.Refused > 0 || r.Good == 0 {
		t.Errorf("%d reads were good, %d gave wrong bytes, %d failed; the first: %v", r.Good, r.Wrong, r.Refused, r.First)
	}
}

// TestBothKilled: a read that waits fails at once when nobody is left.
func TestBothKilled(t *testing.T) {
	needRoot(t)
	spec, img := smallImage(t, daemonOptions{})
	spec.MaxDelay = time.Hour
	d := planetest.StartDaemon(t, spec)
	defer func() { d.Kill(); spec.Clean(t, roles()) }()
	d.Ready(t)
	read := make(chan error, 1)
	go func() { read <- img.Files[0].Verify(spec.Image.Dir) }()
	holder := holderPID(t, spec.Dir)
	time.Sleep(50 * time.Millisecond) // the read may be under way by then, or come too late: both must fail
	stop(t, d)                        // or it starts another holder
	syscall.Kill(holder, syscall.SIGKILL)
	d.Kill()
	select {
	case err := <-read:
		if err == nil {
			t.Error("a read without anybody to answer it went well")
		}
	case <-time.After(time.Minute):
		t.Error("the read hangs")
	}
	spec.MaxDelay = 0
	d = planetest.StartDaemon(t, spec)
	if s := d.Ready(t); s.Resumed || len(s.Stale) != 1 {
		t.Errorf("start: %+v", s)
	}
	verify(t, img, spec.Image.Dir)
}

// smallImage makes a small image and the daemon that serves it.
func smallImage(t *testing.T, o daemonOptions) (planetest.DaemonSpec, planetest.Image) {
	img := planetest.Build(t, []planetest.Dev{planetest.NewDev(1, 4<<20)})
	return planetest.DaemonSpec{
		Dir: t.TempDir(), Options: o.encode(t),
		Image: planetest.DaemonImage{Dir: t.TempDir(), Metadata: img.Plane.Metadata, Seeds: []uint64{1}, Sizes: []int64{4 << 20}},
	}, img
}

// stop stops a daemon, which goes on with SIGCONT.
func stop(t *testing.T, d *planetest.Daemon) {
	t.Helper()
	d.Process().Signal(syscall.SIGSTOP)
	waitUntil(t, time.Minute, "the daemon is stopped", func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", d.Process().Pid))
		return err == nil && strings.Contains(string(stat), ") T ")
	})
}

// shortGrace is one that tests can wait for, and after which a process that is
// merely slow isn't taken for one that is stuck.
const shortGrace = 3 * time.Second

// TestStopped: readers wait for a daemon that is stopped, but not for ever; when
// it goes on all is well again.
func TestStopped(t *testing.T) {
	needRoot(t)
	spec, img := smallImage(t, daemonOptions{OrphanGrace: shortGrace})
	dir := spec.Image.Dir
	d := planetest.StartDaemon(t, spec)
	defer func() { d.Kill(); spec.Clean(t, roles()) }()
	d.Ready(t)
	stop(t, d)
	read := make(chan error, 1)
	go func() { read <- img.Files[0].Verify(dir) }()
	select {
	case err := <-read:
		if !errors.Is(err, unix.EIO) {
			t.Errorf("read with a stopped daemon: got %v, want EIO", err)
		}
	case <-time.After(time.Minute):
		t.Error("read with a stopped daemon hangs")
		b, _ := os.ReadFile(filepath.Join(spec.Dir, "holder.log"))
		t.Logf("%s", b)
	}
	d.Process().Signal(syscall.SIGCONT)
	waitUntil(t, time.Minute, "reads go well again", func() bool { return img.Files[0].Verify(dir) == nil })
	verify(t, img, dir)
}

// TestStoppedForAWhile: while readers are patient, nobody notices.
func TestStoppedForAWhile(t *testing.T) {
	needRoot(t)
	spec, img := smallImage(t, daemonOptions{})
	dir := spec.Image.Dir
	d := planetest.StartDaemon(t, spec)
	defer func() { d.Kill(); spec.Clean(t, roles()) }()
	d.Ready(t)
	stop(t, d)
	read := make(chan error, 1)
	go func() { read <- img.Files[0].Verify(dir) }()
	time.Sleep(200 * time.Millisecond)
	d.Process().Signal(syscall.SIGCONT)
	if err := <-read; err != nil {
		t.Errorf("read across a short stop: %v", err)
	}
	verify(t, img, dir)
}

// TestAborted: somebody aborts the connection in /sys/fs/fuse/connections.
func TestAborted(t *testing.T) {
	needRoot(t)
	ctl := t.TempDir()
	if err := unix.Mount("fusectl", ctl, "fusectl", 0, ""); err != nil {
		t.Skip("no fusectl: ", err)
	}
	defer plane.Unmount(ctl, true)
	dir, at := t.TempDir(), t.TempDir()
	dev := planetest.NewDev(1, 1<<20)
	img := planetest.Build(t, []planetest.Dev{dev})
	p := open(t, fuse.Options{Dir: dir})
	attachAll(t, p, map[string]planetest.Image{at: img})
	release := dev.Content.Hold()
	defer release()
	read := make(chan error, 1)
	go func() { read <- img.Files[0].Verify(at) }()
	waitUntil(t, time.Minute, "the read is under way", func() bool { return dev.Content.Active.Load() > 0 })
	m, err := plane.MountAt(filepath.Join(dir, "blobs"))
	if err != nil || m == nil {
		t.Fatal(m, err)
	}
	if err := os.WriteFile(filepath.Join(ctl, strconv.Itoa(m.Minor), "abort"), []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	if err := <-read; err == nil {
		t.Error("a read went well across the abort")
	}
	select {
	case <-p.Lost():
	case <-time.After(time.Minute):
		t.Fatal("the plane doesn't notice")
	}
	if err := p.Attach(t.Context(), img.Plane, t.TempDir()); !errors.Is(err, plane.ErrStale) {
		t.Errorf("attach without a connection: got %v, want %v", err, plane.ErrStale)
	}
	release()
	p.Close()
	p = open(t, fuse.Options{Dir: dir})
	if s := p.Start(); s.Resumed || len(s.Stale) != 1 {
		t.Errorf("start: %+v", s)
	}
	if err := p.Attach(t.Context(), img.Plane, at); err != nil {
		t.Fatal(err)
	}
	verify(t, img, at)
	detach(t, p, at)
}

// TestBlobsUnmounted: images keep the FUSE file system when somebody unmounts
// it, and it's shown again when it's needed: by an Attach, and by a restart.
func TestBlobsUnmounted(t *testing.T) {
	needRoot(t)
	dir, at, at2 := t.TempDir(), t.TempDir(), t.TempDir()
	img, other := planetest.Build(t, []planetest.Dev{planetest.NewDev(1, 1<<20)}), planetest.Build(t, []planetest.Dev{planetest.NewDev(2, 1<<20)})
	p := open(t, fuse.Options{Dir: dir})
	attachAll(t, p, map[string]planetest.Image{at: img})
	takeAway := func() {
		t.Helper()
		if err := plane.Unmount(filepath.Join(dir, "blobs"), true); err != nil {
			t.Fatal(err)
		}
	}
	takeAway()
	verify(t, img, at)
	attachAll(t, p, map[string]planetest.Image{at2: other})
	verify(t, other, at2)
	takeAway()
	p.Close()
	p = open(t, fuse.Options{Dir: dir})
	if s := p.Start(); !s.Resumed || len(s.Images) != 2 {
		t.Fatalf("start: %+v", s)
	}
	for dir, img := range map[string]planetest.Image{at: img, at2: other} {
		if err := p.Adopt(t.Context(), img.Plane, dir); err != nil {
			t.Fatal(err)
		}
		planetest.DropCaches(t, img, dir)
		verify(t, img, dir)
	}
	detach(t, p, at, at2)
}

// TestStateLost: without what says which node is which device, what is mounted
// is of no use, and is replaced.
func TestStateLost(t *testing.T) {
	for name, harm := range map[string]func(file string) error{
		"removed": os.Remove,
		"cut":     func(file string) error { return os.Truncate(file, 20) },
		"garbage": func(file string) error { return os.WriteFile(file, []byte("\x00\xff{{{"), 0o600) },
		"of a newer version": func(file string) error {
			return os.WriteFile(file, []byte(`{"version":99,"epoch":"x"}`), 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			needRoot(t)
			dir, at := t.TempDir(), t.TempDir()
			img := planetest.Build(t, []planetest.Dev{planetest.NewDev(1, 1<<20)})
			p := open(t, fuse.Options{Dir: dir})
			attachAll(t, p, map[string]planetest.Image{at: img})
			p.Close()
			if err := harm(filepath.Join(dir, "state.json")); err != nil {
				t.Fatal(err)
			}
			p = open(t, fuse.Options{Dir: dir})
			if s := p.Start(); s.Resumed || s.Reason == "" {
				t.Errorf("start: %+v", s)
			}
			if err := p.Adopt(t.Context(), img.Plane, at); !errors.Is(err, plane.ErrStale) {
				t.Errorf("adopt: got %v, want %v", err, plane.ErrStale)
			}
			if err := p.Attach(t.Context(), img.Plane, at); err != nil {
				t.Fatal(err)
			}
			verify(t, img, at)
			detach(t, p, at)
		})
	}
}

// TestFirstFormat: a daemon goes on with what the first version wrote.
func TestFirstFormat(t *testing.T) {
	needRoot(t)
	dir, at := t.TempDir(), t.TempDir()
	img := planetest.Build(t, []planetest.Dev{planetest.NewDev(1, 1<<20)})
	p := open(t, fuse.Options{Dir: dir})
	attachAll(t, p, map[string]planetest.Image{at: img})
	p.Close()
	file := filepath.Join(dir, "state.json")
	now, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	_, epoch, _ := strings.Cut(string(now), `"epoch":"`)
	epoch, _, _ = strings.Cut(epoch, `"`)
	first := fmt.Sprintf(`{"version":1,"epoch":%q,"next_node":4,"devices":[{"name":"test-0000000000000001","node":3,"size":1048576}],`+
		`"images":{%q:{"epoch":%q,"devices":["test-0000000000000001"]}}}`, epoch, at, epoch)
	if err := os.WriteFile(file, []byte(first), 0o600); err != nil {
		t.Fatal(err)
	}
	p = open(t, fuse.Options{Dir: dir})
	if s := p.Start(); !s.Resumed {
		t.Fatalf("start: %+v", s)
	}
	if err := p.Adopt(t.Context(), img.Plane, at); err != nil {
		t.Fatal(err)
	}
	verify(t, img, at)
	detach(t, p, at)
}

// TestNoDescriptors: without descriptors nothing can be attached; what is
// attached goes on, and later all is well.
func TestNoDescriptors(t *testing.T) {
	needRoot(t)
	at, at2 := t.TempDir(), t.TempDir()
	img, other := planetest.Build(t, []planetest.Dev{planetest.NewDev(1, 1<<20)}), planetest.Build(t, []planetest.Dev{planetest.NewDev(2, 1<<20)})
	p := open(t, fuse.Options{})
	attachAll(t, p, map[string]planetest.Image{at: img})
	reader, err := os.Open(filepath.Join(at, img.Files[0].Name))
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	none := limit
	none.Cur = 3
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	aerr := p.Attach(t.Context(), other.Plane, at2)
	_, rerr := reader.Read(make([]byte, 1))
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(aerr, unix.EMFILE) {
		t.Errorf("attach: got %v, want EMFILE", aerr)
	}
	if rerr != nil {
		t.Errorf("read: %v", rerr)
	}
	attachAll(t, p, map[string]planetest.Image{at2: other})
	verify(t, img, at)
	verify(t, other, at2)
	reader.Close()
	detach(t, p, at, at2)
}

// TestManyImages: a hundred of them survive a restart.
func TestManyImages(t *testing.T) {
	for _, mode := range plane.Modes() {
		t.Run(string(mode), func(t *testing.T) {
			needRoot(t)
			dir := t.TempDir()
			shared := planetest.NewDev(1, 20_480)
			p := open(t, fuse.Options{Dir: dir, Mode: mode})
			images := map[string]planetest.Image{}
			for i := range 100 {
				images[t.TempDir()] = planetest.Build(t, []planetest.Dev{shared, planetest.NewDev(uint64(100+i), 4096)})
			}
			attachAll(t, p, images)
			p.Close()
			p = open(t, fuse.Options{Dir: dir, Mode: mode})
			if s := p.Start(); !s.Resumed || len(s.Images) != 100 {
				t.Errorf("start: %+v", s)
			}
			for at, img := range images {
				if err := p.Adopt(t.Context(), img.Plane, at); err != nil {
					t.Fatal(err)
				}
			}
			p.Ready()
			for at, img := range images {
				verify(t, img, at)
				detach(t, p, at)
			}
		})
	}
}

// TestBystander: who looks around in the FUSE mount of a dead daemon, as rm -r
// does, doesn't wait as long as readers of images, who still get their bytes.
func TestBystander(t *testing.T) {
	needRoot(t)
	dir, at := t.TempDir(), t.TempDir()
	img := planetest.Build(t, []planetest.Dev{planetest.NewDev(1, 1<<20)})
	p := open(t, fuse.Options{Dir: dir})
	attachAll(t, p, map[string]planetest.Image{at: img})
	p.Close()
	read := make(chan error, 1)
	go func() { read <- img.Files[0].Verify(at) }()
	removed := make(chan error, 1)
	go func() { removed <- os.RemoveAll(filepath.Join(dir, "blobs")) }()
	select {
	case err := <-removed:
		if err == nil {
			t.Error("a mount point was removed")
		}
	case err := <-read:
		t.Errorf("the read did not wait for a daemon: %v", err)
	case <-time.After(time.Minute):
		t.Error("who looks around waits, too")
	}
	p = open(t, fuse.Options{Dir: dir})
	if !p.Start().Resumed {
		t.Fatalf("start: %+v", p.Start())
	}
	if err := p.Adopt(t.Context(), img.Plane, at); err != nil {
		t.Fatal(err)
	}
	if err := <-read; err != nil {
		t.Errorf("read across the restart: %v", err)
	}
	verify(t, img, at)
	detach(t, p, at)
}

// TestHolderEnds: a holder that no daemon comes for, and no image needs, ends
// after the grace and takes the FUSE mount with it.
func TestHolderEnds(t *testing.T) {
	needRoot(t)
	dir, at := t.TempDir(), t.TempDir()
	img := planetest.Build(t, []planetest.Dev{planetest.NewDev(1, 1<<20)})
	p := open(t, fuse.Options{Dir: dir, OrphanGrace: shortGrace})
	attachAll(t, p, map[string]planetest.Image{at: img})
	p.Close()
	if err := img.Files[0].Verify(at); !errors.Is(err, unix.EIO) {
		t.Errorf("read after the grace: got %v, want EIO", err)
	}
	if _, err := planetest.HolderPID(dir); err != nil {
		t.Errorf("the holder of an image that is mounted has ended: %v", err)
	}
	if err := plane.Unmount(at, false); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, time.Minute, "the holder ends", func() bool {
		_, err := planetest.HolderPID(dir)
		return err != nil
	})
	if m, err := plane.MountAt(filepath.Join(dir, "blobs")); m != nil || err != nil {
		t.Errorf("the FUSE mount is still there: %v, %v", m, err)
	}
	if p = open(t, fuse.Options{Dir: dir}); p.Start().Resumed {
		t.Errorf("start: %+v", p.Start())
	}
}

// TestHostileClients: whoever can open the holder's socket can't make it forget
// what it holds, but by the messages for it.
func TestHostileClients(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	p := open(t, fuse.Options{Dir: dir})
	first := holderPID(t, dir)
	t.Chdir(dir) // a socket's name must be short
	dial := func() *net.UnixConn {
		c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: "holder.sock", Net: "unixpacket"})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	fd := int(null.Fd())
	for _, m := range []struct {
		text string
		fds  []int
	}{
		{"garbage", nil},
		{`{"op":"no such"}`, nil},
		{`{"op":"put"}`, nil},
		{`{"op":"put","session":{}}`, nil},
		{`{"op":"put","session":"x"}`, []int{fd}},
		{`{"op":"put","session":{"orphan_grace":1}}`, []int{fd, fd}},
		{`{"op":"alive"}`, []int{fd}},
		{strings.Repeat("x", 60_000), []int{fd}},
	} {
		c := dial()
		var oob []byte
		if m.fds != nil {
			oob = unix.UnixRights(m.fds...)
		}
		if _, _, err := c.WriteMsgUnix([]byte(m.text), oob, nil); err != nil {
			t.Errorf("%.40s: %v", m.text, err)
		}
		c.SetReadDeadline(time.Now().Add(20 * time.Second))
		if n, err := c.Read(make([]byte, 100)); err == nil && n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%.40s: the holder answers %d bytes, %v; it should hang up", m.text, n, err)
		}
		c.Close()
	}
	for range 30 { // who says nothing has no place for long
		defer dial().Close()
	}
	p.Close()
	p = open(t, fuse.Options{Dir: dir})
	if !p.Start().Resumed || holderPID(t, dir) != first {
		t.Errorf("start: %+v", p.Start())
	}
	if err := planetest.Shutdown(p, dir); err != nil {
		t.Error(err)
	}
}

// TestOtherNamespace: a process with a copy of our mounts, as any gets that is
// started with a mount namespace of its own, keeps files and loop devices of an
// image in use. That is in nobody's way.
func TestOtherNamespace(t *testing.T) {
	for _, mode := range plane.Modes() {
		t.Run(string(mode), func(t *testing.T) {
			needRoot(t)
			at := t.TempDir()
			dev := planetest.NewDev(1, 1<<20)
			img := planetest.Build(t, []planetest.Dev{dev})
			p := open(t, fuse.Options{Mode: mode})
			attachAll(t, p, map[string]planetest.Image{at: img})
			// All but ours it lets go at once: packages that are tested at the same
			// time could not end their planes meanwhile.
			other := exec.Command("sh", "-c", `
				awk '$5 ~ "^/tmp/" && / - (fuse\.sluice|erofs|overlay) / {print $5}' /proc/self/mountinfo | while read -r m; do
					case $m in "$1"/*) ;; *) umount -l "$m" ;; esac
				done
				exec sleep 1000`, "sh", filepath.Dir(at))
			other.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
			if err := other.Start(); err != nil {
				t.Skip("no mount namespaces: ", err)
			}
			end := func() { other.Process.Kill(); other.Wait() }
			defer end()
			there := fmt.Sprintf("/proc/%d/root%s", other.Process.Pid, at)
			verify(t, img, there)
			detach(t, p, at)
			planetest.DropCaches(t, img, there)
			reads := dev.Content.Reads.Load()
			// The FUSE mount may have cached it.
			if err := img.Files[0].Verify(there); err != nil && !errors.Is(err, unix.EIO) {
				t.Errorf("read of a detached image: got %v, want EIO or its bytes", err)
			}
			if n := dev.Content.Reads.Load(); n != reads {
				t.Errorf("content of a detached image was asked for %d times", n-reads)
			}
			attachAll(t, p, map[string]planetest.Image{at: img})
			verify(t, img, at)
			detach(t, p, at)
			if err := p.Shutdown(t.Context()); !errors.Is(err, plane.ErrBusy) {
				t.Errorf("shutdown with a copy elsewhere: got %v, want %v", err, plane.ErrBusy)
			}
			end() // then it works, says the end of the test
		})
	}
}
