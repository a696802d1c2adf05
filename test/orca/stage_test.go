package orca

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice/internal/node/disks/control"
	"sluice/test/bed"
)

// stage is what all tests stand on.
type stage struct {
	*bed.Stage // its registry doesn't know of Teleport

	samba           *bed.Samba
	teleport        *bed.Registry // knows of it
	foreign         *bed.Peer
	orca, teleportd string
	box             bed.Toolbox // in app:v1 of all registries; of the teleporting one in team/app, team/plain
}

var all *stage

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 {
		fmt.Println("SKIP: orca mounts and runs containers, which needs root")
		return
	}
	s, err := newStage(context.Background())
	code := 1
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	} else {
		all = s
		code = m.Run()
	}
	os.Exit(s.close(code))
}

func newStage(ctx context.Context) (*stage, error) {
	s := &stage{}
	say := func(text string) { fmt.Println(text) }
	var err error
	for _, step := range []func() error{
		func() error { s.Stage, err = bed.NewStage(ctx, "orca", say); return err },
		func() error { s.orca, err = bed.BuildOrca(ctx, s.Src, s.Work); return err },
		func() error { s.teleportd, err = bed.BuildTeleportd(ctx, s.Src, s.Work); return err },
		func() error {
			s.box, err = bed.NewToolbox(ctx, filepath.Join(s.Work, "image"), 11, 3<<20, 1<<20)
			return err
		},
		func() error {
			s.samba, err = bed.StartFileServer(ctx, s.Sluice, filepath.Join(s.Work, "teleport"))
			return err
		},
		func() error {
			s.teleport, err = bed.StartRegistry(ctx, s.Sluice, filepath.Join(s.Work, "teleport"), append(bed.TeleportServer(s.samba.Address()), "SLUICE_REGISTRY_LOG_LEVEL=warn")...)
			return err
		},
		func() error { s.foreign, err = bed.StartDistribution(ctx, s.Src, s.Work, say); return err },
		func() error { return s.Push(ctx, s.box.Layout, "app:v1") },
		func() error { return s.teleport.Push(ctx, s.Tools, s.box.Layout, "team/app:v1") },
		func() error { return s.teleport.Push(ctx, s.Tools, s.box.Layout, "team/plain:v1") },
		func() error { return s.teleport.Expand(ctx, "team/app:v1") },
		func() error {
			r := bed.Registry{Addr: s.foreign.Addr}
			return r.Push(ctx, s.Tools, s.box.Layout, "app:v1")
		},
	} {
		if err := step(); err != nil {
			return s, err
		}
	}
	return s, nil
}

func (s *stage) close(code int) int {
	if s.foreign != nil {
		s.foreign.Stop()
	}
	if s.teleport != nil {
		s.teleport.Stop()
	}
	if s.samba != nil {
		s.samba.Stop()
	}
	return s.CloseAfter(code)
}

// node is a teleportd with its own state.
type node struct {
	t      *testing.T
	dir    string
	daemon *bed.Process
	client *control.Client
}

func newNode(t *testing.T) *node {
	t.Helper()
	dir, err := os.MkdirTemp(all.Work, "n")
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, dir: dir}
	n.start()
	t.Cleanup(func() {
		n.stop()
		if t.Failed() {
			log, _ := os.ReadFile(n.daemon.Log)
			t.Logf("teleportd says:\n%s", log[max(0, len(log)-20_000):])
		}
		if err := bed.UnmountAll(dir); err != nil {
			t.Error(err)
		}
	})
	return n
}

func (n *node) root() string   { return filepath.Join(n.dir, "r") }
func (n *node) socket() string { return filepath.Join(n.dir, "run/control.sock") }

func (n *node) start() {
	n.t.Helper()
	p, err := bed.Start(n.dir, "teleportd", nil, all.teleportd, "--root", n.root(), "--run", filepath.Join(n.dir, "run"), "--cache-free", "0", "--recheck", "1s", "--debug")
	if err != nil {
		n.t.Fatal(err)
	}
	n.daemon, n.client = p, control.NewClient(n.socket())
	if err := p.AwaitSocket(n.t.Context(), "unix", n.socket()); err != nil {
		p.Kill()
		n.t.Fatal(err)
	}
}

