package disks

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/artifact"
	"sluice/internal/erofs"
	"sluice/internal/layer"
	"sluice/internal/node/mount"
	"sluice/internal/node/plane"
	"sluice/internal/node/smb"
	"sluice/internal/teleport/mountapi"
	"sluice/internal/vhd"
	"sluice/oci"
)

// refused pulls an image that can't be mounted, and returns why.
func (n *node) refused(manifest oci.Digest) mount.Reason {
	n.t.Helper()
	began := time.Now()
	img, err := n.m.Pull(n.t.Context(), n.ref(testRepo, "v1"), manifest)
	if err == nil {
		n.t.Errorf("%+v", img)
	}
	if d := time.Since(began); d > 20*time.Second {
		n.t.Errorf("it took %v to say %v", d, err)
	}
	return mount.ReasonOf(err)
}

// Whatever the registry answers, there's a reason by which the image is pulled the
// ordinary way, and nothing is left of it.
func TestAnswers(t *testing.T) {
	n := newNode(t)
	manifest := n.push(testRepo, "v1", testLayers()...)
	n.opts.Remember = time.Nanosecond
	n.opts.Region = "here"
	m := n.start()
	m.Settled()
	refusing := func(status int, code string) func(http.ResponseWriter) {
		return func(w http.ResponseWriter) { refuse(w, status, code) }
	}
	saying := func(status int, text string) func(http.ResponseWriter) {
		return func(w http.ResponseWriter) { w.WriteHeader(status); fmt.Fprint(w, text) }
	}
	for what, c := range map[string]struct {
		answer func(http.ResponseWriter)
		want   mount.Reason
	}{
		"not enabled":     {refusing(404, mountapi.CodeNotEnabled), mount.NoStreamingArtifact},
		"canceled":        {refusing(404, mountapi.CodeNotExpanded), mount.NoStreamingArtifact},
		"no such image":   {refusing(404, "MANIFEST_UNKNOWN"), mount.NoStreamingArtifact},
		"expanding":       {refusing(409, mountapi.CodeExpanding), mount.ConversionPending},
		"failed":          {refusing(422, mountapi.CodeFailed), mount.NoStreamingArtifact},
		"no such API":     {saying(404, "404 page not found"), mount.RegistryUnsupported},
		"no such path":    {refusing(404, "NOT_FOUND"), mount.RegistryUnsupported},
		"another API":     {saying(200, "<html>Welcome</html>"), mount.RegistryUnsupported},
		"nothing":         {saying(200, ""), mount.RegistryUnsupported},
		"an empty object": {saying(200, "{}"), mount.RegistryUnsupported},
		"who asks?":       {saying(401, ""), mount.Unauthorized},
		"not allowed":     {refusing(403, "DENIED"), mount.Unauthorized},
		"broken":          {saying(500, "oops"), mount.RegistryUnavailable},
		"overloaded":      {saying(429, ""), mount.RegistryUnavailable},
	} {
		n.instead(c.answer)
		if got := n.refused(manifest); got != c.want {
			t.Errorf("%s: %q, want %q", what, got, c.want)
		}
	}
	n.instead(nil)
	long := strings.Repeat("x", 4000)
	for what, c := range map[string]struct {
		change func(*mountapi.Mount)
		want   mount.Reason
	}{
		"another region":     {func(m *mountapi.Mount) { m.Format, m.SMB = mountapi.FormatBlob, nil }, mount.NoStreamingArtifact},
		"another platform":   {func(m *mountapi.Mount) { m.Platform.Architecture = "s390x" }, mount.PlatformUnsupported},
		"no digest":          {func(m *mountapi.Mount) { m.Digest = "" }, mount.IntegrityFailure},
		"no sums":            {func(m *mountapi.Mount) { m.Layers[1].Sums = nil }, mount.IntegrityFailure},
		"no path":            {func(m *mountapi.Mount) { m.Layers[1].Path = "" }, mount.IntegrityFailure},
		"a path out of here": {func(m *mountapi.Mount) { m.Layers[1].Path = "../../etc/passwd" }, mount.RegistryUnavailable},
		"a path of nothing":  {func(m *mountapi.Mount) { m.Layers[1].Path = long }, mount.RegistryUnavailable},
		"sums of nothing":    {func(m *mountapi.Mount) { m.Layers[1].Sums.Path = "elsewhere" }, mount.RegistryUnavailable},
		"no block size":      {func(m *mountapi.Mount) { m.Layers[1].Sums.BlockSize = 0 }, mount.IntegrityFailure},
		"tiny blocks":        {func(m *mountapi.Mount) { m.Layers[1].Sums.BlockSize = 512 }, mount.IntegrityFailure},
		"huge blocks":        {func(m *mountapi.Mount) { m.Layers[1].Sums.BlockSize = 1 << 20 }, mount.IntegrityFailure},
		"too large":          {func(m *mountapi.Mount) { m.Layers[1].Size = 1 << 60 }, mount.IntegrityFailure},
		"another size":       {func(m *mountapi.Mount) { m.Layers[1].Size += 512 }, mount.IntegrityFailure},
		"tiny":               {func(m *mountapi.Mount) { m.Layers[1].Size = 1 }, mount.IntegrityFailure},
		"another disk": {func(m *mountapi.Mount) {
			m.Layers[1].Path, m.Layers[1].Size = m.Layers[0].Path, m.Layers[0].Size
		}, mount.IntegrityFailure},
		"other sums": {func(m *mountapi.Mount) { m.Layers[1].Sums.Digest = oci.DigestOf(nil) }, mount.IntegrityFailure},
	} {
		was := n.mounts[testRepo+" "+manifest.String()]
		n.change(testRepo, manifest.String(), c.change)
		if got := n.refused(manifest); got != c.want {
			t.Errorf("%s: %q, want %q", what, got, c.want)
		}
		n.change(testRepo, manifest.String(), func(m *mountapi.Mount) { *m = was })
	}
	m.Sweep(t.Context(), time.Now())
	n.removed()
	n.stacked(n.pull(testRepo, "v1", manifest).ID, "me", want())
	if o, ok := m.LastPull(n.ref(testRepo, "v1")); !ok || o.Reason != "" || o.Artifact == "" {
		t.Errorf("%+v, %t", o, ok)
	}
}

