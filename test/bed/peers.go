package bed

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
)

// Peer is another server that figures are held against. It ends by Stop or
// Kill, or with this process.
type Peer struct {
	*Process
	Addr string // HOST:PORT, plain HTTP
	Dir  string // of its data
}

var olaregTool = tool{
	module:   "olareg",
	packages: []string{"github.com/olareg/olareg/cmd/olareg"},
	env:      []string{"CGO_ENABLED=0"},
}

var distributionTool = tool{
	module:   "distribution",
	packages: []string{"github.com/distribution/distribution/v3/cmd/registry"},
	env:      []string{"CGO_ENABLED=0"},
}

// StartOlareg starts an olareg registry whose data and log lie in dir, built
// from its module unless it is cached.
func StartOlareg(ctx context.Context, src, dir string, say func(string)) (*Peer, error) {
	bin, err := olaregTool.build(ctx, src, say)
	if err != nil {
		return nil, err
	}
	addr, host, port, err := freePort()
	if err != nil {
		return nil, err
	}
	p := &Peer{Addr: addr, Dir: filepath.Join(dir, "olareg")}
	return p, p.start(ctx, dir, "olareg", "/v2/", filepath.Join(bin, "olareg"),
		"serve", "--addr", host, "--port", port, "--dir", p.Dir, "--store-type", "dir", "--api-delete", "--api-blob-delete", "--verbosity", "error")
}

// StartDistribution starts a distribution registry whose data and log lie in
// dir, built from its module unless it is cached.
func StartDistribution(ctx context.Context, src, dir string, say func(string)) (*Peer, error) {
	bin, err := distributionTool.build(ctx, src, say)
	if err != nil {
		return nil, err
	}
	addr, err := freeAddress()
	if err != nil {
		return nil, err
	}
	p := &Peer{Addr: addr, Dir: filepath.Join(dir, "distribution")}
	config := filepath.Join(dir, "distribution.yml")
	text := fmt.Sprintf(`version: 0.1
log:
  accesslog: {disabled: true}
  level: error
storage:
  filesystem: {rootdirectory: %q}
  cache: {blobdescriptor: inmemory}
http:
  addr: %q
`, p.Dir, addr)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return nil, err
	}
	return p, p.start(ctx, dir, "distribution", "/v2/", filepath.Join(bin, "registry"), "serve", config)
}

// StartNginx starts an nginx that serves the files of a directory, Dir, which
// is made in dir like its log. It is Debian's, installed if it isn't there.
func StartNginx(ctx context.Context, dir string) (*Peer, error) {
	if err := Install(ctx, "nginx-light"); err != nil {
		return nil, err
	}
	addr, err := freeAddress()
	if err != nil {
		return nil, err
	}
	p := &Peer{Addr: addr, Dir: filepath.Join(dir, "nginx-files")}
	state := filepath.Join(dir, "nginx")
	for _, d := range []string{p.Dir, state} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	who := "user root;" // workers of another user couldn't enter a test's directory
	if os.Geteuid() != 0 {
		who = ""
	}
	text := fmt.Sprintf(`%s
daemon off;
worker_processes auto;
pid %[2]s/pid;
error_log stderr warn;
events { worker_connections 1024; }
http {
	access_log off;
	sendfile on;
	tcp_nopush on;
	keepalive_requests 1000000;
	client_body_temp_path %[2]s/body;
	proxy_temp_path %[2]s/proxy;
	fastcgi_temp_path %[2]s/fastcgi;
	uwsgi_temp_path %[2]s/uwsgi;
	scgi_temp_path %[2]s/scgi;
	server { listen %[3]s; root %[4]s; location = /ready { return 200; } }
}
`, who, state, addr, p.Dir)
	config := filepath.Join(state, "nginx.conf")
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return nil, err
	}
	return p, p.start(ctx, dir, "nginx", "/ready", "nginx", "-p", state, "-c", config, "-e", "stderr")
}

// start starts the peer's program and waits until it answers.
func (p *Peer) start(ctx context.Context, dir, name, ready, program string, args ...string) error {
	process, err := Start(dir, name, nil, program, args...)
	if err != nil {
		return err
	}
	p.Process = process
	if err := p.AwaitHTTP(ctx, "http://"+p.Addr+ready, http.StatusOK); err != nil {
		p.Kill()
		return err
	}
	return nil
}
