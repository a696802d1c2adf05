package bed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// The snapshotters of a node.
const (
	Overlayfs = "overlayfs" // containerd's own: the traditional pull
	Sluice    = "sluice"    // streaming
	Teleportd = "teleportd" // layers mounted from a file server
	Stargz    = "stargz"    // the peer's streaming
)

// Node is a private containerd with a private snapshotter, both below Dir:
// `sluice node`, teleportd, or the peer's.
type Node struct {
	Dir        string
	Sluice     *Process
	Teleportd  *Process
	Stargz     *Process
	Containerd *Process
	tools      Tools
	bin        string   // sluice
	former     bool     // it is another version's
	teleportd  string   // the program, where the node has it instead of sluice
	flags      []string // of sluice node, or of teleportd
	cri        *CRI     // nil: without
}

// NewNode returns a node with its state in dir, which must not lie on
// overlayfs; nothing runs yet. flags are further ones of sluice node.
func NewNode(t Tools, sluice, dir string, flags ...string) (*Node, error) {
	return &Node{Dir: dir, tools: t, bin: sluice, flags: flags}, os.MkdirAll(dir, 0o711)
}

// StartNode starts both with empty state in dir, which must not lie on
// overlayfs. flags are further ones of sluice node.
func StartNode(ctx context.Context, t Tools, sluice, dir string, flags ...string) (*Node, error) {
	n, err := NewNode(t, sluice, dir, flags...)
	if err != nil {
		return nil, err
	}
	if err := n.StartSluice(ctx); err != nil {
		return nil, err
	}
	return n, n.finish(ctx)
}

// StartStargzNode is StartNode with the peer's snapshotter, which is told that
// registry, as HOST:PORT, speaks plain HTTP.
func StartStargzNode(ctx context.Context, t Tools, stargz StargzTools, registry, dir string) (*Node, error) {
	n := &Node{Dir: dir, tools: t}
	if err := os.MkdirAll(filepath.Dir(n.socket()), 0o711); err != nil {
		return nil, err
	}
	p, err := Start(dir, "stargz", nil, stargz.Node(), n.socket(), filepath.Join(dir, "stargz"), registry)
	if err != nil {
		return nil, err
	}
	if err := p.AwaitSocket(ctx, "unix", n.socket()); err != nil {
		p.Kill()
		return nil, err
	}
	n.Stargz = p
	return n, n.finish(ctx)
}

// finish starts containerd, or takes down what was started before it.
func (n *Node) finish(ctx context.Context) error {
	err := n.StartContainerd(ctx)
	if err != nil {
		n.Stop()
	}
	return err
}

// snapshotter is the one that isn't containerd's.
func (n *Node) snapshotter() string {
	switch {
	case n.Stargz != nil:
		return Stargz
	case n.teleportd != "":
		return Teleportd
	}
	return Sluice
}

// StartSluice starts the node daemon, again after it was stopped or killed.
func (n *Node) StartSluice(ctx context.Context) error {
	args := n.nodeArgs("node")
	if !n.former { // which has no such flag, nor the need for it
		args = append(args, "--cache-free", "0") // however full the disk of this machine is
	}
	p, err := Start(n.Dir, "sluice", nil, n.bin, append(args, n.flags...)...)
	if err != nil {
		return err
	}
	if err := p.AwaitSocket(ctx, "unix", filepath.Join(n.Dir, "run", "control.sock")); err != nil { // the last that it listens on
		p.Kill()
		return err
	}
	n.Sluice = p
	return nil
}

// AwaitConnection waits until containerd reaches the snapshotter, again after it was
// stopped or killed: where connecting was refused, containerd tries again one to three
// seconds later, and meanwhile gives that error to whoever asks for something.
func (n *Node) AwaitConnection(ctx context.Context) error {
	key := fmt.Sprint("connected-", time.Now().UnixNano())
	snapshots := func(args ...string) *exec.Cmd {
		return n.ctr(ctx, append([]string{"snapshots", "--snapshotter", n.snapshotter()}, args...)...)
	}
	err := n.Containerd.Await(ctx, func() bool { // a list of none is had without asking the snapshotter
		return snapshots("prepare", key).Run() == nil
	})
	if err != nil {
		return err
	}
	return snapshots("rm", key).Run()
}

