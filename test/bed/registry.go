package bed

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Registry is a `sluice registry` of the bed.
type Registry struct {
	*Process
	Addr   string
	Dir    string
	sluice string
	env    []string
}

// StartRegistry starts a registry whose data and log lie in dir. Further
// configuration is environment, as in SLUICE_REGISTRY_LOG_LEVEL=warn.
func StartRegistry(ctx context.Context, sluice, dir string, env ...string) (*Registry, error) {
	addr, err := freeAddress()
	if err != nil {
		return nil, err
	}
	r := &Registry{Addr: addr, Dir: dir, sluice: sluice, env: env}
	return r, r.Restart(ctx)
}

// Restart starts the registry again, after Kill or Stop, at the same address.
func (r *Registry) Restart(ctx context.Context) error {
	p, err := Start(r.Dir, "registry", r.env, r.sluice, "registry", "--data", filepath.Join(r.Dir, "registry"), "--listen", r.Addr)
	if err != nil {
		return err
	}
	if err := p.AwaitSocket(ctx, "tcp", r.Addr); err != nil {
		p.Kill()
		return err
	}
	r.Process = p
	return nil
}

// Push pushes an OCI layout or a docker-save tar with crane.
func (r *Registry) Push(ctx context.Context, t Tools, image, name string) error {
	cmd := exec.CommandContext(ctx, t.Crane, "push", "--insecure", image, r.Addr+"/"+name)
	if err := run(cmd); err != nil {
		return fmt.Errorf("pushing %s: %w", image, err)
	}
	return nil
}

// Expand has the registry expand an image that it has for Teleport, and waits
// until its layers can be mounted. All images of its repository are expanded from
// then on.
func (r *Registry) Expand(ctx context.Context, name string) error {
	repository, _, _ := strings.Cut(name, ":")
	if err := run(exec.CommandContext(ctx, r.sluice, "teleport", "edit-attribute", r.Addr+"/"+repository, "enable")); err != nil {
		return err
	}
	return run(exec.CommandContext(ctx, r.sluice, "teleport", "check-expansion", r.Addr+"/"+name))
}

// firstPort is above those of services that machines have.
const firstPort = 10_000

// freeAddress returns an address of loopback that nobody listens on, and that stays
// free while its server starts, or is down for a while: the kernel gives its port to
// nobody who wants any, be it a listener or a client's end of a connection.
func freeAddress() (string, error) {
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		return "", err
	}
	var end, last int // what the kernel gives away
	if _, err := fmt.Sscan(string(b), &end, &last); err != nil {
		return "", fmt.Errorf("the kernel's range of ports is %q: %w", b, err)
	}
	if end <= firstPort {
		return "", fmt.Errorf("the kernel gives away the ports from %d on: raise net.ipv4.ip_local_port_range", end)
	}
	for range 100 {
		addr := fmt.Sprintf("127.0.0.1:%d", firstPort+rand.IntN(end-firstPort))
		var ln net.Listener
		if ln, err = net.Listen("tcp", addr); err == nil {
			return addr, ln.Close()
		}
	}
	return "", err
}

// freePort is freeAddress, and its parts.
func freePort() (addr, host, port string, err error) {
	if addr, err = freeAddress(); err != nil {
		return "", "", "", err
	}
	host, port, err = net.SplitHostPort(addr)
	return addr, host, port, err
}
