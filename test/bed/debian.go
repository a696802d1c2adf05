package bed

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
)

// debianPackages make the root file system real: an interpreter, a library of
// many files and large shared objects, and a tool chain that nobody touches.
const debianPackages = "python3,python3-numpy,build-essential,git,ca-certificates"

// debianKey names what makeDebian makes; change it with the recipe.
const debianKey = "images/debian-bookworm-numpy-3"

// Images are OCI layouts with one image each, both with the same content: a
// Debian of more than 500 MB with Python and numpy.
type Images struct {
	OneLayer   string
	ManyLayers string
}

// ManyLayers is how many layers the second image has: as many as the image in
// the published measurements of Project Teleport.
const ManyLayers = 28

// Debian returns the images, made with debootstrap unless they are cached.
func Debian(ctx context.Context, say func(string)) (Images, error) {
	dir, err := cached(debianKey, func(tmp string) error {
		return makeDebian(ctx, tmp, say)
	})
	return Images{OneLayer: filepath.Join(dir, "1"), ManyLayers: filepath.Join(dir, "28")}, err
}

func makeDebian(ctx context.Context, dir string, say func(string)) error {
	if os.Geteuid() != 0 {
		return errors.New("a Debian root file system can only be made as root")
	}
	if err := Install(ctx, "debootstrap", "tar"); err != nil {
		return err
	}
	root := filepath.Join(dir, "root")
	say("making a Debian root file system with Python and numpy (once; two minutes)")
	args := []string{"--variant=minbase", "--include=" + debianPackages, "bookworm", root}
	if site, err := debianMirror(ctx); err == nil {
		args = append(args, site)
	}
	if err := run(exec.CommandContext(ctx, "debootstrap", args...)); err != nil {
		return err
	}
	for _, junk := range []string{"var/cache/apt/archives", "var/lib/apt/lists"} {
		if err := os.RemoveAll(filepath.Join(root, junk)); err != nil {
			return err
		}
	}
	one := filepath.Join(dir, "root.tar")
	if err := run(exec.CommandContext(ctx, "tar", "--sort=name", "--numeric-owner", "--format=posix",
		"--pax-option=delete=atime,delete=ctime", "--xattrs", "-C", root, "-cf", one, ".")); err != nil {
		return err
	}
	if err := os.RemoveAll(root); err != nil {
		return err
	}
	say("cutting it into layers and compressing them as gzip -6 (once)")
	many, err := splitTar(one, dir, ManyLayers)
	if err != nil {
		return err
	}
	for name, tars := range map[string][]string{"1": {one}, "28": many} {
		if err := WriteLayout(filepath.Join(dir, name), []string{"python3"}, tars); err != nil {
			return err
		}
	}
	for _, t := range append(many, one) {
		if err := os.Remove(t); err != nil {
			return err
		}
	}
	return nil
}

// debianMirror returns the mirror that this machine's apt uses.
func debianMirror(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(SITE) $(RELEASE)", "Created-By: Packages").Output()
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) == 2 && f[1] == "bookworm" {
			return f[0], nil
		}
	}
	return "", errors.New("apt has no source of bookworm")
}

// splitTar cuts a tar into n of about the same size that yield the same tree
// when they are applied in order. Every one lists the parent directories of
// what it holds, as the layers of image builders do, and hard links stay with
// their targets.
func splitTar(src, dir string, n int) ([]string, error) {
	info, err := os.Stat(src)
	if err != nil {
		return nil, err
	}
	plan := &splitPlan{dirs: map[string]*tar.Header{}, layerOf: map[string]int{}, share: info.Size()/int64(n) + 1}
	outs := make([]*splitLayer, n)
	var names []string
	for i := range outs {
		name := filepath.Join(dir, fmt.Sprintf("layer-%02d.tar", i))
		f, err := os.Create(name)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		outs[i] = &splitLayer{tw: tar.NewWriter(f), has: map[string]bool{}}
		names = append(names, name)
	}
	f, err := os.Open(src)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	tr := tar.NewReader(f)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		if err := outs[plan.place(h, n)].add(h, tr, plan.dirs); err != nil {
			return nil, fmt.Errorf("%s: %w", h.Name, err)
		}
	}
	for _, o := range outs {
		if err := o.tw.Close(); err != nil {
			return nil, err
		}
	}
	return names, nil
}

// splitPlan decides which layer an entry goes to.
type splitPlan struct {
	dirs    map[string]*tar.Header // every directory so far, by clean name
	layerOf map[string]int         // of regular files, for their hard links
	share   int64                  // bytes of a layer
	done    int64
}

func (p *splitPlan) place(h *tar.Header, n int) int {
	name := path.Clean(h.Name)
	if h.Typeflag == tar.TypeDir {
		p.dirs[name] = h
	}
	layer := min(int(p.done/p.share), n-1)
	if h.Typeflag == tar.TypeLink {
		layer = p.layerOf[path.Clean(h.Linkname)]
	}
	p.layerOf[name] = layer
	p.done += h.Size + 512
	return layer
}

// splitLayer is one layer being written.
type splitLayer struct {
	tw  *tar.Writer
	has map[string]bool
}

// add writes an entry, its parent directories first.
func (l *splitLayer) add(h *tar.Header, content io.Reader, dirs map[string]*tar.Header) error {
	name := path.Clean(h.Name)
	if parent := path.Dir(name); parent != name && !l.has[parent] {
		if d := dirs[parent]; d != nil {
			if err := l.add(d, nil, dirs); err != nil {
				return err
			}
		}
	}
	if h.Typeflag == tar.TypeDir {
		if l.has[name] {
			return nil
		}
		l.has[name] = true
	}
	h.Format = tar.FormatPAX // or times of entries that have other records are rounded
	if err := l.tw.WriteHeader(h); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeReg {
		return nil
	}
	_, err := io.Copy(l.tw, content)
	return err
}
