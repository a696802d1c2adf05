package boot

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"sluice/oci"
	"sluice/test/bed"
)

//go:embed testdata
var sources embed.FS

// makeImages returns an OCI layout with all images, named by their recipes. It
// makes it unless one of the same recipes is cached: some five minutes, and less
// than a gigabyte that stays.
func makeImages(ctx context.Context, tools bed.Tools, say func(string)) (string, error) {
	cache, err := bed.Dir()
	if err != nil {
		return "", err
	}
	key, err := sourcesKey()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "images", "boot-"+key)
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	if err := bed.Install(ctx, "debootstrap", "musl-tools", "busybox-static"); err != nil {
		return "", err
	}
	work, err := os.MkdirTemp(filepath.Dir(dir), ".boot-")
	if err != nil {
		return "", err
	}
	defer func() {
		if err := bed.UnmountAll(work); err == nil { // never remove what is mounted
			os.RemoveAll(work)
		}
	}()
	m := &maker{work: work, layout: filepath.Join(work, "layout"), tools: tools}
	if err := m.all(ctx, say); err != nil {
		return "", err
	}
	if err := os.Rename(m.layout, dir); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	return dir, nil
}

// imagesVersion changes with how images are made.
const imagesVersion = 1

// sourcesKey is a hash of all that decides what the images are.
func sourcesKey() (string, error) {
	h := sha256.New()
	fmt.Fprintln(h, imagesVersion)
	for _, r := range recipes() {
		config, err := json.Marshal(r.config)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(h, "%q %q %q %q %s\n", r.name, r.packages, r.files, r.setup, config)
	}
	err := fs.WalkDir(sources, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := sources.ReadFile(name)
		fmt.Fprintf(h, "%s %d\n", name, len(b))
		h.Write(b)
		return err
	})
	return fmt.Sprintf("%x", h.Sum(nil)[:6]), err
}

// maker makes images.
type maker struct {
	work   string // for what is mounted and thrown away
	layout string
	tools  bed.Tools

	base oci.Descriptor // the layer with Debian
	id   oci.Digest     // its diff ID
}

func (m *maker) all(ctx context.Context, say func(string)) error {
	if err := os.MkdirAll(m.blobs(), 0o755); err != nil {
		return err
	}
	say("making a small Debian (once; a minute or two)")
	root := filepath.Join(m.work, "base")
	if err := output(exec.CommandContext(ctx, "debootstrap", "--variant=minbase", "bookworm", root)); err != nil {
		return err
	}
	// Packages' services aren't started in a chroot, nor databases made.
	for name, content := range map[string]string{
		"usr/sbin/policy-rc.d": "#!/bin/sh\nexit 101\n", "etc/postgresql-common/createcluster.conf": "create_main_cluster = false\n",
	} {
		name = filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(name, []byte(content), 0o755); err != nil {
			return err
		}
	}
	var err error
	if m.base, m.id, err = m.layer(root); err != nil {
		return err
	}
	index := oci.Index{Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeIndex}
	for _, r := range recipes() {
		say("making the image " + r.name + " (once)")
		desc, err := m.image(ctx, r)
		if err != nil {
			return fmt.Errorf("image %s: %w", r.name, err)
		}
		index.Manifests = append(index.Manifests, desc)
	}
	content, err := json.Marshal(index)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(m.layout, "index.json"), content, 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(m.layout, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644)
}

func (m *maker) blobs() string { return filepath.Join(m.layout, "blobs", "sha256") }

// image makes one image and returns its manifest, named for the index.
func (m *maker) image(ctx context.Context, r recipe) (oci.Descriptor, error) {
	own, err := m.root(ctx, r)
	if err != nil {
		return oci.Descriptor{}, err
	}
	desc, id, err := m.layer(own)
	if err != nil {
		return oci.Descriptor{}, err
	}
	if err := os.RemoveAll(own); err != nil {
		return oci.Descriptor{}, err
	}
	layers, ids := []oci.Descriptor{desc}, []oci.Digest{id}
	if r.packages != "" {
		layers, ids = []oci.Descriptor{m.base, desc}, []oci.Digest{m.id, id}
	}
	c := r.config
	c.OS, c.Architecture, c.RootFS.Type, c.RootFS.DiffIDs = "linux", runtime.GOARCH, "layers", ids
	config, err := m.json(oci.MediaTypeImageConfig, c)
	if err != nil {
		return oci.Descriptor{}, err
	}
	manifest, err := m.json(oci.MediaTypeImageManifest, oci.ImageManifest{
		Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageManifest, Config: config, Layers: layers,
	})
	manifest.Annotations = map[string]string{"org.opencontainers.image.ref.name": r.name}
	return manifest, err
}