// evil puts a disk, whose sums are right, in the place of a layer's.
func (n *node) evil(manifest oci.Digest, i int, disk []byte) {
	n.change(testRepo, manifest.String(), func(m *mountapi.Mount) {
		l := n.share(append([]byte("evil"), disk...), disk)
		l.Digest, l.DiffID = m.Layers[i].Digest, m.Layers[i].DiffID
		m.Layers[i] = l
	})
}

// Disks that are what the registry says, and yet none that a kernel may get.
func TestDisksThatAreNone(t *testing.T) {
	n := newNode(t)
	manifest := n.push(testRepo, "v1", testLayers()...)
	n.opts.Remember = time.Nanosecond
	m := n.start()
	m.Settled()
	good := diskOfTar(t, tarOf(t, testLayers()[1]))
	root0 := int64(binary.LittleEndian.Uint32(good[1024+40:]))*512 + 512 // the root's inode
	image := func(img erofs.Image, rest int) []byte {
		var b bytes.Buffer
		if _, err := erofs.Write(&b, img); err != nil {
			t.Fatal(err)
		}
		return sealed(t, "x", append(b.Bytes(), make([]byte, rest)...))
	}
	root := &erofs.Inode{Mode: unix.S_IFDIR | 0o755}
	altered := func(at int64, to byte) []byte {
		b := bytes.Clone(good)
		b[at] ^= to
		return b
	}
	was := n.mounts[testRepo+" "+manifest.String()]
	for what, disk := range map[string][]byte{
		"zeros":                    make([]byte, 1<<20),
		"no footer":                append(bytes.Clone(good[:len(good)-512]), make([]byte, 512)...),
		"a footer's checksum":      altered(int64(len(good))-512+100, 1),
		"a footer of another size": append(bytes.Clone(good[:len(good)-1024]), good[len(good)-512:]...),
		"no file system":           sealed(t, "x", make([]byte, 1<<20)),
		"another file system":      altered(1024, 0xff),
		"a wrong checksum":         altered(1024+20, 1),
		"an altered inode":         altered(root0+44, 0xff),
		"no devices":               image(erofs.Image{Root: root}, 1<<20),
		"devices beyond its end":   image(erofs.Image{Root: root, Devices: []erofs.Device{{Size: 1 << 30}}}, 1<<20),
		"three devices":            image(erofs.Image{Root: root, Devices: make([]erofs.Device, 3)}, 1<<20),
	} {
		n.evil(manifest, 1, disk)
		if got := n.refused(manifest); got != mount.IntegrityFailure {
			t.Errorf("%s: %q", what, got)
		}
		n.change(testRepo, manifest.String(), func(m *mountapi.Mount) { *m = was })
	}
	m.Sweep(t.Context(), time.Now())
	n.removed()
}

