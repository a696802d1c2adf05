package bed

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// Samba is a smbd of the bed.
type Samba struct {
	*Process
	Host, Port string

	dir, script string
}

// StartSamba starts a smbd with the configuration that config makes for a port and
// a directory for smbd's own files. The accounts in accounts/passwd exist for it
// only, by way of libnss-extrausers: it has a mount namespace of its own, in which
// the system's files say so.
func StartSamba(ctx context.Context, dir, accounts string, config func(port, state string) (string, error)) (*Samba, error) {
	if err := Install(ctx, "samba", "smbclient", "libnss-extrausers"); err != nil {
		return nil, err
	}
	_, host, port, err := freePort()
	if err != nil {
		return nil, err
	}
	state := filepath.Join(dir, "state")
	for _, d := range []string{"private", "lock", "state", "cache", "pid", "ncalrpc"} {
		if err := os.MkdirAll(filepath.Join(state, d), 0o755); err != nil {
			return nil, err
		}
	}
	text, err := config(port, state)
	if err != nil {
		return nil, err
	}
	conf, names := filepath.Join(dir, "smb.conf"), filepath.Join(dir, "nsswitch.conf")
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		return nil, err
	}
	if err := os.WriteFile(names, []byte("passwd: files extrausers\ngroup: files\nhosts: files dns\n"), 0o644); err != nil {
		return nil, err
	}
	for _, d := range []string{accounts, "/var/lib/extrausers"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	script := LetMountsGo + fmt.Sprintf("mount --bind %s /etc/nsswitch.conf && mount --bind %s /var/lib/extrausers && exec smbd --foreground --no-process-group --configfile=%s", names, accounts, conf)
	s := &Samba{Host: host, Port: port, dir: dir, script: script}
	return s, s.Restart(ctx)
}

// Restart starts it again, after Crash.
func (s *Samba) Restart(ctx context.Context) error {
	cmd := exec.Command("sh", "-c", s.script)
	cmd.Env = os.Environ()
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS} // and what is mounted in it ends with it
	p, err := start(s.dir, "smbd", cmd)
	if err != nil {
		return err
	}
	s.Process = p
	if err := p.AwaitSocket(ctx, "tcp", s.Address()); err != nil {
		s.Crash()
		return err
	}
	return nil
}

// Crash ends it at once, with the processes that serve its clients.
func (s *Samba) Crash() {
	if !s.Ended() {
		_ = syscall.Kill(-s.Pid(), syscall.SIGKILL) // it has a process group of its own
		s.Kill()
	}
}

// StartFileServer starts the smbd of a registry whose data lies, or will lie, in
// dir, as StartRegistry has it: with the configuration that sluice prints for it.
// TeleportServer is what the registry has to be started with.
func StartFileServer(ctx context.Context, sluice, dir string) (*Samba, error) {
	data, own := filepath.Join(dir, "registry"), filepath.Join(dir, "smbd")
	return StartSamba(ctx, own, filepath.Join(data, "teleport/_samba"), func(port, state string) (string, error) {
		out, err := exec.CommandContext(ctx, sluice, "registry", "smb-config", "--data", data, "--port", port, "--state", state).Output()
		return string(out), err
	})
}

// TeleportServer is the configuration of a registry that expands images, and tells
// clients that the file server is at address.
func TeleportServer(address string) []string {
	return []string{"SLUICE_REGISTRY_TELEPORT_ENABLED=true", "SLUICE_REGISTRY_TELEPORT_SERVER=" + address}
}

// Address returns where smbd listens.
func (s *Samba) Address() string { return net.JoinHostPort(s.Host, s.Port) }

// Do has smbclient do commands on a share, and returns what it says. Further
// arguments are smbclient's.
func (s *Samba) Do(ctx context.Context, share, user, password, commands string, args ...string) (string, error) {
	args = append([]string{"//" + s.Host + "/" + share, "--port=" + s.Port, "--configfile=/dev/null", "--user=" + user + "%" + password, "--command=" + commands}, args...)
	out, err := exec.CommandContext(ctx, "smbclient", args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("smbclient: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}