// root makes what the image has above the base, in a directory.
func (m *maker) root(ctx context.Context, r recipe) (own string, err error) {
	own = filepath.Join(m.work, r.name)
	seen := own // what the image's programs see
	if err := os.Mkdir(own, 0o755); err != nil {
		return "", err
	}
	if r.packages != "" {
		seen = filepath.Join(m.work, "merged")
		scratch := filepath.Join(m.work, "scratch")
		for _, d := range []string{seen, scratch} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				return "", err
			}
		}
		options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", filepath.Join(m.work, "base"), own, scratch)
		if err := unix.Mount("overlay", seen, "overlay", 0, options); err != nil {
			return "", fmt.Errorf("overlayfs (its directories must not be on one; set SLUICE_CACHE): %w", err)
		}
		defer func() { err = errors.Join(err, bed.UnmountAll(m.work)) }()
		if err := unix.Mount("proc", filepath.Join(seen, "proc"), "proc", 0, ""); err != nil {
			return "", err
		}
		if err := output(chroot(ctx, seen, "apt-get install -q -y --no-install-recommends "+r.packages)); err != nil {
			return "", err
		}
	}
	if r.made != nil {
		if err := r.made(m, seen); err != nil {
			return "", err
		}
	}
	for to, from := range r.files {
		to = filepath.Join(seen, to)
		b, err := sources.ReadFile("testdata/" + from)
		if err == nil {
			err = os.MkdirAll(filepath.Dir(to), 0o755)
		}
		if err == nil {
			err = os.WriteFile(to, b, 0o755)
		}
		if err != nil {
			return "", err
		}
	}
	if r.setup != "" {
		return own, output(chroot(ctx, seen, r.setup))
	}
	return own, nil
}

func chroot(ctx context.Context, root, script string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "chroot", root, "/bin/sh", "-e", "-c", script)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C.UTF-8", "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
	return cmd
}

func output(cmd *exec.Cmd) error {
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", cmd, err, out[max(0, len(out)-3000):])
	}
	return nil
}

// staticGo is an image of one static program.
func (m *maker) staticGo(root string) error {
	if err := os.MkdirAll(filepath.Join(root, "etc/ssl/certs"), 0o755); err != nil {
		return err
	}
	if err := copyFile("/etc/ssl/certs/ca-certificates.crt", filepath.Join(root, "etc/ssl/certs/ca-certificates.crt")); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(root, "tmp"), 0o777); err != nil {
		return err
	}
	return copyFile(m.tools.Crane, filepath.Join(root, "crane"))
}

// muslRoot is a root file system in the manner of Alpine: musl, busybox, a
// program with a library of its own.
func (m *maker) muslRoot(root string) error {
	for _, d := range []string{"bin", "lib", "etc", "usr/bin", "usr/local/bin", "usr/local/lib", "usr/lib"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return err
		}
	}
	const script = `set -e
musl-gcc -O1 -shared -fPIC -Wl,-soname,libgreeting.so.1 -o "$ROOT"/usr/local/lib/libgreeting.so.1 greeting.c
musl-gcc -O1 -o "$ROOT"/usr/local/bin/app app.c "$ROOT"/usr/local/lib/libgreeting.so.1
cp /usr/lib/*-linux-musl/libc.so "$ROOT"/lib/libc.musl.so
ln -s libc.musl.so "$ROOT"/lib/ld-musl-$(uname -m).so.1
printf '/lib\n/usr/local/lib\n/usr/lib\n' > "$ROOT"/etc/ld-musl-$(uname -m).path
cp /bin/busybox "$ROOT"/bin/busybox
for a in $(/bin/busybox --list); do [ "$a" = busybox ] || ln -s busybox "$ROOT"/bin/$a; done
printf 'root:x:0:0:root:/root:/bin/sh\n' > "$ROOT"/etc/passwd
printf 'root:x:0:\n' > "$ROOT"/etc/group
`
	dir, err := os.MkdirTemp(m.work, "musl-")
	if err != nil {
		return err
	}
	for _, name := range []string{"app.c", "greeting.c"} {
		b, err := sources.ReadFile("testdata/musl/" + name)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			return err
		}
	}
	cmd := exec.Command("/bin/sh", "-c", script)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "ROOT="+root)
	return output(cmd)
}