// A file server that sends something else than the registry says: nothing of it is
// mounted, or read.
func TestAlteredFiles(t *testing.T) {
	n := newNode(t)
	manifest := n.push(testRepo, "v1", testLayers()...)
	n.opts.Remember = time.Nanosecond
	n.start()
	api := n.mounts[testRepo+" "+manifest.String()]
	l := api.Layers[0]
	disk, sums := diskOfTar(t, tarOf(t, testLayers()[0])), sumsOf(diskOfTar(t, tarOf(t, testLayers()[0])), blockSize)
	flip := func(b []byte, at int) []byte {
		b = bytes.Clone(b)
		b[at] ^= 1
		return b
	}
	for what, c := range map[string]struct{ disk, sums []byte }{
		"a byte of the metadata": {flip(disk, 1100), sums},
		"a byte of the footer":   {flip(disk, len(disk)-100), sums},
		"a byte of the sums":     {disk, flip(sums, 33)},
		"a truncated disk":       {disk[:len(disk)-512], sums},
		"half a disk":            {disk[:len(disk)/2], sums},
		"an empty disk":          {nil, sums},
		"a longer disk":          {append(bytes.Clone(disk), 0), sums},
		"truncated sums":         {disk, sums[:32]},
		"no sums":                {disk, nil},
		"more sums":              {disk, append(bytes.Clone(sums), sums...)},
	} {
		n.files.Put(l.Path, c.disk)
		n.files.Put(l.Sums.Path, c.sums)
		n.reconnect() // nobody has what was there before open
		if got := n.refused(manifest); got != mount.IntegrityFailure {
			t.Errorf("%s: %q", what, got)
		}
	}
	n.files.Put(l.Sums.Path, sums)
	n.files.Remove(l.Path)
	n.reconnect()
	if got := n.refused(manifest); got != mount.RegistryUnavailable {
		t.Errorf("no disk: %q", got)
	}

	// A block that nobody reads at first.
	const at = 2 << 20
	n.files.Put(l.Path, flip(disk, at))
	n.reconnect()
	n.files.Put(l.Sums.Path, sums)
	img := n.pull(testRepo, "v1", manifest)
	dirs, err := n.m.Stack(t.Context(), img.ID, "me")
	if err != nil {
		t.Fatal(err)
	}
	big := filepath.Join(dirs[2], "big")
	if _, err := os.ReadFile(big); !errors.Is(err, unix.EIO) {
		t.Errorf("an altered block: %v", err)
	}
	f, err := os.Open(big)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 4096)
	if _, err := f.ReadAt(buf, 1<<20); err != nil || string(buf) != want()["big"][1<<20:1<<20+4096] {
		t.Errorf("a block beside it: %v", err)
	}
	n.files.Alter(l.Path, func([]byte) []byte { return disk })
	n.stacked(img.ID, "me", want())
}