// UseFormer lets the next start of the node daemon, and Command, be of the version
// that Former returned; Use, of the present one.
func (n *Node) UseFormer(sluice string) { n.bin, n.former = sluice, true }

// Use is the way back from UseFormer.
func (n *Node) Use(sluice string) { n.bin, n.former = sluice, false }

// Reconfigure lets the next start of the node daemon have these further flags
// instead.
func (n *Node) Reconfigure(flags ...string) { n.flags = flags }

// nodeArgs are the arguments that point a verb of sluice, or teleportd, at this
// node.
func (n *Node) nodeArgs(verb ...string) []string {
	return append(verb, "--root", filepath.Join(n.Dir, n.snapshotter()), "--run", filepath.Join(n.Dir, "run"))
}

// Command returns a verb of sluice that talks to this node.
func (n *Node) Command(ctx context.Context, verb ...string) *exec.Cmd {
	return exec.CommandContext(ctx, n.bin, n.nodeArgs(verb...)...)
}

func (n *Node) socket() string { return filepath.Join(n.Dir, "run", "snapshotter.sock") }

// StartContainerd starts containerd, again after it was stopped or killed.
func (n *Node) StartContainerd(ctx context.Context) error {
	config := filepath.Join(n.Dir, "containerd.toml")
	if err := os.WriteFile(config, []byte(n.containerdConfig()), 0o644); err != nil {
		return err
	}
	env := []string{"PATH=" + n.tools.ContainerdDir + ":" + filepath.Dir(n.tools.Runc) + ":" + os.Getenv("PATH")}
	p, err := Start(n.Dir, "containerd", env, n.tools.Containerd(), "--config", config)
	if err != nil {
		return err
	}
	err = p.Await(ctx, func() bool { return n.ctr(ctx, "version").Run() == nil })
	if err == nil && n.cri != nil { // which has pods to look for first, and refuses everything meanwhile
		err = p.Await(ctx, func() bool { return n.answersKubelet(ctx) })
	}
	if err != nil {
		p.Kill()
		return err
	}
	n.Containerd = p
	return nil
}

// containerdConfig is the least that pulls and runs with both snapshotters:
// what docs/containerd.md tells people to write, in private directories.
func (n *Node) containerdConfig() string {
	disabled, capabilities, cri := criPlugins, "", ""
	if n.cri != nil {
		disabled, capabilities, cri = "", n.cri.capabilities(), n.cri.config(n)
	}
	return fmt.Sprintf(`version = 3
root = %[1]q
state = %[2]q
disabled_plugins = [%[7]s"io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp", "io.containerd.nri.v1.nri"]
[grpc]
  address = %[3]q
[ttrpc]
  address = "%[3]s.ttrpc"
[proxy_plugins.%[6]s]
  type = "snapshot"
  address = %[4]q
  %[8]s
  [proxy_plugins.%[6]s.exports]
    root = %[5]q
    enable_remote_snapshot_annotations = "true"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "overlayfs"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = %[6]q
%[9]s`, filepath.Join(n.Dir, "containerd"), filepath.Join(n.Dir, "state"), n.containerdSocket(),
		n.socket(), filepath.Join(n.Dir, n.snapshotter()), n.snapshotter(), disabled, capabilities, cri)
}

// ContainerdSocket is where containerd answers.
func (n *Node) ContainerdSocket() string { return n.containerdSocket() }

func (n *Node) containerdSocket() string { return filepath.Join(n.Dir, "containerd.sock") }

// ctr returns a command of containerd's client.
func (n *Node) ctr(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, n.tools.Ctr(), append([]string{"--address", n.containerdSocket()}, args...)...)
}

// CtrCommand returns a command of containerd's client.
func (n *Node) CtrCommand(ctx context.Context, args ...string) *exec.Cmd { return n.ctr(ctx, args...) }

// Ctr runs containerd's client and returns what it printed.
func (n *Node) Ctr(ctx context.Context, args ...string) (string, error) {
	out, err := n.ctr(ctx, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("ctr %s: %w\n%s", strings.Join(args, " "), err, tail(out, 2<<10))
	}
	return string(out), nil
}

