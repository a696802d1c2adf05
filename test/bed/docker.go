package bed

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
)

var dockerdTool = tool{
	module:   "dockerd",
	packages: []string{"github.com/moby/moby/v2/cmd/dockerd"},
	env:      []string{"CGO_ENABLED=0"},
}

// BuildDockerd returns the path of Docker's daemon, built from its module
// unless it is cached.
func BuildDockerd(ctx context.Context, src string, say func(string)) (string, error) {
	dir, err := dockerdTool.build(ctx, src, say)
	return filepath.Join(dir, "dockerd"), err
}

// Docker is a Docker daemon that keeps its images in a node's containerd, for
// the node's snapshotter.
type Docker struct {
	*Process
	http http.Client
}

// StartDocker starts one on a node whose daemons run. It ends by Stop or Kill.
func (n *Node) StartDocker(ctx context.Context, dockerd string) (*Docker, error) {
	socket := filepath.Join(n.Dir, "docker.sock")
	env := []string{"PATH=" + n.tools.ContainerdDir + ":" + filepath.Dir(n.tools.Runc) + ":" + os.Getenv("PATH")}
	p, err := Start(n.Dir, "dockerd", env, dockerd,
		"--containerd", n.containerdSocket(), "--storage-driver", n.snapshotter(), "--feature", "containerd-snapshotter=true",
		"--host", "unix://"+socket, "--data-root", filepath.Join(n.Dir, "docker"), "--exec-root", filepath.Join(n.Dir, "docker-run"),
		"--pidfile", filepath.Join(n.Dir, "docker.pid"), "--bridge", "none", "--userland-proxy=false", "--iptables=false", "--ip6tables=false")
	if err != nil {
		return nil, err
	}
	var dialer net.Dialer
	d := &Docker{Process: p, http: http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", socket)
		},
	}}}
	if err := p.Await(ctx, func() bool { _, err := d.call(ctx, http.MethodGet, "/_ping", nil); return err == nil }); err != nil {
		p.Kill()
		return nil, err
	}
	return d, nil
}

// call makes a request of the Engine API and returns the answer's body.
func (d *Docker) call(ctx context.Context, method, path string, body any) ([]byte, error) {
	content, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://docker"+path, bytes.NewReader(content))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := d.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode/100 != 2 {
		err = fmt.Errorf("docker: %s %s: %s: %s", method, path, resp.Status, b)
	}
	return b, err
}

// Pull pulls an image.
func (d *Docker) Pull(ctx context.Context, ref string) error {
	progress, err := d.call(ctx, http.MethodPost, "/images/create?fromImage="+url.QueryEscape(ref), nil)
	if err == nil && bytes.Contains(progress, []byte(`"error"`)) {
		err = fmt.Errorf("docker pull %s: %s", ref, progress)
	}
	return err
}

// Run runs a command in a new container of an image, on the host's network,
// and returns what it printed.
func (d *Docker) Run(ctx context.Context, ref string, command ...string) (string, error) {
	created, err := d.call(ctx, http.MethodPost, "/containers/create", map[string]any{
		"Image": ref, "Cmd": command, "Tty": true, // one stream, without frames
		"HostConfig": map[string]any{"NetworkMode": "host"},
	})
	if err != nil {
		return "", err
	}
	var c struct{ ID string }
	if err := json.Unmarshal(created, &c); err != nil {
		return "", err
	}
	var out []byte
	for _, step := range []struct{ method, path string }{
		{http.MethodPost, "/start"}, {http.MethodPost, "/wait"}, {http.MethodGet, "/logs?stdout=1&stderr=1"}, {http.MethodDelete, "?force=1"},
	} {
		b, err := d.call(ctx, step.method, "/containers/"+c.ID+step.path, nil)
		if err != nil {
			return "", err
		}
		if step.method == http.MethodGet {
			out = b
		}
	}
	return strings.ReplaceAll(string(out), "\r\n", "\n"), nil
}

// RemoveImage removes an image.
func (d *Docker) RemoveImage(ctx context.Context, ref string) error {
	_, err := d.call(ctx, http.MethodDelete, "/images/"+ref, nil)
	return err
}
