package bed

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Host looks from inside like a machine of its own: PID 1 is ours, there is a
// network of its own, /run, /var/log, /opt and /var/lib, which is a disk of its
// own, are empty at first, what is written to /etc and /usr/local is not written
// to this machine, and mounts aren't seen outside. All else, such as /tmp and the
// kernel's devices and cgroups, is this machine's. When it ends, so does all that
// runs on it.
type Host struct {
	Dir  string // of its log files and of what is written below /etc, /var and so on
	Name string

	init   *Process
	work   chan func() // done on the thread that is on the host
	thread sync.WaitGroup
}

// hostIP is the host's only address besides loopback. It is on a bridge without
// ports, so that it isn't loopback, which kubelet refuses.
const hostIP = "10.77.0.2"

// hostDisk is the size of the host's own disk, in bytes. It is a sparse file.
const hostDisk = 6 << 30

// LetMountsGo is for the shell, in a new mount namespace whose mounts are nobody
// else's: of what tests have mounted on this machine it lets its copies go. They could
// not end their FUSE mounts, nor have their loop devices back, as long as one is there.
const LetMountsGo = `awk '$5 ~ "^/tmp/" { print $5 }' /proc/self/mountinfo | tac | while read -r at; do umount -l "$at"; done
`

// hostSetup makes a new mount, network and UTS namespace a host. $1 is the
// host's directory, $2 its name, $3 its address, $4 the size of the disk that
// /var/lib is.
const hostSetup = `
mount --make-rprivate /
mount --make-rshared /
mount -t proc proc /proc
` + LetMountsGo + `hostname "$2"
cd "$1"
mkdir -p upper/etc work/etc upper/usr-local work/usr-local var/log opt proc-sys
printf '127.0.0.1 localhost\n%s %s\n' "$3" "$2" >upper/etc/hosts
: >upper/etc/resolv.conf
mount -t overlay -o lowerdir=/etc,upperdir=upper/etc,workdir=work/etc overlay /etc
mount -t overlay -o lowerdir=/usr/local,upperdir=upper/usr-local,workdir=work/usr-local overlay /usr/local
mount -t tmpfs -o mode=755 tmpfs /run
truncate -s "$4" disk
mkfs.ext4 -q -m 0 disk
mount -o loop disk /var/lib
mount --bind var/log /var/log
mount --bind opt /opt
while read -r name value; do
	echo "$value" >"proc-sys/${name##*/}"
	mount --bind "proc-sys/${name##*/}" "/proc/sys/$name"
done <<EOF
vm/overcommit_memory 1
vm/panic_on_oom 0
kernel/panic 10
kernel/panic_on_oops 1
EOF
echo 1 >/proc/sys/net/ipv4/ip_forward
ip link set lo up
ip link add node0 type bridge
ip addr add "$3/24" dev node0
ip link set node0 up
ip route add default dev node0
`

// StartHost starts a host whose files lie in dir, which must not lie on
// overlayfs. src is the checkout.
func StartHost(ctx context.Context, src, dir, name string) (*Host, error) {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, err
	}
	bin := filepath.Join(dir, "hostinit")
	build := exec.CommandContext(ctx, "go", "build", "-o", bin, "./bed/hostinit")
	build.Dir, build.Env = filepath.Join(src, "test"), append(os.Environ(), "CGO_ENABLED=0")
	if err := run(build); err != nil {
		return nil, err
	}
	h := &Host{Dir: dir, Name: name, work: make(chan func())}
	entered := make(chan error)
	h.thread.Go(func() { h.live(bin, entered) })
	if err := <-entered; err != nil {
		h.thread.Wait()
		return nil, err
	}
	if err := h.Run(ctx, "sh", "-euc", hostSetup, "sh", dir, name, hostIP, strconv.Itoa(hostDisk)); err != nil {
		h.Stop()
		return nil, err
	}
	return h, nil
}