// Pull pulls an image with ctr, as the transfer service does it.
func (n *Node) Pull(ctx context.Context, snapshotter, ref string) error {
	_, err := n.Ctr(ctx, "images", "pull", "--plain-http", "--snapshotter", snapshotter, ref)
	return err
}

// Ran is what a container did.
type Ran struct {
	Output      string        // what it printed
	FirstOutput time.Duration // from the start of the command; to its end if it printed nothing
	Mounts      int           // most mounts there were below the node's directory meanwhile
}

// Run runs a command, or the image's own if there is none, in a container and
// waits for its end.
func (n *Node) Run(ctx context.Context, snapshotter, ref, id string, command ...string) (Ran, error) {
	return n.follow(ctx, snapshotter, ref, id, command, func(bool, time.Duration) bool { return false })
}

// firstWord is how long RunToOutput waits for one.
const firstWord = time.Minute

// RunToOutput is Run, but ends the container once it has printed something:
// what an image runs by itself is often a server.
func (n *Node) RunToOutput(ctx context.Context, snapshotter, ref, id string, command ...string) (Ran, error) {
	r, err := n.follow(ctx, snapshotter, ref, id, command, func(printed bool, after time.Duration) bool {
		return printed || after > firstWord
	})
	if r.Output == "" && r.FirstOutput > firstWord {
		return r, fmt.Errorf("%s printed nothing within %v: give a command that prints something", ref, firstWord)
	}
	if r.Output != "" {
		return r, nil // its end was our doing, or doesn't matter any more
	}
	return r, err
}

// output is a file into which a container's shim writes what the container prints.
// ctr would print that itself, but gives up reading, and sometimes opening, what the
// shim writes when the container has ended. What the container prints to standard
// error is in it, too, but may lack its end: the shim is done with the file when it is
// with standard output.
type output string

func (n *Node) newOutput() (output, error) {
	f, err := os.CreateTemp(n.Dir, "output-")
	if err != nil {
		return "", err
	}
	return output(f.Name()), f.Close()
}

// flags are ctr's.
func (o output) flags() []string { return []string{"--log-uri", "file://" + string(o)} }

// first returns when something was printed, as seen soon after; zero if nothing was.
func (o output) first() time.Time {
	fi, err := os.Stat(string(o))
	if err != nil || fi.Size() == 0 {
		return time.Time{}
	}
	return fi.ModTime()
}

// take returns what was printed, and removes the file.
func (o output) take() string {
	b, _ := os.ReadFile(string(o)) // without it nothing was printed
	os.Remove(string(o))
	return string(b)
}

// follow runs a command in a container until it ends, or until enough says
// that it may be killed.
func (n *Node) follow(ctx context.Context, snapshotter, ref, id string, command []string, enough func(printed bool, after time.Duration) bool) (Ran, error) {
	out, err := n.newOutput()
	if err != nil {
		return Ran{}, err
	}
	args := append([]string{"run", "--rm", "--net-host", "--snapshotter", snapshotter}, out.flags()...)
	cmd := n.ctr(ctx, append(append(args, ref, id), command...)...)
	var problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &problems, &problems
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return Ran{}, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	most := 0
	var first, killed time.Time
	for {
		select {
		case err := <-ended:
			r := Ran{FirstOutput: time.Since(start), Mounts: most}
			if first.IsZero() {
				first = out.first()
			}
			if !first.IsZero() {
				r.FirstOutput = first.Sub(start)
			}
			r.Output = out.take()
			if err != nil {
				return r, fmt.Errorf("ctr run %s: %w\n%s%s", ref, err, tail(problems.Bytes(), 2<<10), tail([]byte(r.Output), 2<<10))
			}
			return r, nil
		case <-time.After(3 * time.Millisecond):
			if now, err := Mounts(n.Dir); err == nil {
				most = max(most, len(now))
			}
			if first.IsZero() {
				first = out.first()
			}
			if enough(!first.IsZero(), time.Since(start)) && time.Since(killed) > time.Second {
				killed = time.Now()
				_ = n.ctr(ctx, "tasks", "kill", "--signal", "SIGKILL", id).Run() // it may be ending by itself
			}
		}
	}
}

