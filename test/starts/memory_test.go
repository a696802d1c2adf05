package starts

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"sluice/internal/artifact"
	"sluice/internal/node/mount/control"
	"sluice/internal/remote"
	"sluice/oci"
	"sluice/test/bed"
)

const (
	mountedImages = 100
	idleTime      = 10 * time.Second
	idleTries     = 6

	// The goal is 60 MB resident. How much of that are pages of the program, which
	// are the page cache's and shared, is the kernel's choice: 27 to 45 MB. What is
	// the daemon's own is 17 to 21.
	mostMemory = 80 << 20
	mostOwn    = 28 << 20
)

// TestManyImagesMounted measures memory and processor time of a daemon with many
// images mounted that have 23,000 files each, and nothing in common that the daemon
// could know of.
func TestManyImagesMounted(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting images needs root")
	}
	refs, n := manyImages(t)
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
	used := idleTime
	for tries := 0; used > idleTime/50 && tries < idleTries; tries++ { // layers' metadata comes after the mounts
		time.Sleep(idleTime)
		before := processorTime(t, n)
		time.Sleep(idleTime) // is what is measured: it's idle
		used = processorTime(t, n) - before
	}
	resident, own := memory(t, n, "VmRSS"), memory(t, n, "RssAnon")
	t.Logf("FIGURE %d images mounted: the daemon has %.1f MB resident, %.1f MB of that its own, %.1f MB at the most; idle it takes %.2f %% of a processor",
		len(refs), float64(resident)/1e6, float64(own)/1e6, float64(peak)/1e6, 100*used.Seconds()/idleTime.Seconds())
	if resident > mostMemory || own > mostOwn {
		t.Errorf("%d bytes resident, %d of them its own: more than %d or %d", resident, own, mostMemory, mostOwn)
	}
}

// manyImages starts a registry with images and a node daemon. Each image has a diff
// ID of its own, so that its layer is no other's; the content is the same, which
// nobody here looks at.
func manyImages(t *testing.T) (refs []string, n *bed.Node) {
	t.Helper()
	const repo = "many"
	s := setUp(t)
	images, err := bed.Debian(t.Context(), func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(s.Work, repo)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	r, err := bed.StartRegistry(t.Context(), s.Sluice, dir, "SLUICE_REGISTRY_PUSH_ALLOW_STREAMING=true")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Stop() })
	if n, err = bed.NewNode(s.Tools, s.Sluice, filepath.Join(s.Work, "node"), "--no-fill"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Stop(); err != nil {
			t.Error(err)
		}
	})
	for _, step := range []func() error{
		func() error { return r.Push(t.Context(), s.Tools, images.OneLayer, repo+":0") },
		func() error { return s.Convert(t.Context(), r.Addr+"/"+repo+":0") },
		func() error { return n.StartSluice(t.Context()) },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	reg, err := remote.New(r.Addr, remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	first := readStreaming(t, reg, repo, "0")
	for i := range mountedImages {
		tag := strconv.Itoa(i + 1)
		first.renamed(t, tag).push(t, reg, repo, tag)
		refs = append(refs, r.Addr+"/"+repo+":"+tag)
	}
	return refs, n
}

// streaming is what a node reads of an image with one layer before it mounts it,
// but for the metadata.
type streaming struct {
	config, image   []byte
	table, artifact []byte
	rootSize        int64
}

// readStreaming reads an image with its artifact.
func readStreaming(t *testing.T, reg *remote.Registry, repo, tag string) streaming {
	t.Helper()
	image, err := reg.GetManifest(t.Context(), repo, tag)
	if err != nil {
		t.Fatal(err)
	}
	found := streaming{image: image.Content}
	for d, err := range reg.Referrers(t.Context(), repo, image.Descriptor.Digest, oci.ArtifactTypeStreaming) {
		if err != nil {
			t.Fatal(err)
		}
		m, err := reg.GetManifest(t.Context(), repo, d.Digest.String())
		if err != nil {
			t.Fatal(err)
		}
		found.artifact = m.Content
	}
	parsed, err := artifact.ParseManifest(found.artifact)
	if err != nil {
		t.Fatal(err)
	}
	found.rootSize = parsed.Table.RootSize
	if found.config, err = readBlob(t.Context(), reg, repo, parsed.Config.Digest); err != nil {
		t.Fatal(err)
	}
	if found.table, err = readBlob(t.Context(), reg, repo, parsed.Table.Blob.Digest); err != nil {
		t.Fatal(err)
	}
	return found
}

// renamed returns the same with another diff ID, made of the name, wherever that is
// told.
func (s streaming) renamed(t *testing.T, name string) streaming {
	t.Helper()
	var m oci.ImageManifest
	if err := json.Unmarshal(s.artifact, &m); err != nil {
		t.Fatal(err)
	}
	m.Config.Data = nil // it's another one's
	var err error
	if s.artifact, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	parsed, err := artifact.ParseManifest(s.artifact)
	if err != nil {
		t.Fatal(err)
	}
	replace := func(old, by oci.Digest, in ...*[]byte) {
		for _, b := range in {
			*b = bytes.ReplaceAll(*b, []byte(old), []byte(by))
		}
	}
	raw := func(d oci.Digest) []byte {
		b, err := hex.DecodeString(d.Encoded())
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	was, is := parsed.Layers[0].DiffID, oci.DigestOf([]byte(name))
	s.table = bytes.Replace(s.table, raw(was), raw(is), 1)
	replace(was, is, &s.config, &s.artifact)
	replace(parsed.Config.Digest, oci.DigestOf(s.config), &s.image, &s.artifact)
	replace(parsed.Subject.Digest, oci.DigestOf(s.image), &s.artifact)
	replace(parsed.Table.Blob.Digest, oci.DigestOf(s.table), &s.artifact)
	replace(parsed.Table.RootDigest, oci.DigestOf(s.table[:s.rootSize]), &s.artifact)
	return s
}

// push pushes all but the layer, which is there.
func (s streaming) push(t *testing.T, reg *remote.Registry, repo, tag string) {
	t.Helper()
	for _, content := range [][]byte{s.config, s.table} {
		desc := oci.Descriptor{Digest: oci.DigestOf(content), Size: int64(len(content))}
		if _, err := reg.PushBlob(t.Context(), repo, desc, bytes.NewReader(content)); err != nil {
			t.Fatal(err)
		}
	}
	for ref, content := range map[string][]byte{tag: s.image, oci.DigestOf(s.artifact).String(): s.artifact} {
		if _, err := reg.PushManifest(t.Context(), repo, ref, oci.MediaTypeImageManifest, content); err != nil {
			t.Fatal(err)
		}
	}
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