func copyFile(from, to string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o755)
}

// layer writes a directory as a layer. What overlayfs notes of deleted files
// becomes whiteouts.
func (m *maker) layer(dir string) (oci.Descriptor, oci.Digest, error) {
	out, err := os.CreateTemp(m.blobs(), ".layer-")
	if err != nil {
		return oci.Descriptor{}, "", err
	}
	defer out.Close()
	compressed, plain := sha256.New(), sha256.New()
	zw, err := gzip.NewWriterLevel(io.MultiWriter(out, compressed), gzip.BestSpeed)
	if err != nil {
		return oci.Descriptor{}, "", err
	}
	w := layerWriter{Writer: tar.NewWriter(io.MultiWriter(zw, plain)), root: dir, links: make(map[uint64]string)}
	if err := errors.Join(filepath.WalkDir(dir, w.add), w.Close(), zw.Close()); err != nil {
		return oci.Descriptor{}, "", err
	}
	info, err := out.Stat()
	if err != nil {
		return oci.Descriptor{}, "", err
	}
	hex := fmt.Sprintf("%x", compressed.Sum(nil))
	desc := oci.Descriptor{MediaType: oci.MediaTypeLayerGzip, Digest: oci.Digest("sha256:" + hex), Size: info.Size()}
	return desc, oci.Digest(fmt.Sprintf("sha256:%x", plain.Sum(nil))), os.Rename(out.Name(), filepath.Join(m.blobs(), hex))
}

// layerWriter writes a layer's tar.
type layerWriter struct {
	*tar.Writer
	root  string
	links map[uint64]string // first names, by inode
}

// junk is what isn't the image's.
func junk(name string) bool {
	for _, prefix := range []string{"var/cache/apt/", "var/lib/apt/lists/", "proc/", "dev/", "usr/sbin/policy-rc.d"} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

func (w *layerWriter) add(path string, d fs.DirEntry, err error) error {
	if err != nil {
		return err
	}
	name, err := filepath.Rel(w.root, path)
	if err != nil || name == "." || junk(name) {
		return err
	}
	info, err := d.Info()
	if err != nil {
		return err
	}
	target := ""
	if info.Mode()&fs.ModeSymlink != 0 {
		if target, err = os.Readlink(path); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return err
	}
	h.Name, h.Format, h.Uname, h.Gname = name, tar.FormatPAX, "", ""
	st := info.Sys().(*syscall.Stat_t)
	switch {
	case info.IsDir():
		h.Name += "/"
		var opaque [1]byte
		if n, err := unix.Lgetxattr(path, "trusted.overlay.opaque", opaque[:]); err == nil && n == 1 && opaque[0] == 'y' {
			marker := &tar.Header{Typeflag: tar.TypeReg, Name: name + "/.wh..wh..opq", Mode: 0o644, Format: tar.FormatPAX}
			return errors.Join(w.WriteHeader(h), w.WriteHeader(marker))
		}
	case info.Mode()&fs.ModeCharDevice != 0 && st.Rdev == 0:
		h = &tar.Header{Typeflag: tar.TypeReg, Name: filepath.Join(filepath.Dir(name), ".wh."+filepath.Base(name)), Mode: 0o644, Format: tar.FormatPAX}
	case info.Mode().IsRegular():
		if first := w.links[st.Ino]; first != "" {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		} else if st.Nlink > 1 {
			w.links[st.Ino] = name
		}
	}
	if err := w.WriteHeader(h); err != nil || h.Typeflag != tar.TypeReg || h.Size == 0 {
		return err
	}
	b, err := os.ReadFile(path)
	if err == nil {
		_, err = io.Copy(w, bytes.NewReader(b))
	}
	return err
}

// json writes v as a blob.
func (m *maker) json(mediaType string, v any) (oci.Descriptor, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return oci.Descriptor{}, err
	}
	d := oci.DigestOf(b)
	return oci.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(b))}, os.WriteFile(filepath.Join(m.blobs(), d.Encoded()), b, 0o644)
}