// Exec runs a command in a running container and returns what it printed; an error
// has that, too.
func (n *Node) Exec(ctx context.Context, id string, command ...string) (string, error) {
	return n.printed(ctx, []string{"tasks", "exec"}, append([]string{"--exec-id", fmt.Sprint("e", time.Now().UnixNano()), id}, command...)...)
}

// Restart runs the command of a container that has ended again, to its end, and
// returns what it printed.
func (n *Node) Restart(ctx context.Context, id string) (string, error) {
	return n.printed(ctx, []string{"tasks", "start"}, id)
}

// printed runs a verb of ctr's and returns what the container printed.
func (n *Node) printed(ctx context.Context, verb []string, args ...string) (string, error) {
	out, err := n.newOutput()
	if err != nil {
		return "", err
	}
	problems, err := n.ctr(ctx, slices.Concat(verb, out.flags(), args)...).CombinedOutput()
	text := out.take()
	if err != nil {
		err = fmt.Errorf("ctr %s: %w\n%s%s", strings.Join(append(verb, args...), " "), err, tail(problems, 2<<10), tail([]byte(text), 2<<10))
	}
	return text, err
}

// endTasks ends containers that still run, because the command or the test that
// started them was broken off: nothing else would end them and their shims.
func (n *Node) endTasks() {
	if n.Containerd == nil || n.Containerd.Ended() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	tasks, err := n.Ctr(ctx, "tasks", "ls", "--quiet")
	if err != nil {
		return // it has none that can be ended
	}
	for id := range strings.FieldsSeq(tasks) {
		_, _ = n.Ctr(ctx, "tasks", "rm", "--force", id) // it may have ended by itself
	}
}

// PowerOff ends everything on the node at once and leaves what a reboot leaves:
// the disk, but no process, no mount and nothing of what lies on tmpfs.
func (n *Node) PowerOff(ctx context.Context) error {
	for _, p := range []*Process{n.Sluice, n.Teleportd, n.Containerd} {
		if p != nil && !p.Ended() {
			p.Kill()
		}
	}
	if err := n.killBelow(ctx); err != nil {
		return err
	}
	if err := UnmountAll(n.Dir); err != nil {
		return err
	}
	return errors.Join(os.RemoveAll(filepath.Join(n.Dir, "run")), os.RemoveAll(filepath.Join(n.Dir, "state")))
}

// Clear ends whatever is left of the node after Stop: of pods, and mounts, of a test
// that failed halfway.
func (n *Node) Clear() error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return errors.Join(n.killBelow(ctx), UnmountAll(n.Dir))
}

// killBelow kills the processes that the node's daemons left: those whose
// command line names its directory, and their children.
func (n *Node) killBelow(ctx context.Context) error {
	for ctx.Err() == nil {
		entries, err := os.ReadDir("/proc")
		if err != nil {
			return err
		}
		ours := map[int]bool{}
		parents := map[int]int{}
		for _, e := range entries {
			pid, err := strconv.Atoi(e.Name())
			if err != nil || pid == os.Getpid() {
				continue
			}
			stat, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))
			if _, rest, ok := strings.Cut(string(stat), ") "); ok {
				if f := strings.Fields(rest); len(f) > 1 && f[0] != "Z" {
					parents[pid], _ = strconv.Atoi(f[1])
					ours[pid] = strings.Contains(CommandLine(e.Name()), n.Dir+"/")
				}
			}
		}
		left := 0
		for pid := range parents {
			for p := pid; p > 1; p = parents[p] {
				if ours[p] {
					left++
					_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended
					break
				}
			}
		}
		if left == 0 {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return ctx.Err()
}

// Stop ends the node, its containers too, and removes its mounts; its files
// stay.
func (n *Node) Stop() error {
	n.endTasks()
	for _, p := range []*Process{n.Containerd, n.Sluice, n.Teleportd, n.Stargz} {
		if p != nil {
			p.Stop()
		}
	}
	return UnmountAll(n.Dir)
}
