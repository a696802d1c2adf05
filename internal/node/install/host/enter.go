// Package host runs programs on the machine that a container is on: Enter moves
// this program there, Systemctl asks systemd, and a Supervisor keeps the node
// daemon running where there's no systemd.
package host

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// Live reports whether the machine whose file system is at root runs, and not
// only its disk is here: it has processes.
func Live(root string) bool {
	_, err := os.Stat(filepath.Join(root, "proc/1/ns/mnt"))
	return err == nil
}

// spaces are the namespaces that a daemon of the machine has to be in.
var spaces = []struct {
	name string
	flag int
}{
	{"net", unix.CLONE_NEWNET}, {"ipc", unix.CLONE_NEWIPC}, {"uts", unix.CLONE_NEWUTS},
	{"cgroup", unix.CLONE_NEWCGROUP}, {"mnt", unix.CLONE_NEWNS}, // the last one: then /proc is another
}

// Enter replaces this process by one of the same program that runs on the
// machine whose file system is at root: in the namespaces of its first process,
// with its root directory. It needs that machine's PID namespace (hostPID) and
// all privileges. args are its arguments, the program's name not among them. It
// returns only after an error, with nothing changed.
//
// The new process runs from memory. Otherwise its code would come from the
// container's image, which may be one that streams: it could neither replace nor
// remove the daemon that it needs to go on.
func Enter(root string, args []string) error {
	proc := filepath.Join(root, "proc/1")
	theirs, err := os.Readlink(filepath.Join(proc, "ns/pid"))
	if err != nil {
		return fmt.Errorf("look at the machine's first process: %w: this needs a privileged container", err)
	}
	if ours, err := os.Readlink("/proc/self/ns/pid"); err != nil || ours != theirs {
		return errors.Join(fmt.Errorf("%s is of another PID namespace than this process: give the pod hostPID: true", proc), err)
	}
	program, err := inMemory()
	if err != nil {
		return fmt.Errorf("copy this program to memory: %w", err)
	}
	defer unix.Close(program)
	failed := make(chan error)
	go func() {
		// The thread never goes back: its namespaces are others.
		runtime.LockOSThread()
		failed <- become(proc, program, args)
	}()
	return <-failed
}

// become moves this thread, and has the process go on from it.
func become(proc string, program int, args []string) error {
	dir, err := unix.Open(filepath.Join(proc, "root"), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the machine's root directory: %w: this needs a privileged container", err)
	}
	defer unix.Close(dir)
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	var fds []int
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	for _, s := range spaces {
		fd, err := unix.Open(filepath.Join(proc, "ns", s.name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open the machine's %s namespace: %w: this needs a privileged container", s.name, err)
		}
		fds = append(fds, fd)
	}
	for i, s := range spaces {
		if err := unix.Setns(fds[i], s.flag); err != nil {
			return fmt.Errorf("enter the machine's %s namespace: %w: this needs a privileged container", s.name, err)
		}
	}
	if err := unix.Fchdir(dir); err != nil {
		return err
	}
	if err := errors.Join(unix.Chroot("."), unix.Chdir("/")); err != nil {
		return err
	}
	return fmt.Errorf("start this program on the machine: %w", syscall.Exec(fmt.Sprintf("/proc/self/fd/%d", program), append([]string{"sluice"}, args...), environment()))
}

// mfdExec allows the file to be run where vm.memfd_noexec is set (Linux 6.3).
const mfdExec = 0x10

// inMemory returns a copy of this program in memory. Who runs it has the
// descriptor, too: without that it couldn't be found.
func inMemory() (int, error) {
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return -1, err
	}
	defer self.Close()
	fd, err := unix.MemfdCreate("sluice", mfdExec)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.MemfdCreate("sluice", 0)
	}
	if err != nil {
		return -1, err
	}
	to, err := unix.Dup(fd) // for os.File to close
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	f := os.NewFile(uintptr(to), "memfd")
	defer f.Close()
	if _, err := io.Copy(f, self); err != nil {
		unix.Close(fd)
		return -1, err
	}
	// Written to, it couldn't be run: the descriptors that go on only read.
	ro, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDONLY, 0)
	unix.Close(fd)
	return ro, err
}

// kept are the variables of the environment that mean on the machine what they
// mean in a container.
var kept = []string{
	"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "TZ", "TERM", "GOMEMLIMIT", "GOMAXPROCS", "GOTRACEBACK",
}

// environment is that of a service of the machine.
func environment() []string {
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/opt/bin", "HOME=/root"}
	for _, name := range kept {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return env
}