// A file server that can't be reached, or hangs, or wants other credentials.
func TestFileServer(t *testing.T) {
	n := newNode(t)
	manifest := n.push(testRepo, "v1", testLayers()...)
	n.opts.Remember, n.opts.Fetch = time.Nanosecond, 5*time.Second
	n.cache.FaultTimeout, n.patience = 15*time.Second, 2*time.Second
	m := n.start()
	n.files.Down()
	if got := n.refused(manifest); got != mount.RegistryUnavailable {
		t.Errorf("down: %q", got)
	}
	n.files.Up()
	n.files.Mute()
	if got := n.refused(manifest); got != mount.RegistryUnavailable {
		t.Errorf("mute: %q", got)
	}
	n.files.Up()
	n.files.Accept("another password")
	if got := n.refused(manifest); got != mount.Unauthorized {
		t.Errorf("refused: %q", got)
	}
	n.nextPassword()
	img := n.pull(testRepo, "v1", manifest)
	dirs, err := m.Stack(t.Context(), img.ID, "me")
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(filepath.Join(dirs[2], "big"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	read := func(off int64) error {
		buf := make([]byte, 4096)
		_, err := f.ReadAt(buf, off)
		if err == nil && string(buf) != want()["big"][off:off+4096] {
			t.Fatalf("WRONG BYTES at %d", off)
		}
		return err
	}
	for what, stop := range map[string]func(){"down": n.files.Down, "mute": n.files.Mute} {
		stop()
		began := time.Now()
		if err := read(3<<20 - 4096); !errors.Is(err, unix.EIO) || time.Since(began) > 30*time.Second {
			t.Errorf("%s: after %v: %v", what, time.Since(began), err)
		}
		if s := m.Status(t.Context()); s.Shares[0].Problem == "" {
			t.Errorf("%s: %+v", what, s.Shares)
		}
		n.files.Up()
	}
	deadline := time.Now().Add(time.Minute)
	for err = read(3<<20 - 4096); err != nil && time.Now().Before(deadline); err = read(3<<20 - 4096) {
	}
	if err != nil {
		t.Errorf("it doesn't heal: %v", err)
	}
	// A credential that the server knows no more, after the connection broke, is
	// asked for again.
	n.reconnect()
	n.nextPassword()
	for err = read(1 << 20); err != nil && time.Now().Before(deadline); err = read(1 << 20) {
	}
	if err != nil {
		t.Errorf("with another password: %v", err)
	}
	if s := m.Status(t.Context()); s.Shares[0].Problem != "" {
		t.Errorf("%+v", s.Shares)
	}
}

// What is stored and isn't what it was is lost, and pulled again by who needs it.
func TestDamagedState(t *testing.T) {
	damage := map[string]func(t *testing.T, n *node, d string){
		"head altered":     func(t *testing.T, n *node, d string) { flipByte(t, filepath.Join(d, fileHead), 3000) },
		"head truncated":   func(t *testing.T, n *node, d string) { truncate(t, filepath.Join(d, fileHead), 4096) },
		"head empty":       func(t *testing.T, n *node, d string) { truncate(t, filepath.Join(d, fileHead), 0) },
		"head lost":        func(t *testing.T, n *node, d string) { remove(t, filepath.Join(d, fileHead)) },
		"sums altered":     func(t *testing.T, n *node, d string) { flipByte(t, filepath.Join(d, fileSums), 10) },
		"sums truncated":   func(t *testing.T, n *node, d string) { truncate(t, filepath.Join(d, fileSums), 32) },
		"all of it lost":   func(t *testing.T, n *node, d string) { remove(t, d) },
		"record altered":   func(t *testing.T, n *node, d string) { flipByte(t, record1(t, n), 60) },
		"record truncated": func(t *testing.T, n *node, d string) { truncate(t, record1(t, n), 100) },
		"record of lies": func(t *testing.T, n *node, d string) {
			if err := os.WriteFile(record1(t, n), []byte(`{"record":{"layers":[{"disk":{"size":-1}}]}}`), 0o600); err != nil {
				t.Fatal(err)
			}
		},
	}
	for what, harm := range damage {
		t.Run(what, func(t *testing.T) {
			n := newNode(t)
			manifest := n.push(testRepo, "v1", testLayers()...)
			m := n.start()
			img := n.pull(testRepo, "v1", manifest)
			d := m.images[img.ID].disks[0].dir
			n.reboot()
			harm(t, n, d)
			n.files.Down() // the start doesn't need it
			m = n.start()
			err := m.Hold(t.Context(), img.ID, 2, "snapshot")
			if err == nil {
				_, err = m.Stack(t.Context(), img.ID, "me")
			}
			if !errors.Is(err, mount.ErrUnknownImage) {
				t.Errorf("%v, want that it's unknown", err)
			}
			n.files.Up()
			if again := n.pull(testRepo, "v1", manifest); again.ID != img.ID {
				t.Errorf("%+v", again)
			}
			n.stacked(img.ID, "me", want())
			m.Settled()
			m.Sweep(t.Context(), time.Now())
			n.stop()
			n.start() // what was stored is good again
			n.stacked(img.ID, "me", want())
		})
	}
}

// A pull notices, too, what isn't what it was.
func TestDamagedStateIsPulledAgain(t *testing.T) {
	n := newNode(t)
	manifest := n.push(testRepo, "v1", testLayers()...)
	m := n.start()
	img := n.pull(testRepo, "v1", manifest)
	d := m.images[img.ID].disks[0].dir
	n.reboot()
	flipByte(t, filepath.Join(d, fileHead), 3000)
	n.start()
	if again := n.pull(testRepo, "v1", manifest); again.ID != img.ID {
		t.Errorf("%+v", again)
	}
	n.stacked(img.ID, "me", want())
}

func record1(t *testing.T, n *node) string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(n.root, "node", "images", "*"+recordSuffix))
	if err != nil || len(names) != 1 {
		t.Fatal(names, err)
	}
	return names[0]
}

