package whole

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sluice/test/bed"
)

// listing prints every file's attributes and content, so that two containers
// can be compared. Directories' sizes and link counts are the file system's
// own business, and so is what the runtime puts into a container, which changes
// the time of /etc.
const listing = `cd /; find . -xdev -mindepth 1 \( -path ./proc -o -path ./sys -o -path ./dev -o -path ./run -o -path ./etc/resolv.conf -o -path ./etc/hosts \) -prune -o \
	\( -path ./etc -printf '%p d %m %U:%G\n' -o -type d -printf '%p d %m %U:%G %T@\n' -o -type l -printf '%p l %U:%G %T@ %l\n' -o -printf '%p %y %m %U:%G %s %T@ %n\n' \) | LC_ALL=C sort
find . -xdev -type f -not -path './proc/*' -not -path './sys/*' -not -path './run/*' -not -path ./etc/resolv.conf -not -path ./etc/hosts -print0 | LC_ALL=C sort -z | xargs -0 sha256sum`

// TestStreamedEqualsPulled compares every attribute and every byte.
func TestStreamedEqualsPulled(t *testing.T) {
	s := theStage(t)
	n := s.node(t)
	plain := s.Ref("plain/debian:28")
	pull(t, n, bed.Overlayfs, plain)
	want := run(t, n, bed.Overlayfs, plain, listing)
	if strings.Count(want, "\n") < 20_000 {
		t.Fatalf("the listing of the pulled image is too short: %.500s", want)
	}
	for _, name := range []string{"debian:1", "debian:28"} {
		ref := s.Ref(name)
		pull(t, n, bed.Sluice, ref)
		before := erofsMounts(t, n)
		got := run(t, n, bed.Sluice, ref, listing)
		if got != want {
			t.Errorf("%s, streamed, differs from the pulled image: %s", name, firstDifference(got, want))
		}
		if before == 0 {
			t.Errorf("%s was not streamed: no EROFS is mounted", name)
		}
	}
	if m := erofsMounts(t, n); m != 2 {
		t.Errorf("%d EROFS mounts for two images, one of them with 28 layers; want one each", m)
	}
}

func firstDifference(got, want string) string {
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := range min(len(g), len(w)) {
		if g[i] != w[i] {
			return "got " + g[i] + ", want " + w[i]
		}
	}
	return "one is longer"
}

// TestContainersWrite checks that containers on one streamed image write
// into layers of their own.
func TestContainersWrite(t *testing.T) {
	s := theStage(t)
	n := s.node(t)
	ref := s.Ref("debian:28")
	pull(t, n, bed.Sluice, ref)
	out := run(t, n, bed.Sluice, ref, `set -e; echo mine >> /etc/passwd; rm -r /usr/share/doc; mkdir -p /usr/share/doc/new; chmod 700 /opt; tail -n1 /etc/passwd; ls /usr/share/doc`)
	if out != "mine\nnew\n" {
		t.Errorf("the writing container saw %q", out)
	}
	out = run(t, n, bed.Sluice, ref, `tail -n1 /etc/passwd; ls /usr/share/doc | wc -l`)
	if strings.Contains(out, "mine") || strings.HasSuffix(out, "\n1\n") {
		t.Errorf("the next container sees what the first one wrote: %q", out)
	}
}

// TestPullsByEveryName streams by tag, by digest, and through an index.
func TestPullsByEveryName(t *testing.T) {
	s := theStage(t)
	image := s.Ref("debian:28")
	digest := s.crane(t, "digest", image)
	s.crane(t, "index", "append", "-m", image, "-t", s.Ref("debian:index"))
	if err := s.Convert(t.Context(), s.Ref("debian:index")); err != nil {
		t.Fatalf("converting an index: %v", err)
	}
	index := s.crane(t, "digest", s.Ref("debian:index"))
	for _, name := range []string{"debian:28", "debian@" + digest, "debian:index", "debian@" + index} {
		t.Run(name[:min(len(name), 20)], func(t *testing.T) {
			n := s.node(t)
			ref := s.Ref(name)
			pull(t, n, bed.Sluice, ref)
			if out := run(t, n, bed.Sluice, ref, "python3 -c 'print(6*7)'"); out != "42\n" {
				t.Errorf("printed %q", out)
			}
			if erofsMounts(t, n) != 1 {
				t.Error("not streamed")
			}
		})
	}
}