// live starts the host's first process and then does what there is to do on
// the host, on a thread of its own that ends with it: a thread can't come back
// from another mount namespace, and processes are killed when the thread ends
// that started them.
func (h *Host) live(bin string, entered chan<- error) {
	runtime.LockOSThread() // and never unlocked
	if unix.Gettid() == os.Getpid() {
		// The main thread never ends, and /proc/self goes by its namespaces.
		// While it's held here, another one has to do.
		defer runtime.UnlockOSThread()
		var other sync.WaitGroup
		other.Go(func() { h.live(bin, entered) })
		other.Wait()
		return
	}
	cmd := exec.Command(bin)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
	}
	var err error
	if h.init, err = start(h.Dir, "init", cmd); err == nil {
		if err = enter(h.init.Pid(), "pid", "net", "uts", "ipc", "mnt"); err != nil {
			h.init.Kill()
		}
	}
	entered <- err
	if err != nil {
		return
	}
	for f := range h.work {
		f()
	}
}

// enter moves the calling thread into namespaces of a process. Of a PID
// namespace only children of the thread are a part.
func enter(pid int, namespaces ...string) error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil { // or the mount namespace can't be changed
		return err
	}
	var errs []error
	var files []*os.File
	for _, name := range namespaces { // all, before /proc is another one
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", pid, name))
		if err != nil {
			return errors.Join(append(errs, err)...)
		}
		defer f.Close()
		files = append(files, f)
	}
	for _, f := range files {
		if err := unix.Setns(int(f.Fd()), 0); err != nil {
			errs = append(errs, fmt.Errorf("entering %s: %w", f.Name(), err))
		}
	}
	return errors.Join(errs...)
}

// do calls f on the host's thread and waits for it.
func (h *Host) do(f func()) {
	done := make(chan struct{})
	h.work <- func() {
		defer close(done)
		f()
	}
	<-done
}

// Start is bed's Start for a server that runs on the host and logs to Dir.
func (h *Host) Start(name string, env []string, path string, args ...string) (p *Process, err error) {
	cmd := exec.Command(path, args...)
	cmd.Env = append(os.Environ(), env...)
	h.do(func() { p, err = launch(h.Dir, name, cmd) }) // it ends with the first process
	return p, err
}

// Output runs a command on the host and returns what it printed to standard
// output; an error has what it printed to standard error.
func (h *Host) Output(ctx context.Context, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var out, problems buffer
	cmd.Stdout, cmd.Stderr = &out, &problems
	cmd.WaitDelay = time.Second // for what it left running with its output
	var err error
	h.do(func() { err = cmd.Start() })
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return out.bytes(), fmt.Errorf("%s %q: %w\n%s", name, args, err, tail(slices.Concat(problems.bytes(), out.bytes()), 4<<10))
	}
	return out.bytes(), nil
}

// buffer collects what is written to it, also by what a command left running.
type buffer struct {
	mu  sync.Mutex
	buf []byte // guarded by mu
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.buf = append(b.buf, p...)
	return len(p), nil
}

func (b *buffer) bytes() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.buf)
}

// Run is Output for commands of which only the end matters.
func (h *Host) Run(ctx context.Context, name string, args ...string) error {
	_, err := h.Output(ctx, name, args...)
	return err
}

// Path is how this machine gets at a file of the host.
func (h *Host) Path(name string) string {
	return filepath.Join(fmt.Sprintf("/proc/%d/root", h.init.Pid()), name)
}

// visit calls f on a thread of its own that uses the host's network.
func (h *Host) visit(f func() error) error {
	result := make(chan error)
	go func() { // ends with the call
		runtime.LockOSThread() // and never unlocked, so the thread ends
		err := enter(h.init.Pid(), "net")
		if err == nil {
			err = f()
		}
		result <- err
	}()
	return <-result
}

// Dial connects to an address, as IP:PORT, in the host's network.
func (h *Host) Dial(ctx context.Context, network, address string) (c net.Conn, err error) {
	err = h.visit(func() error {
		var d net.Dialer
		c, err = d.DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// Listen listens at an address, as IP:PORT, of the host's network.
func (h *Host) Listen(address string) (ln net.Listener, err error) {
	err = h.visit(func() error {
		ln, err = net.Listen("tcp", address)
		return err
	})
	return ln, err
}

// Stop ends everything on the host; its files stay.
func (h *Host) Stop() {
	h.init.Kill()
	close(h.work)
	h.thread.Wait()
}