func flipByte(t *testing.T, name string, at int) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	b[at] ^= 1
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func truncate(t *testing.T, name string, size int64) {
	t.Helper()
	if err := os.Truncate(name, size); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, name string) {
	t.Helper()
	if err := os.RemoveAll(name); err != nil {
		t.Fatal(err)
	}
}

// Who runs an image without containerd compares the diff IDs by its config.
func TestConfigIsTheImages(t *testing.T) {
	n := newNode(t)
	manifest := n.push(testRepo, "v1", testLayers()...)
	other := n.push(testRepo, "v2", testLayers()[0], testLayers()[2], testLayers()[1])
	m := n.start()
	n.change(testRepo, "v1", func(m *mountapi.Mount) {
		m.Layers = slices.Clone(n.mountOf(other).Layers)
	})
	img := n.pull(testRepo, "v1", "")
	if _, err := m.Config(t.Context(), img.ID); mount.ReasonOf(err) != mount.IntegrityFailure {
		t.Errorf("disks of another image: %v", err)
	}
	n.change(testRepo, manifest.String(), func(m *mountapi.Mount) { m.Digest = other; m.Layers = n.mountOf(other).Layers })
	pinned, err := m.Pull(t.Context(), n.host()+"/"+testRepo+"@"+manifest.String(), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Config(t.Context(), pinned.ID); mount.ReasonOf(err) != mount.IntegrityFailure {
		t.Errorf("another image than the one that was named: %v", err)
	}
}

func (n *node) mountOf(manifest oci.Digest) mountapi.Mount {
	return n.mounts[testRepo+" "+manifest.String()]
}

// One credential does for all who wait for it.
func TestCredentialsAreAskedForOnce(t *testing.T) {
	n := newNode(t)
	var layers [][]file
	for i := range 28 {
		layers = append(layers, []file{{name: fmt.Sprint("file", i), content: noise(uint64(i), 600_000)}})
	}
	manifest := n.push(testRepo, "v1", layers...)
	n.life = -time.Hour // by this machine's clock, which is wrong
	m := n.start()
	img := n.pull(testRepo, "v1", manifest)
	dirs, err := m.Stack(t.Context(), img.ID, "me")
	if err != nil {
		t.Fatal(err)
	}
	n.nextPassword()
	n.reconnect()
	asked := n.asked.Load()
	var readers sync.WaitGroup
	for i, dir := range dirs {
		readers.Go(func() {
			name := fmt.Sprint("file", len(dirs)-1-i)
			if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, noise(uint64(len(dirs)-1-i), 600_000)) {
				t.Errorf("%s: %d bytes, %v", name, len(got), err)
			}
		})
	}
	readers.Wait()
	if got := n.asked.Load() - asked; got < 1 || got > 3 {
		t.Errorf("the registry was asked %d times for one credential", got)
	}
}