// TestWithoutArtifactPullsOrdinarily uses the streaming snapshotter for an
// image that has no streaming artifact, and asks why it did not stream.
func TestWithoutArtifactPullsOrdinarily(t *testing.T) {
	s := theStage(t)
	n := s.node(t)
	// The same layers lie in a repository without an artifact.
	ref := s.Ref("plain/debian:28")
	pull(t, n, bed.Sluice, ref)
	if out := run(t, n, bed.Sluice, ref, "python3 -c 'print(6*7)'"); out != "42\n" {
		t.Errorf("printed %q", out)
	}
	if erofsMounts(t, n) != 0 {
		t.Error("something was streamed")
	}
	out, err := n.Command(t.Context(), "node", "status").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if !strings.Contains(string(out), "NoStreamingArtifact") {
		t.Errorf("sluice node status does not say why the image did not stream:\n%s", out)
	}
}

// TestSurvivesRestartWithoutRegistry kills the daemon under a running
// container, starts it with the registry gone, and reads on.
func TestSurvivesRestartWithoutRegistry(t *testing.T) {
	s := theStage(t)
	n := s.node(t)
	link, err := bed.NewLink(t.Context(), s.Registry.Addr, 50e6, 0) // too slow for the background to bring everything
	if err != nil {
		t.Fatal(err)
	}
	defer link.Close()
	ref := link.Addr() + "/debian:28"
	pull(t, n, bed.Sluice, ref)
	if out := run(t, n, bed.Sluice, ref, "python3 -c 'import numpy; print(numpy.arange(9).sum())'"); out != "36\n" {
		t.Fatalf("printed %q", out)
	}
	link.Close()
	n.Sluice.Kill()
	if err := n.StartSluice(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := n.AwaitConnection(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := bed.DropCaches(); err != nil {
		t.Fatal(err)
	}
	if out := run(t, n, bed.Sluice, ref, "python3 -c 'import numpy; print(numpy.arange(9).sum())'"); out != "36\n" {
		t.Errorf("after a restart without the registry a container printed %q", out)
	}
}

// TestWithoutContainerd mounts and runs an image on a machine that has
// nothing but runc.
func TestWithoutContainerd(t *testing.T) {
	s := theStage(t)
	root, err := os.MkdirTemp(s.Work, "alone-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// The daemon ends by itself, its holder and all its mounts with it,
		// which needs the directory.
		for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
			left, err := bed.Mounts(root)
			if err == nil && len(left) == 0 {
				return
			}
			if err != nil || time.Now().After(deadline) {
				t.Errorf("mounts that stay: %v, %v", left, errors.Join(err, bed.UnmountAll(root)))
				return
			}
		}
	})
	own := []string{"--root", root, "--run", filepath.Join(root, "run")}
	image, dir := s.Ref("debian:28"), filepath.Join(root, "mnt")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	sluice := func(verb string, args ...string) string {
		t.Helper()
		args = slices.Concat([]string{verb}, own, args)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, s.Sluice, args...)
		cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(s.Tools.Runc)+":"+os.Getenv("PATH"))
		out, err := cmd.Output()
		if err != nil {
			problem := ""
			var e *exec.ExitError
			if errors.As(err, &e) {
				problem = string(e.Stderr)
			}
			t.Fatalf("sluice %s: %v\n%s%s", strings.Join(args, " "), err, out, problem)
		}
		return string(out)
	}
	sluice("mount", image, dir)
	b, err := os.ReadFile(filepath.Join(dir, "etc/debian_version"))
	if err != nil || !strings.HasPrefix(string(b), "12") {
		t.Errorf("etc/debian_version in the mount: %q, %v", b, err)
	}
	sluice("umount", dir)
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("after umount the directory holds %d entries, %v", len(entries), err)
	}
	if out := sluice("run", image, "python3", "-c", "print(6*7)"); out != "42\n" {
		t.Errorf("sluice run printed %q", out)
	}
}
