package teleport

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sluice/internal/convert"
	"sluice/internal/index"
	"sluice/internal/operation"
	"sluice/internal/stored"
	"sluice/internal/vhd"
	"sluice/oci"
)

// check checks a disk's file against what is said of it.
func (b *bench) check(repo string, d Disk) {
	b.t.Helper()
	content, err := os.ReadFile(b.file(repo, d))
	if err != nil {
		b.t.Fatal(err)
	}
	footer, err := vhd.Read(bytes.NewReader(content), int64(len(content)))
	if err != nil || footer.ID != vhd.ID(d.Layer) || d.Size != int64(len(content)) || oci.DigestOf(content) != d.Digest {
		b.t.Errorf("%+v, %+v, %v", d, footer, err)
	}
	var sums []byte
	for block := range slices.Chunk(content, BlockSize) {
		sum := sha256.Sum256(block)
		sums = append(sums, sum[:]...)
	}
	got, err := os.ReadFile(strings.TrimSuffix(b.file(repo, d), diskSuffix) + ".sums")
	if err != nil || !bytes.Equal(got, sums) || oci.DigestOf(got) != d.SumsDigest {
		b.t.Errorf("its sums aren't those of its blocks: %v", err)
	}
}

// mount mounts the disks of an image as they are, stacked by overlayfs.
func (b *bench) mount(repo string, all []Disk) string {
	b.t.Helper()
	if os.Geteuid() != 0 {
		b.t.Skip("needs root to mount")
	}
	lower := []string{b.t.TempDir()} // overlayfs wants two
	for _, d := range all {
		dir := b.t.TempDir()
		if err := unix.Mount(b.file(repo, d), dir, "erofs", unix.MS_RDONLY, ""); errors.Is(err, unix.ENOTBLK) || errors.Is(err, unix.ENODEV) {
			b.t.Skipf("the kernel doesn't mount EROFS from files: %v", err)
		} else if err != nil {
			b.t.Fatal(err)
		}
		b.t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
		lower = append(lower, dir)
	}
	slices.Reverse(lower)
	dir := b.t.TempDir()
	if err := unix.Mount("overlay", dir, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(lower, ":")); err != nil {
		b.t.Skipf("the kernel has no overlayfs: %v", err)
	}
	b.t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func TestExpansion(t *testing.T) {
	b := newBench(t, stored.Options{})
	s := b.service(Options{})
	b.enable(s, repo)
	big := noise(1, 3<<20+5)
	desc := b.push(repo, "v1", "amd64", layerTar("dir/", "", "dir/a", "one", "dir/gone", "x"), layerTar("dir/", "", "dir/.wh.gone", "", "dir/big", big))
	state, err := s.Find(t.Context(), repo, "v1", amd64)
	if err != nil || state.Status != Expanding || state.Operation.Status != operation.StatusNotStarted {
		t.Errorf("before it begins: %+v, %v", state, err)
	}
	start(t, s)
	all := b.ready(s, repo, "v1")
	if len(all) != 2 {
		t.Fatalf("%+v", all)
	}
	for i, d := range all {
		if want := "sha256-" + d.Layer.Encoded(); d.Name != want {
			t.Errorf("layer %d is in %s", i, d.Name)
		}
		b.check(repo, d)
	}
	waitFor(t, "its operation", func() bool {
		op, err := s.ops.Latest(t.Context(), repo, desc.Digest)
		return err == nil && op.Status == operation.StatusSucceeded && op.Details == "Expansion succeeded for resource "+repo+"@"+desc.Digest.String()
	})
	dir := b.mount(repo, all)
	for name, want := range map[string]string{"dir/a": "one", "dir/big": big} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "dir/gone")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what the upper layer deletes: %v", err)
	}
}

func TestLayersAreExpandedOnce(t *testing.T) {
	b := newBench(t, stored.Options{})
	s := b.service(Options{})
	start(t, s)
	shared := layerTar("etc/", "", "etc/shared", "shared")
	first := func() []Disk { b.enable(s, repo); b.push(repo, "v1", "amd64", shared); return b.ready(s, repo, "v1") }()
	b.enable(s, "other")
	b.push("other", "v1", "amd64", shared, layerTar("etc/", "", "etc/own", "own"))
	second := b.ready(s, "other", "v1")
	if !sameFile(t, b.file(repo, first[0]), b.file("other", second[0])) {
		t.Error("the disk of a layer that two repositories have is there twice")
	}
	waitFor(t, "the counts", func() bool { return s.expanded.Load() == 2 && s.reused.Load() == 1 })
}

