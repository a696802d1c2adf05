package run

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// specVersion is the version of the runtime specification that is asked for:
// nothing newer is needed, and some runtimes refuse versions they don't know.
const specVersion = "1.0.2"

// defaultPath is the PATH of images that set none.
const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// newSpec makes the runtime's configuration of c.
func newSpec(c Container, id, rootfs string) (*specs.Spec, error) {
	args := append(slices.Clone(c.Config.Config.Entrypoint), c.Config.Config.Cmd...)
	if len(c.Args) > 0 {
		args = append(slices.Clone(c.Config.Config.Entrypoint), c.Args...)
	}
	if len(args) == 0 {
		return nil, errors.New("the image names no command: give one")
	}
	user, err := findUser(rootfs, c.Config.Config.User)
	if err != nil {
		return nil, err
	}
	env := mergeEnv([]string{defaultPath}, c.Config.Config.Env)
	if c.Terminal {
		env = mergeEnv(env, []string{"TERM=" + termName()})
	}
	cwd := c.Config.Config.WorkingDir
	if cwd == "" {
		cwd = "/"
	}
	return &specs.Spec{
		Version:  specVersion,
		Hostname: strings.TrimPrefix(id, "sluice-"),
		Root:     &specs.Root{Path: rootfs},
		Process: &specs.Process{
			Terminal:        c.Terminal,
			User:            user,
			Args:            args,
			Env:             mergeEnv(env, c.Env),
			Cwd:             cwd,
			NoNewPrivileges: true,
			Capabilities: &specs.LinuxCapabilities{
				Bounding: capabilities(), Effective: capabilities(), Permitted: capabilities(),
			},
			Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 1024, Soft: 1024}},
		},
		Mounts: append(standardMounts(), hostFiles()...),
		Linux: &specs.Linux{
			CgroupsPath: "/sluice/" + id,
			Resources: &specs.LinuxResources{
				// The runtime allows /dev/null and its like by itself.
				Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}},
			},
			// No network namespace: the container has the host's network.
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace},
				{Type: specs.UTSNamespace}, {Type: specs.MountNamespace},
			},
			MaskedPaths:   maskedPaths(),
			ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
		},
	}, nil
}

// capabilities are the ones that containerd and docker give by default.
func capabilities() []string {
	return []string{
		"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
		"CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
	}
}

// maskedPaths are the ones that containerd hides by default.
func maskedPaths() []string {
	return []string{
		"/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
		"/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/sys/devices/virtual/powercap", "/proc/scsi",
	}
}

// standardMounts are the file systems that every container has.
func standardMounts() []specs.Mount {
	return []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		{Destination: "/run", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
	}
}

// hostFiles are what a process needs to use the host's network.
func hostFiles() []specs.Mount {
	var mounts []specs.Mount
	for _, name := range []string{"/etc/resolv.conf", "/etc/hosts"} {
		source, err := filepath.EvalSymlinks(name)
		if err != nil {
			continue // the host has none
		}
		mounts = append(mounts, specs.Mount{Destination: name, Type: "bind", Source: source, Options: []string{"rbind", "ro"}})
	}
	return mounts
}

// mergeEnv returns env with the variables of more in place of those of the same
// name, and the new ones after them.
func mergeEnv(env, more []string) []string {
	merged := slices.Clone(env)
	for _, v := range more {
		name, _, _ := strings.Cut(v, "=")
		i := slices.IndexFunc(merged, func(have string) bool {
			n, _, _ := strings.Cut(have, "=")
			return n == name
		})
		if i >= 0 {
			merged[i] = v
		} else {
			merged = append(merged, v)
		}
	}
	return merged
}

// termName is the kind of terminal that this process has.
func termName() string {
	if t := os.Getenv("TERM"); t != "" {
		return t
	}
	return "xterm"
}