func (n *node) stop() {
	if !n.daemon.Ended() {
		n.daemon.Stop()
	}
}

// ran is what came of a command.
type ran struct {
	stdout, stderr string
	code           int
}

// command is orca with this node.
func (n *node) command(verb string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(n.t.Context(), all.orca, append([]string{verb, "--socket", n.socket()}, args...)...)
	cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(all.Tools.Runc)+":"+os.Getenv("PATH"))
	return cmd
}

// orca runs orca with this node.
func (n *node) orca(verb string, args ...string) ran {
	n.t.Helper()
	return finish(n.t, n.command(verb, args...), "")
}

// finish runs a command to its end.
func finish(t *testing.T, cmd *exec.Cmd, stdin string) ran {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return ran{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// is complains unless a command had this output and code, and its standard error
// these texts, in this order.
func (r ran) is(t *testing.T, code int, stdout string, says ...string) {
	t.Helper()
	if r.code != code || r.stdout != stdout {
		t.Errorf("exit code %d, want %d; output %q, want %q; it said:\n%s", r.code, code, r.stdout, stdout, r.stderr)
	}
	rest := r.stderr
	for _, text := range says {
		_, after, ok := strings.Cut(rest, text)
		if !ok {
			t.Errorf("it didn't say %q (after what comes before it):\n%s", text, r.stderr)
			return
		}
		rest = after
	}
}

// status asks the node.
func (n *node) status() control.Status {
	n.t.Helper()
	s, err := n.client.Status(n.t.Context())
	if err != nil {
		n.t.Fatal(err)
	}
	return s
}

// mounts returns how many images and layers the node has mounted.
func (n *node) mounts() int {
	n.t.Helper()
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		n.t.Fatal(err)
	}
	count := 0
	for line := range strings.Lines(string(table)) {
		if strings.Contains(line, " "+n.dir+"/") && strings.Contains(line, " - erofs ") {
			count++
		}
	}
	return count
}

// eventually waits for something to be so.
func eventually(t *testing.T, what string, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); !so(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// running is a container that waits for its standard input to end.
type running struct {
	cmd    *exec.Cmd
	stdin  io.Closer
	stderr *bytes.Buffer
}

// waiting is what a container does that waits, and then reads what nobody has.
const waiting = "echo ready; cat; sha256sum /data/0"

// startWaiting starts a container and waits until its script runs.
func (n *node) startWaiting(image, script string) *running {
	n.t.Helper()
	cmd := n.command("run", image, "sh", "-c", script)
	cmd.WaitDelay = time.Second // a container that outlives a killed orca has its pipes
	r := &running{cmd: cmd, stderr: new(bytes.Buffer)}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	r.stdin, cmd.Stderr = stdin, r.stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	line := make([]byte, len("ready\n"))
	if _, err := io.ReadFull(stdout, line); err != nil {
		_ = cmd.Wait() // for what it said
		n.t.Fatalf("%v; it said:\n%s", err, r.stderr)
	}
	go io.Copy(io.Discard, stdout) // ends with the command
	return r
}

// put pushes a manifest under the tag of a reference.
func put(t *testing.T, image, manifest string) {
	t.Helper()
	host, rest, _ := strings.Cut(image, "/")
	repo, tag, _ := strings.Cut(rest, ":")
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://"+host+"/v2/"+repo+"/manifests/"+tag, strings.NewReader(manifest))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/vnd.docker.distribution.manifest.v2+json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if answer, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusCreated {
		t.Fatalf("PUT %s: %d %s", image, resp.StatusCode, answer)
	}
}

// standaloneSocket is where the teleportd that orca starts for a root answers.
func standaloneSocket(root string) string {
	sum := sha256.Sum256([]byte(root))
	return fmt.Sprintf("/run/orca/root-%x/control.sock", sum[:6])
}