// A layer that doesn't describe its directories looks as on the layers below it,
// and has a disk for each such stack.
func TestLayerThatDependsOnThoseBelow(t *testing.T) {
	b := newBench(t, stored.Options{})
	s := b.service(Options{})
	start(t, s)
	b.enable(s, repo)
	vague := layerTar("tmp/file", "x")
	b.push(repo, "narrow", "amd64", layerTar("tmp/", ""), vague)
	b.push(repo, "wide", "amd64", layerTar("etc/", "", "etc/x", "x"), vague)
	modes := map[string]os.FileMode{"narrow": 0o700, "wide": 0o755}
	names := make(map[string]bool)
	for tag, mode := range modes {
		all := b.ready(s, repo, tag)
		b.check(repo, all[1])
		names[all[1].Name] = true
		info, err := os.Stat(filepath.Join(b.mount(repo, all), "tmp"))
		if err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: tmp has the mode %v, %v", tag, info.Mode(), err)
		}
	}
	if len(names) != 2 {
		t.Errorf("there is one disk: %v", names)
	}
}

func TestIndexIsExpandedForEveryPlatform(t *testing.T) {
	b := newBench(t, stored.Options{})
	s := b.service(Options{})
	start(t, s)
	b.enable(s, repo)
	amd, arm := b.push(repo, "", "amd64", layerTar("a", "amd")), b.push(repo, "", "arm64", layerTar("a", "arm"))
	b.manifest(repo, "v1", oci.MediaTypeIndex, oci.Index{
		Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeIndex, Manifests: []oci.Descriptor{amd, arm},
	})
	b.ready(s, repo, "v1")
	b.ready(s, repo, arm.Digest.String())
	state, err := s.Find(t.Context(), repo, "v1", oci.Platform{OS: "linux", Architecture: "arm64"})
	if err != nil || state.Status != Ready || state.Image.Manifest.Digest != arm.Digest {
		t.Errorf("for arm64: %+v, %v", state, err)
	}
	if _, err := s.Find(t.Context(), repo, "v1", oci.Platform{OS: "linux", Architecture: "s390x"}); !errors.Is(err, convert.ErrNoSupportedPlatform) {
		t.Errorf("for s390x: %v", err)
	}
}

// What can't be expanded says so, and doesn't wait for ever.
func TestWhatCannotBeExpanded(t *testing.T) {
	b := newBench(t, stored.Options{})
	s := b.service(Options{MaxLayer: 1 << 20, MaxImage: 3 << 19})
	start(t, s)
	b.enable(s, repo)
	large := layerTar("a", noise(1, 900_000))
	for tag, want := range map[string]string{
		"layer": ErrTooLarge.Code, "image": ErrTooLarge.Code, "lie": convert.ErrImageNotRunnable.Code, "link": ErrLayer.Code, "dangling": ErrLayer.Code,
	} {
		switch tag {
		case "layer":
			b.push(repo, tag, "amd64", layerTar("a", noise(2, 2<<20)))
		case "image":
			b.push(repo, tag, "amd64", large, layerTar("b", noise(3, 900_000)))
		case "lie":
			b.pushAs(repo, tag, "amd64", []oci.Digest{oci.DigestOf(nil)}, layerTar("c", "c"))
		case "link":
			b.push(repo, tag, "amd64", layerTar("c", "c"), hardLink("d", "c"))
		case "dangling":
			b.push(repo, tag, "amd64", hardLink("d", "c"))
		}
		if state := b.state(s, repo, tag); state.Status != Failed || state.Operation.ErrorCode != want || state.Disks != nil {
			t.Errorf("%s: %+v", tag, state)
		}
	}
	if n := s.ops.Counts.Retried.Load(); n != 0 {
		t.Errorf("%d were tried again", n)
	}
	b.push(repo, "fits", "amd64", large)
	b.ready(s, repo, "fits")
	if entries, err := os.ReadDir(s.share.pool()); err != nil || slices.ContainsFunc(entries, func(e os.DirEntry) bool { return strings.HasPrefix(e.Name(), ".") }) {
		t.Errorf("what was given up left something behind: %v, %v", entries, err)
	}
}