// Pulls of images that share layers, removal, and mounts, all at once.
func TestAtOnce(t *testing.T) {
	n := newNode(t)
	layers := testLayers()
	images := map[string]oci.Digest{
		"v1": n.push(testRepo, "v1", layers...),
		"v2": n.push(testRepo, "v2", layers[0], layers[1]),
		"v3": n.push(testRepo, "v3", layers[2], layers[1], layers[2]),
	}
	n.opts.Remember = time.Nanosecond
	m := n.start()
	m.Settled()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	var all sync.WaitGroup
	for tag, manifest := range images {
		for i := range 2 {
			all.Go(func() {
				owner := fmt.Sprint(tag, i)
				for ctx.Err() == nil {
					img, err := m.Pull(t.Context(), n.ref(testRepo, tag), manifest)
					if err != nil {
						t.Error(err)
						return
					}
					dirs, err := m.Stack(t.Context(), img.ID, owner)
					if err != nil && !errors.Is(err, mount.ErrUnknownImage) { // it was removed meanwhile
						t.Error(err)
						return
					}
					alone(func() {
						for _, dir := range dirs {
							if entries, err := os.ReadDir(dir); err != nil || len(entries) == 0 {
								t.Errorf("%s: %v, %v", dir, entries, err)
							}
						}
					})
					if err := m.Release(t.Context(), owner); err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
	all.Go(func() {
		for ctx.Err() == nil {
			m.Sweep(t.Context(), time.Now())
			m.Status(t.Context())
		}
	})
	all.Wait()
	m.Sweep(t.Context(), time.Now())
	n.removed()
}

// A layer with sparse files has a second device.
func TestSparseLayer(t *testing.T) {
	var sparse bytes.Buffer
	content := noise(5, 100_000)
	raw := sparseTar("holes", content)
	tree, err := layer.Read(t.Context(), bytes.NewReader(raw), layer.Options{Sparse: &sparse})
	if err != nil {
		t.Fatal(err)
	}
	meta, err := artifact.DiskMetadata([]*layer.Tree{tree}, oci.DigestOf(raw))
	if err != nil || sparse.Len() == 0 {
		t.Fatal(sparse.Len(), err)
	}
	pad := func(b []byte) []byte { return append(b, make([]byte, -len(b)&511)...) }
	disk := sealed(t, "x", slices.Concat(meta, pad(raw), pad(sparse.Bytes())))
	n := newNode(t)
	manifest := n.push(testRepo, "v1", testLayers()...)
	n.evil(manifest, 2, disk)
	n.start()
	img := n.pull(testRepo, "v1", manifest)
	w := want()
	delete(w, "top")
	w["holes"] = string(content) + string(make([]byte, 100_000))
	n.stacked(img.ID, "me", w)
	if got := len(n.m.images[img.ID].disks[2].windows); got != 2 {
		t.Errorf("%d devices", got)
	}
}

// A machine that can't mount says so at the pull.
func TestNoPlane(t *testing.T) {
	n := newNode(t)
	manifest := n.push(testRepo, "v1", testLayers()...)
	n.start()
	opts := n.m.opts
	opts.Root = t.TempDir()
	opts.Plane = mount.NoPlane(&plane.UnsupportedError{Reasons: []string{"no EROFS"}})
	m, err := Open(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if _, err := m.Pull(t.Context(), n.ref(testRepo, "v1"), manifest); mount.ReasonOf(err) != mount.PlaneUnavailable {
		t.Errorf("%v", err)
	}
}

func TestHints(t *testing.T) {
	n := newNode(t)
	manifest := n.push(testRepo, "v1", testLayers()...)
	m := n.start()
	ref := n.ref(testRepo, "v1")
	if m.Judges(n.host(), false) {
		t.Error("a registry of which nothing is known")
	}
	end := m.OptOut(ref, "a pod doesn't want it")
	if got := n.refused(manifest); got != mount.Disabled {
		t.Error(got)
	}
	end()
	end() // only once
	if err := m.WhyPresent(t.Context(), ref); mount.ReasonOf(err) != mount.AlreadyPresent {
		t.Error(err)
	}
	m.Expect(ref)
	img := n.pull(testRepo, "v1", manifest)
	if !m.Judges(n.host(), false) {
		t.Error("the registry of an image that is here")
	}
	got, here, size, err := m.Arrived(t.Context(), img.ID)
	if err != nil || got.ID != img.ID || here <= 0 || here > size || size < 3<<20+700_000 {
		t.Errorf("%+v, %d of %d, %v", got, here, size, err)
	}
	if err := m.WhyPresent(t.Context(), n.ref("team/none", "v1")); mount.ReasonOf(err) != mount.NoStreamingArtifact {
		t.Error(err)
	}
	if n.m.opts.Linger != 10*time.Minute || vhd.FooterSize != 512 {
		t.Error("defaults")
	}
}

// What the registry refused is asked for again as soon as there are other credentials.
func TestOtherCredentials(t *testing.T) {
	n := newNode(t)
	manifest := n.push(testRepo, "v1", testLayers()...)
	var who atomic.Value
	who.Store("nobody")
	n.opts.Identity = func(_, _ string) string { return who.Load().(string) }
	n.start()
	n.instead(func(w http.ResponseWriter) { w.WriteHeader(http.StatusUnauthorized) })
	if got := n.refused(manifest); got != mount.Unauthorized {
		t.Fatal(got)
	}
	n.instead(nil)
	if got := n.refused(manifest); got != mount.Unauthorized {
		t.Errorf("for the same, within a minute: %q", got)
	}
	who.Store("somebody")
	n.pull(testRepo, "v1", manifest)
}

// Records of images are read from a disk that may have anything.
func FuzzRecord(f *testing.F) {
	c := content{Digest: oci.DigestOf(nil), Size: 1 << 20, Sums: oci.DigestOf(nil), BlockSize: blockSize}
	r := record{Manifest: oci.DigestOf(nil), Layers: []layerRecord{{oci.DigestOf(nil), oci.DigestOf(nil), c}}}
	for _, s := range []stored{{Record: r, Origins: []origin{{"r", "h", "n", []string{"p"}}}}, {}} {
		doc, err := json.Marshal(s)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(doc, make([]byte, 4*32))
	}
	root := f.TempDir()
	f.Fuzz(func(t *testing.T, doc, sums []byte) {
		m := &Manager{images: make(map[oci.Digest]*image), disks: make(map[content]*disk), repos: make(map[repoName]*repo), known: make(map[subject]oci.Digest)}
		m.opts.Root = root
		m.opts.Share = func(func(context.Context, string) (smb.Login, error)) smb.Share { return nil }
		var s stored
		_ = json.Unmarshal(doc, &s)
		id := s.Record.id()
		write := func(name string, b []byte) {
			if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(name, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		write(m.fileName(id, recordSuffix), doc)
		for _, l := range s.Record.Layers {
			write(filepath.Join(m.disksDir(), l.Disk.name(), fileSums), sums)
		}
		if m.loadImage(id) != nil {
			return
		}
		for _, d := range m.images[id].disks {
			if d.device == nil || d.check() != nil || int64(d.device.Chunks) != d.blocks() {
				t.Errorf("%+v", d.content)
			}
		}
	})
}

// Metadata of more than a block, as of a layer with many files.
func TestLargeMetadata(t *testing.T) {
	n := newNode(t)
	files := []file{{name: "many/", kind: tar.TypeDir}}
	content := make(map[string]string)
	for i := range 10_000 {
		name := fmt.Sprintf("many/file %d", i)
		files = append(files, file{name: name})
		content[name] = ""
	}
	files = append(files, file{name: "last", content: []byte("last")})
	content["last"] = "last"
	manifest := n.push(testRepo, "v1", files)
	n.opts.Remember = time.Nanosecond
	m := n.start()
	m.Settled()
	l := n.mounts[testRepo+" "+manifest.String()].Layers[0]
	n.files.Alter(l.Path, func(b []byte) []byte { b[blockSize+5000] ^= 1; return b })
	if got := n.refused(manifest); got != mount.IntegrityFailure {
		t.Errorf("a byte of the second block: %q", got)
	}
	m.Sweep(t.Context(), time.Now())
	n.removed()
	n.files.Alter(l.Path, func(b []byte) []byte { b[blockSize+5000] ^= 1; return b })
	img := n.pull(testRepo, "v1", manifest)
	if fi, err := os.Stat(filepath.Join(m.images[img.ID].disks[0].dir, fileHead)); err != nil || fi.Size() < 3*blockSize || fi.Size()%blockSize != 0 {
		t.Errorf("the head has %d bytes, %v", fi.Size(), err)
	}
	n.stacked(img.ID, "me", content)
	n.reboot()
	n.start()
	n.stacked(img.ID, "me", content)
}
