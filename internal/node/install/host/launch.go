package host

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// group is the control group of the daemon where groups form one tree (v2).
const group = "sluice-node"

// Launch replaces this process by a program that outlives the container which
// this process was started in: it leaves the container's control groups, and its
// session. It returns only after an error.
func Launch(program string, args []string) error {
	if err := leaveGroups(); err != nil {
		return fmt.Errorf("leave the container's control group: %w", err)
	}
	if _, err := unix.Setsid(); err != nil && !errors.Is(err, unix.EPERM) { // it leads one already
		return fmt.Errorf("setsid: %w", err)
	}
	// The last one to be killed when memory is short. Not everywhere allowed.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0o644)
	if err := os.Chdir("/"); err != nil {
		return err
	}
	return fmt.Errorf("start %s: %w", program, syscall.Exec(program, append([]string{program}, args...), environment()))
}

// leaveGroups moves this process out of the groups that end with its container.
// In version 1 each hierarchy's uppermost group takes it, in version 2 a group
// beneath that: there the uppermost may be one that has only groups in it.
func leaveGroups() error {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.FSType != "cgroup" && m.FSType != "cgroup2", false
	})
	if err != nil {
		return err
	}
	return leave(mounts, os.Getpid())
}

func leave(mounts []*mountinfo.Info, pid int) error {
	for _, m := range mounts {
		dir := m.Mountpoint
		if m.FSType == "cgroup2" {
			dir = filepath.Join(dir, group)
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return err
			}
		}
		f, err := os.OpenFile(filepath.Join(dir, "cgroup.procs"), os.O_WRONLY, 0)
		if err == nil {
			_, err = f.WriteString(strconv.Itoa(pid))
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			return fmt.Errorf("cgroup %s: %w", dir, err)
		}
	}
	return nil
}

// RemoveGroup removes the group that Launch made, once nobody is in it.
func RemoveGroup() error {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup2"))
	if err != nil {
		return err
	}
	for _, m := range mounts {
		err := os.Remove(filepath.Join(m.Mountpoint, group))
		if err != nil && !slices.ContainsFunc([]error{fs.ErrNotExist, unix.EBUSY}, func(is error) bool { return errors.Is(err, is) }) {
			return err
		}
	}
	return nil
}