func TestWhoTakesPart(t *testing.T) {
	b := newBench(t, stored.Options{})
	s := b.service(Options{MaxRepositories: 2})
	start(t, s)
	b.push("late", "v1", "amd64", layerTar("a", "a"))
	if _, err := s.Find(t.Context(), "late", "v1", amd64); !errors.Is(err, ErrNotEnabled) {
		t.Errorf("not enabled: %v", err)
	}
	b.enable(s, "late")
	if state := b.state(s, "late", "v1"); state.Status != Absent {
		t.Errorf("pushed before it took part: %+v", state)
	}
	b.push("late", "v1", "amd64", layerTar("a", "a"))
	b.ready(s, "late", "v1")
	b.enable(s, "second")
	b.enable(s, "second") // again
	b.push("third", "v1", "amd64", layerTar("a", "a"))
	if _, err := s.Change(t.Context(), "third", enabled(true)); !errors.Is(err, oci.ErrDenied) || !strings.Contains(err.Error(), "late") {
		t.Errorf("a third of two: %v", err)
	}
	if row, err := s.Change(t.Context(), "third", func(a *index.Attributes) error { a.ListEnabled = false; return nil }); err != nil || row.ListEnabled {
		t.Errorf("other attributes: %+v, %v", row, err)
	}
	if _, err := s.Change(t.Context(), "late", enabled(false)); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the disks of who takes part no longer", func() bool { return b.files("") == 0 })
	b.enable(s, "third")
	if names, err := s.Enabled(t.Context()); err != nil || !slices.Equal(names, []string{"second", "third"}) {
		t.Errorf("%v, %v", names, err)
	}
}

func TestAutoEnable(t *testing.T) {
	b := newBench(t, stored.Options{ExpandAll: true})
	s := b.service(Options{MaxRepositories: 1, Auto: true})
	b.push("one", "v1", "amd64", layerTar("a", "a"))
	if state, err := s.Find(t.Context(), "one", "v1", amd64); err != nil || state.Status != Expanding {
		t.Errorf("before anybody has looked at it: %+v, %v", state, err)
	}
	start(t, s)
	waitFor(t, "the first", func() bool { names, _ := s.Enabled(t.Context()); return slices.Equal(names, []string{"one"}) })
	b.ready(s, "one", "v1")
	desc := b.push("two", "v1", "amd64", layerTar("a", "a"))
	waitFor(t, "the second", func() bool {
		op, err := s.ops.Latest(t.Context(), "two", desc.Digest)
		return err == nil && op.Status == operation.StatusSucceeded && strings.Contains(op.Details, "teleportEnabled is false")
	})
	if _, err := s.Find(t.Context(), "two", "v1", amd64); !errors.Is(err, ErrNotEnabled) {
		t.Errorf("the second of one: %v", err)
	}
}

