package bed

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
)

// Postgres is a PostgreSQL server with a cluster of its own. Its settings are
// the defaults, so a commit is on disk when it returns.
type Postgres struct {
	*Process
	Addr string // HOST:PORT
	bin  string // directory of its programs
	dir  string
	as   *syscall.Credential // nil: this process's user
}

// StartPostgres starts a PostgreSQL with an empty cluster, installed by apt if
// it isn't there. It ends by Stop or Kill, or with this process; Stop removes
// the cluster. The server refuses to run as root: then it runs as the user
// postgres, in a directory of its own because a test's is closed to others.
func StartPostgres(ctx context.Context) (*Postgres, error) {
	p := &Postgres{}
	var err error
	if p.bin, err = postgresPrograms(ctx); err != nil {
		return nil, err
	}
	if p.as, err = postgresUser(); err != nil {
		return nil, err
	}
	addr, host, port, err := freePort()
	if err != nil {
		return nil, err
	}
	p.Addr = addr
	if p.dir, err = os.MkdirTemp("", "sluice-postgres-"); err != nil {
		return nil, err
	}
	if err := p.start(ctx, host, port); err != nil {
		os.RemoveAll(p.dir)
		return nil, err
	}
	return p, nil
}

func (p *Postgres) start(ctx context.Context, host, port string) error {
	if p.as != nil {
		if err := os.Chown(p.dir, int(p.as.Uid), int(p.as.Gid)); err != nil {
			return err
		}
	}
	data := filepath.Join(p.dir, "data")
	initdb := exec.CommandContext(ctx, filepath.Join(p.bin, "initdb"), "--pgdata", data, "--username=postgres",
		"--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync") // what matters is synced by the server
	p.prepare(initdb)
	if err := run(initdb); err != nil {
		return err
	}
	cmd := exec.Command(filepath.Join(p.bin, "postgres"), "-D", data, "-h", host, "-p", port, "-k", "",
		"-c", "max_connections=200")
	p.prepare(cmd)
	process, err := start(p.dir, "postgres", cmd)
	if err != nil {
		return err
	}
	p.Process = process
	err = p.Await(ctx, func() bool {
		return exec.CommandContext(ctx, filepath.Join(p.bin, "pg_isready"), "-q", "-h", host, "-p", port).Run() == nil
	})
	if err != nil {
		p.Kill()
	}
	return err
}

// prepare makes cmd run as the server's user.
func (p *Postgres) prepare(cmd *exec.Cmd) {
	cmd.Dir = p.dir // it must be able to enter it
	if p.as != nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: p.as}
	}
}

// NewDatabase makes an empty database and returns the URL to open it with.
func (p *Postgres) NewDatabase(ctx context.Context, name string) (string, error) {
	host, port, err := net.SplitHostPort(p.Addr)
	if err != nil {
		return "", err
	}
	err = run(exec.CommandContext(ctx, filepath.Join(p.bin, "createdb"), "-h", host, "-p", port, "-U", "postgres", name))
	return (&url.URL{Scheme: "postgres", User: url.User("postgres"), Host: p.Addr, Path: "/" + name, RawQuery: "sslmode=disable"}).String(), err
}

// Stop ends the server, without waiting for its clients, and removes its
// cluster.
func (p *Postgres) Stop() {
	_ = p.cmd.Process.Signal(syscall.SIGINT) // "fast shutdown"; SIGTERM would wait for clients
	p.Process.Stop()
	os.RemoveAll(p.dir)
}

// postgresPrograms returns the directory of the newest PostgreSQL's programs.
func postgresPrograms(ctx context.Context) (string, error) {
	const pattern = "/usr/lib/postgresql/*/bin/postgres"
	found, err := filepath.Glob(pattern)
	if err != nil {
		return "", err
	}
	if len(found) == 0 {
		if err := Install(ctx, "postgresql"); err != nil {
			return "", err
		}
		if found, err = filepath.Glob(pattern); err != nil {
			return "", err
		}
	}
	if len(found) == 0 {
		return "", fmt.Errorf("PostgreSQL is installed, but there is no %s", pattern)
	}
	slices.Sort(found)
	return filepath.Dir(found[len(found)-1]), nil
}

// postgresUser returns whom the server runs as: nil for this process's user.
func postgresUser() (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		return nil, err
	}
	uid, uidErr := strconv.ParseUint(u.Uid, 10, 32)
	gid, gidErr := strconv.ParseUint(u.Gid, 10, 32)
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, errors.Join(uidErr, gidErr)
}
