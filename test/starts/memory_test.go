package starts

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"sluice/internal/node/mount/control"
	"sluice/internal/remote"
	"sluice/oci"
	"sluice/test/bed"
)

const (
	mountedImages = 100
	idleTime      = 10 * time.Second
	mostMemory    = 100 << 20 // beyond that the test fails; the goal is 60 MB
)

// TestManyImagesMounted measures memory and processor time of a daemon with many
// images mounted that have 23,000 files each.
func TestManyImagesMounted(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting images needs root")
	}
	s, n := daemonWithImage(t)
	refs := variants(t, s)
	client := control.NewClient(filepath.Join(n.Dir, "run", "control.sock"))
	for i, ref := range refs {
		dir := filepath.Join(n.Dir, "mnt", strconv.Itoa(i))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Mount(t.Context(), control.Mount{Reference: ref, Dir: dir}); err != nil {
			t.Fatal(err)
		}
	}
	peak := memory(t, n, "VmHWM")
	time.Sleep(idleTime) // is what is measured: it's idle
	before := processorTime(t, n)
	time.Sleep(idleTime)
	used := processorTime(t, n) - before
	resident := memory(t, n, "VmRSS")
	t.Logf("FIGURE %d images mounted: the daemon has %.1f MB resident, %.1f MB at the most; idle it takes %.2f %% of a processor",
		len(refs), float64(resident)/1e6, float64(peak)/1e6, 100*used.Seconds()/idleTime.Seconds())
	if resident > mostMemory {
		t.Errorf("%d bytes resident, more than %d", resident, mostMemory)
	}
}

// daemonWithImage starts a registry with an image and a node daemon.
func daemonWithImage(t *testing.T) (s *bed.Stage, n *bed.Node) {
	t.Helper()
	s = setUp(t)
	images, err := bed.Debian(t.Context(), func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	if n, err = bed.NewNode(s.Tools, s.Sluice, filepath.Join(s.Work, "node"), "--no-fill"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Stop(); err != nil {
			t.Error(err)
		}
	})
	if err := errors.Join(s.Push(t.Context(), images.OneLayer, "many:0"), n.StartSluice(t.Context())); err != nil {
		t.Fatal(err)
	}
	return s, n
}

// variants pushes images that differ from many:0 in their config, converts all
// and returns their references.
func variants(t *testing.T, s *bed.Stage) []string {
	t.Helper()
	const repo = "many"
	reg, err := remote.New(s.Registry.Addr, remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	got, err := reg.GetManifest(t.Context(), repo, "0")
	if err != nil {
		t.Fatal(err)
	}
	var m oci.ImageManifest
	if err := json.Unmarshal(got.Content, &m); err != nil {
		t.Fatal(err)
	}
	base, err := readBlob(t.Context(), reg, repo, m.Config.Digest)
	if err != nil {
		t.Fatal(err)
	}
	create := func(ref string, flags ...string) {
		if err := s.Convert(t.Context(), ref, flags...); err != nil {
			t.Fatal(err)
		}
	}
	create(s.Ref("many:0")) // its layers are everybody's
	var refs []string
	for i := range mountedImages {
		tag := strconv.Itoa(i + 1)
		config := bytes.Replace(base, []byte(`{`), fmt.Appendf(nil, `{"author":%q,`, tag), 1)
		m.Config.Digest, m.Config.Size = oci.DigestOf(config), int64(len(config))
		if _, err := reg.PushBlob(t.Context(), repo, m.Config, bytes.NewReader(config)); err != nil {
			t.Fatal(err)
		}
		content, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := reg.PushManifest(t.Context(), repo, tag, got.Descriptor.MediaType, content); err != nil {
			t.Fatal(err)
		}
		refs = append(refs, s.Ref("many:"+tag))
		create(refs[i], "--no-wait")
	}
	for _, ref := range refs {
		create(ref)
	}
	return refs
}

func readBlob(ctx context.Context, reg oci.Reader, repo string, d oci.Digest) ([]byte, error) {
	r, err := reg.GetBlob(ctx, repo, d)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

// memory returns a line of the daemon's /proc/PID/status, in bytes.
func memory(t *testing.T, n *bed.Node, line string) int64 {
	t.Helper()
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", n.Sluice.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(content), line+":")
	fields := strings.Fields(rest)
	if len(fields) < 2 {
		t.Fatalf("no %s in %s", line, content)
	}
	kb, err := strconv.ParseInt(fields[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return kb << 10
}

// processorTime returns what the daemon has used.
func processorTime(t *testing.T, n *bed.Node) time.Duration {
	t.Helper()
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", n.Sluice.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(content), ") ")
	fields := strings.Fields(rest) // from field 3 on, proc_pid_stat(5)
	var ticks int64
	for _, f := range []int{14 - 3, 15 - 3} {
		v, err := strconv.ParseInt(fields[f], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		ticks += v
	}
	return time.Duration(ticks) * 10 * time.Millisecond // USER_HZ is 100 everywhere
}