// Without hard links, disks are copied.
func TestNoHardLinks(t *testing.T) {
	for _, err := range []error{unix.EPERM, unix.EOPNOTSUPP, unix.EMLINK} {
		if !noLinks(fmt.Errorf("link: %w", &os.LinkError{Err: err})) {
			t.Errorf("%v", err)
		}
	}
	from, to := filepath.Join(t.TempDir(), "from"), filepath.Join(t.TempDir(), "to")
	if err := os.WriteFile(from, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := (share{filepath.Dir(to)}).copyFile(from, to); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(to); err != nil || string(got) != "content" {
		t.Errorf("%q, %v", got, err)
	}
}

// One that was canceled leaves nothing either, and can be started again.
func TestStart(t *testing.T) {
	b := newBench(t, stored.Options{})
	s := b.service(Options{MaxLayer: 1 << 20})
	if _, err := s.Start(t.Context(), repo, "v1"); !errors.Is(err, convert.ErrResourceNotFound) {
		t.Errorf("what doesn't exist: %v", err)
	}
	desc := b.push(repo, "v1", "amd64", layerTar("a", "a"), layerTar("b", noise(1, 2<<20)))
	if _, err := s.Start(t.Context(), repo, "v1"); !errors.Is(err, ErrNotEnabled) {
		t.Errorf("in a repository that doesn't take part: %v", err)
	}
	b.enable(s, repo)
	op, err := s.Start(t.Context(), repo, "v1")
	if err != nil || op.Status != operation.StatusNotStarted {
		t.Fatalf("%+v, %v", op, err)
	}
	if again, err := s.Start(t.Context(), repo, desc.Digest.String()); err != nil || again.ID != op.ID {
		t.Errorf("started twice: %+v, %v", again, err)
	}
	if op, err := s.Cancel(t.Context(), repo, op.ID); err != nil || op.Status != operation.StatusCanceled {
		t.Errorf("%+v, %v", op, err)
	}
	stop := start(t, s)
	if op, err = s.Start(t.Context(), repo, "v1"); err != nil {
		t.Fatal(err)
	}
	if state := b.state(s, repo, "v1"); state.Status != Failed || state.Operation.ID != op.ID {
		t.Errorf("%+v", state)
	}
	stop()
	s = b.service(Options{})
	start(t, s)
	if _, err := s.Start(t.Context(), repo, "v1"); err != nil {
		t.Fatal(err)
	}
	b.ready(s, repo, "v1")
	waitFor(t, "the operation", func() bool {
		op, err := s.Latest(t.Context(), repo, desc.Digest)
		return err == nil && op.Status == operation.StatusSucceeded
	})
	all, err := s.Operations(t.Context(), repo, 9)
	if err != nil || len(all) != 3 || all[0].Status != operation.StatusSucceeded || all[1].ID != op.ID || all[2].Status != operation.StatusCanceled {
		t.Errorf("%+v, %v", all, err)
	}
}

func TestCancel(t *testing.T) {
	b := newBench(t, stored.Options{})
	s := b.service(Options{})
	b.enable(s, repo)
	desc := b.push(repo, "v1", "amd64", layerTar("a", "a"))
	op, err := s.ops.Latest(t.Context(), repo, desc.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if op, err = s.Cancel(t.Context(), repo, op.ID); err != nil || op.Status != operation.StatusCanceled {
		t.Errorf("%+v, %v", op, err)
	}
	start(t, s)
	if state := b.state(s, repo, "v1"); state.Status != Absent || state.Operation.Status != operation.StatusCanceled {
		t.Errorf("%+v", state)
	}
	b.push(repo, "v1", "amd64", layerTar("a", "a"))
	b.ready(s, repo, "v1")
}

func TestNames(t *testing.T) {
	layer := oci.DigestOf([]byte("a layer"))
	for _, below := range []string{"", "0123456789abcdef"} {
		name := diskName(layer, below)
		if got, ok := layerOf(name); !ok || got != layer || strings.ContainsAny(name, ":/\\") {
			t.Errorf("%s is of %s", name, got)
		}
	}
	for _, name := range []string{"", "x", "sha256-00", "sha256-" + strings.Repeat("0", 65)} {
		if d, ok := layerOf(name); ok {
			t.Errorf("%q is of %s", name, d)
		}
	}
}

// Disks with sums of other blocks are those of another version, and are made again.
func TestDisksOfAnotherVersion(t *testing.T) {
	b := newBench(t, stored.Options{})
	s := b.service(Options{})
	start(t, s)
	b.enable(s, repo)
	desc := b.push(repo, "v1", "amd64", layerTar("a/", "", "a/file", noise(1, 3<<20)))
	old := b.ready(s, repo, "v1")[0]
	waitFor(t, "the end of its expansion, which is after its disks are there", func() bool {
		op, err := s.Latest(t.Context(), repo, desc.Digest)
		return err == nil && op.Status == operation.StatusSucceeded
	})
	for _, dir := range []string{s.share.pool(), s.share.layers(repo)} {
		was := old
		was.BlockSize = 0 // as records had it that didn't say
		was.SumsDigest = oci.DigestOf([]byte("of each MiB"))
		record, err := json.Marshal(was)
		if err != nil {
			t.Fatal(err)
		}
		for name, content := range map[string][]byte{".json": record, sumsSuffix: []byte("of each MiB")} {
			name = filepath.Join(dir, old.Name+name)
			if err := errors.Join(os.Remove(name), os.WriteFile(name, content, 0o644)); err != nil {
				t.Fatal(err)
			}
		}
	}
	state, err := s.Find(t.Context(), repo, "v1", amd64)
	if err != nil || state.Status != Absent {
		t.Fatalf("%+v, %v", state, err)
	}
	if _, err := s.Start(t.Context(), repo, "v1"); err != nil {
		t.Fatal(err)
	}
	again := b.ready(s, repo, "v1")[0]
	b.check(repo, again)
	if again != old {
		t.Errorf("%+v, and then %+v", old, again)
	}
}

// Records are read from a directory that others may write to.
func FuzzRecord(f *testing.F) {
	doc, err := json.Marshal(Disk{Layer: oci.DigestOf(nil), DiffID: oci.DigestOf(nil), Size: 3, Digest: oci.DigestOf(nil), SumsDigest: oci.DigestOf(nil), BlockSize: BlockSize})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(doc)
	f.Add([]byte("{}"))
	dir := f.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "x.vhd"), []byte("abc"), 0o600); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, doc []byte) {
		if err := os.WriteFile(filepath.Join(dir, "x.json"), doc, 0o600); err != nil {
			t.Fatal(err)
		}
		d, ok, err := find(dir, "x")
		if err != nil || ok && (d.Size != 3 || d.Name != "x") {
			t.Errorf("%+v, %v", d, err)
		}
	})
}
