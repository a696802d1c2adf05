package artifact

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"strings"
	"testing"

	"sluice/internal/blob"
	"sluice/internal/layer"
	"sluice/oci"
)

// program is a file of size bytes that can be executed.
func program(name, content string) entry {
	return entry{Header: tar.Header{Name: name, Mode: 0o755}, content: content}
}

// pad makes content so long that the next file begins a chunk of its own.
func pad(content string) string {
	return content + strings.Repeat("\n", MaxChunkLength+minChunkLength-len(content))
}

// elfOf makes an ELF file that wants a loader and libraries.
func elfOf(interp string, needed ...string) string {
	const base = 0x400000
	strs := "\x00" + interp + "\x00"
	var offsets []int
	for _, n := range needed {
		offsets = append(offsets, len(strs))
		strs += n + "\x00"
	}
	runpath := len(strs)
	strs += "$ORIGIN/../own\x00"
	le := binary.LittleEndian
	const strtab, dyn = 1024, 512
	b := make([]byte, strtab+len(strs))
	copy(b, "\x7fELF\x02\x01\x01")
	le.PutUint64(b[24:], base+strtab) // entry
	le.PutUint64(b[32:], 64)          // program headers
	le.PutUint16(b[54:], 56)
	le.PutUint16(b[56:], 3)
	header := func(i int, typ, flags uint32, off, size int) {
		h := b[64+i*56:]
		le.PutUint32(h, typ)
		le.PutUint32(h[4:], flags)
		le.PutUint64(h[8:], uint64(off))
		le.PutUint64(h[16:], uint64(base+off))
		le.PutUint64(h[32:], uint64(size))
	}
	header(0, 1, 5, 0, len(b))
	header(1, 2, 6, dyn, strtab-dyn)
	header(2, 3, 4, strtab+1, len(interp)+1)
	at := dyn
	put := func(tag, value int) {
		le.PutUint64(b[at:], uint64(tag))
		le.PutUint64(b[at+8:], uint64(value))
		at += 16
	}
	for _, o := range offsets {
		put(1, o)
	}
	put(29, runpath)
	put(5, base+strtab)
	put(10, len(strs))
	copy(b[strtab:], strs)
	return string(b)
}

// packedFiles builds an image and returns which of the files are in its boot
// pack, in the order of their first chunks there. Each file must have chunks of
// its own.
func packedFiles(t *testing.T, config oci.ImageConfig, entries ...entry) []string {
	t.Helper()
	for i := range entries {
		if entries[i].content != "" {
			entries[i].content = pad(entries[i].content)
		}
	}
	entries = append([]entry{file("first", pad("so that the next file begins a chunk"))}, entries...)
	sink := newMemSink()
	l := encode(t, layerTar(t, entries...), sink, EncodeOptions{})
	config.OS, config.Architecture = "linux", "amd64"
	config.RootFS.DiffIDs = []oci.Digest{l.DiffID}
	content, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	in := BuildInput{
		Subject:  oci.Descriptor{MediaType: oci.MediaTypeImageManifest, Digest: oci.DigestOf(nil)},
		Config:   oci.Descriptor{MediaType: oci.MediaTypeImageConfig, Digest: oci.DigestOf(content), Size: int64(len(content))},
		Platform: oci.Platform{OS: "linux", Architecture: "amd64"}, ConfigContent: content,
		Layers: []*Layer{l}, Sources: []LayerSource{{Tar: sink.source(l.Tar.Blob)}},
	}
	built, err := Build(t.Context(), in, sink)
	if err != nil {
		t.Fatal(err)
	}
	if built.Manifest.BootPack == nil {
		return nil
	}
	table, err := OpenTable(t.Context(), built.Manifest.Table, sink.source(built.Manifest.Table.Blob))
	if err != nil {
		t.Fatal(err)
	}
	plan, err := ExplainBoot(t.Context(), built.Manifest, content, func(d oci.Descriptor) blob.Source { return sink.source(d) })
	if err != nil {
		t.Fatal(err)
	}
	checkPlan(t, plan, table, sink.blobs[built.Manifest.BootPack.Digest])
	var names []string
	err = ReadBootPack(t.Context(), bytes.NewReader(sink.blobs[built.Manifest.BootPack.Digest]), table, nil, func(ref ChunkRef, c Chunk, frame []byte) error {
		if _, err := c.Decode(nil, frame); err != nil {
			return err
		}
		// The page with the end of a file brings the next file's chunk, too.
		name := fileAt(l.Tree.Root, "", c.Offset)
		if slices.ContainsFunc(plan.Files, func(f BootFile) bool { return f.Path == "/"+name }) && !slices.Contains(names, name) {
			names = append(names, name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// checkPlan holds a plan against itself and the boot pack that it explains.
func checkPlan(t *testing.T, plan *BootPlan, table *Table, pack []byte) {
	t.Helper()
	refs, err := ParseBootPackHeader(bytes.NewReader(pack))
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(refs, plan.Chunks) {
		t.Errorf("the boot pack has %v, its plan says %v", refs, plan.Chunks)
	}
	var size, added int64
	for _, ref := range refs {
		c, err := table.Devices[ref.Device].Chunk(t.Context(), ref.Index)
		if err != nil {
			t.Fatal(err)
		}
		size += int64(c.BlobLength)
	}
	for _, f := range plan.Files {
		added += f.Added
		if f.Path == "" || f.Rule == "" || f.Chunks < 1 || f.Planned < 1 || f.Planned > f.Size || f.For == "" && f.Rule != RuleAccount && f.Rule != RuleProgram && f.Rule != RuleScript {
			t.Errorf("planned: %+v", f)
		}
	}
	if plan.Size != size || added != size || size > plan.Limit {
		t.Errorf("%d bytes of frames, the plan says %d, its files %d, %d are allowed", size, plan.Size, added, plan.Limit)
	}
}

// fileAt returns the file whose content begins at an offset of the tar.
func fileAt(n *layer.Node, at string, offset int64) string {
	if len(n.Extents) == 1 && n.Extents[0].Offset == offset {
		return at
	}
	for name, child := range n.Children {
		if found := fileAt(child, path.Join(at, name), offset); found != "" {
			return found
		}
	}
	return ""
}

func cmd(args ...string) oci.ImageConfig {
	var c oci.ImageConfig
	c.Config.Cmd = args
	return c
}

func TestBootPackHasWhatStartUpReads(t *testing.T) {
	libc := []entry{
		program("usr/lib/ld.so", elfOf("")), program("usr/lib/libc.so", elfOf("")), link("lib", "usr/lib", tar.TypeSymlink),
		file("etc/passwd", "root"), file("etc/unrelated", "x"), file("etc/nsswitch.conf", "files"),
		program("bin/other", elfOf("/lib/ld.so")),
	}
	python := append(slices.Clone(libc),
		program("usr/bin/python3.11", elfOf("/lib/ld.so", "libc.so")), link("usr/bin/python3", "python3.11", tar.TypeSymlink),
		file("usr/lib/python3.11/encodings/__init__.py", "import codecs"), file("usr/lib/python3.11/encodings/utf_8.py", "x"),
		file("usr/lib/python3.11/encodings/__pycache__/utf_8.cpython-311.pyc", "y"),
		file("usr/lib/python3.11/json/__init__.py", "from .decoder import (Decoder)\n"), file("usr/lib/python3.11/json/decoder.py", "import _json\n"),
		program("usr/lib/python3.11/lib-dynload/_json.cpython-311-x86_64-linux-gnu.so", elfOf("", "libextra.so")), program("usr/lib/libextra.so", elfOf("")),
		file("usr/lib/python3.11/unused.py", "x"), file("app/main.py", "import json\n"), file("app/helper.py", "x"))
	for what, c := range map[string]struct {
		config  oci.ImageConfig
		entries []entry
		want    []string
		not     []string
	}{
		"program with libraries": {
			cmd("app", "--flag"),
			append(slices.Clone(libc), program("usr/bin/app", elfOf("/lib/ld.so", "libc.so", "libown.so", "libmissing.so")), program("usr/own/libown.so", elfOf("", "libc.so"))),
			[]string{"etc/passwd", "usr/bin/app", "usr/lib/ld.so", "usr/lib/libc.so", "usr/own/libown.so", "etc/nsswitch.conf"},
			[]string{"etc/unrelated", "bin/other"},
		},
		"script": {
			cmd("/entry.sh", "app"),
			append(slices.Clone(libc), program("entry.sh", "#!/bin/sh -e\nexec \"$@\"\n"), program("bin/sh", elfOf("/lib/ld.so", "libc.so")), program("usr/bin/app", elfOf("/lib/ld.so"))),
			[]string{"etc/passwd", "entry.sh", "bin/sh", "usr/lib/ld.so", "usr/lib/libc.so", "etc/nsswitch.conf", "usr/bin/app"},
			[]string{"bin/other"},
		},
		"shell form": {
			cmd("/bin/sh", "-c", `cd / && exec "app" --flag`),
			append(slices.Clone(libc), program("bin/sh", elfOf("/lib/ld.so")), program("usr/bin/app", elfOf("/lib/ld.so"))),
			[]string{"bin/sh", "usr/bin/app"}, []string{"bin/other"},
		},
		"python -c": {
			cmd("python3", "-c", "import json"), python,
			[]string{"usr/bin/python3.11", "usr/lib/python3.11/encodings/__init__.py", "usr/lib/python3.11/encodings/__pycache__/utf_8.cpython-311.pyc",
				"usr/lib/python3.11/json/__init__.py", "usr/lib/python3.11/json/decoder.py", "usr/lib/python3.11/lib-dynload/_json.cpython-311-x86_64-linux-gnu.so", "usr/lib/libextra.so"},
			[]string{"usr/lib/python3.11/encodings/utf_8.py", "usr/lib/python3.11/unused.py", "app/main.py"},
		},
		"python script": {
			func() oci.ImageConfig { c := cmd("python3", "main.py"); c.Config.WorkingDir = "/app"; return c }(), python,
			[]string{"usr/bin/python3.11", "app/main.py", "usr/lib/python3.11/json/__init__.py"}, []string{"app/helper.py"},
		},
		"program that is missing": {cmd("nonesuch"), libc, []string{"etc/passwd"}, []string{"bin/other"}},
		"no program":              {oci.ImageConfig{}, libc, []string{"etc/passwd"}, []string{"bin/other"}},
		"nothing":                 {cmd("nonesuch"), []entry{file("x", "y")}, nil, []string{"x"}},
	} {
		t.Run(what, func(t *testing.T) {
			got := packedFiles(t, c.config, slices.Clone(c.entries)...)
			at := -1
			for _, w := range c.want {
				i := slices.Index(got, w)
				if i < 0 {
					t.Errorf("%s is missing from %v", w, got)
				} else if what == "program with libraries" && i < at {
					t.Errorf("%s comes too early in %v", w, got)
				}
				at = i
			}
			for _, w := range c.not {
				if slices.Contains(got, w) {
					t.Errorf("%s shouldn't be in %v", w, got)
				}
			}
		})
	}
}

// A source that fails must fail the build: that there's no boot pack because
// the network was down would make the artifact depend on it.
func TestBootPackNeedsItsSources(t *testing.T) {
	b := buildStack(t, [][]byte{layerTar(t, program("bin/app", elfOf("/lib/ld.so")))}, EncodeOptions{})
	l := encode(t, b.tars[0], newMemSink(), EncodeOptions{})
	config := bytes.Replace(b.config, []byte(`"config":{}`), []byte(`"config":{"Cmd":["/bin/app"]}`), 1)
	if bytes.Equal(config, b.config) {
		t.Fatalf("the config is %s", b.config)
	}
	in := BuildInput{
		Subject: b.Manifest.Subject, Platform: b.Manifest.Platform, ConfigContent: config, Layers: []*Layer{l},
		Config: oci.Descriptor{MediaType: oci.MediaTypeImageConfig, Digest: oci.DigestOf(config), Size: int64(len(config))},
	}
	broken := errors.New("cable cut")
	in.Sources = []LayerSource{{Tar: brokenSource{l.Tar.Blob.Size, broken}}}
	if _, err := Build(t.Context(), in, newMemSink()); !errors.Is(err, broken) {
		t.Errorf("a broken source: %v", err)
	}
	damaged := bytes.Clone(b.sink.blobs[l.Tar.Blob.Digest])
	damaged[20] ^= 1
	in.Sources = []LayerSource{{Tar: blob.FromBytes(damaged)}}
	if _, err := Build(t.Context(), in, newMemSink()); err == nil {
		t.Error("a damaged source: no error")
	}
	in.Sources = nil
	if built, err := Build(t.Context(), in, newMemSink()); err != nil || built.Manifest.BootPack != nil {
		t.Errorf("no sources: %v", err)
	}
}

type brokenSource struct {
	size int64
	err  error
}

func (s brokenSource) Size() int64 { return s.size }

func (s brokenSource) ReadRange(context.Context, int64, int64) (io.ReadCloser, error) {
	return nil, s.err
}

func TestBootPackHasALimit(t *testing.T) {
	var entries []entry
	random := rand.NewChaCha8([32]byte{})
	noise := make([]byte, 3<<20)
	var needed []string
	for i := range 12 {
		name := fmt.Sprintf("lib%d.so", i)
		needed = append(needed, name)
		if _, err := random.Read(noise); err != nil {
			t.Fatal(err)
		}
		lib := []byte(elfOf("") + string(noise))
		binary.LittleEndian.PutUint64(lib[64+32:], uint64(len(lib))) // its first segment's size
		entries = append(entries, program("lib/"+name, string(lib)))
	}
	entries = append(entries, program("app", elfOf("", needed...)))
	sink := newMemSink()
	l := encode(t, layerTar(t, entries...), sink, EncodeOptions{})
	_, table, err := storeTable(t.Context(), []*Layer{l}, sink)
	if err != nil {
		t.Fatal(err)
	}
	files := newBootFiles(t.Context(), l.Tree.Root, table, []*Layer{l}, []LayerSource{{Tar: sink.source(l.Tar.Blob)}})
	selectBoot(files, cmd("/app"))
	if files.size > bootBudget || files.size < bootBudget-1<<20 || files.err != nil {
		t.Errorf("%d bytes of %d, %v", files.size, l.Tar.Blob.Size, files.err)
	}

	// Chunks that compress to nothing are bounded by their number.
	files = newBootFiles(t.Context(), l.Tree.Root, table, []*Layer{l}, []LayerSource{{Tar: sink.source(l.Tar.Blob)}})
	files.order = make([]ChunkRef, MaxBootChunks-1)
	for _, n := range l.Tree.Root.Children["lib"].Children {
		files.packAll(resolved{n, ""}, why{})
	}
	if len(files.order) != MaxBootChunks || !files.full() {
		t.Errorf("%d chunks, full: %v; %d are allowed", len(files.order), files.full(), MaxBootChunks)
	}
}

func TestLookupStaysInTheImage(t *testing.T) {
	sink := newMemSink()
	l := encode(t, layerTar(t, file("a/file", "x"), link("a/up", "../../../a/file", tar.TypeSymlink), link("abs", "/a/up", tar.TypeSymlink),
		link("loop", "loop", tar.TypeSymlink), link("loop2", "/loop3/x", tar.TypeSymlink), link("loop3", "/loop2/x", tar.TypeSymlink), link("dir", "a", tar.TypeSymlink)), sink, EncodeOptions{})
	b := &bootFiles{root: l.Tree.Root, lookupsLeft: maxLookups, stepsLeft: maxSteps}
	for name, want := range map[string]string{
		"/a/file": "/a/file", "a//./file": "/a/file", "/abs": "/a/file", "/dir/file": "/a/file", "/../../a/../a/file": "/a/file",
		"/loop": "", "/loop2": "", "/a/file/x": "", "/nonesuch": "", "/": "", "": "",
	} {
		if f, ok := b.file(name); ok != (want != "") || ok && f.path != want {
			t.Errorf("%q is %q, %v, want %q", name, f.path, ok, want)
		}
	}
}

// fuzzImage is an image of one file, /f, to be inspected; its chunks are there
// decoded, so that it costs little.
func fuzzImage(t testing.TB, content []byte) (*bootFiles, resolved) {
	t.Helper()
	device := &DeviceData{DiffID: oci.DigestOf(nil), Size: int64(len(content)), Blob: oci.Descriptor{MediaType: MediaTypeLayer, Digest: oci.DigestOf(nil)}}
	f := &layer.Node{Mode: layer.TypeRegular | 0o755, Size: int64(len(content))}
	if len(content) > 0 {
		f.Extents = []layer.Extent{{Length: int64(len(content))}}
	}
	decoded := make(map[ChunkRef][]byte)
	for i := 0; len(content) > 0; i++ {
		n := min(len(content), MaxChunkLength)
		decoded[ChunkRef{0, i}], content = content[:n], content[n:]
		device.Entries = appendChunkEntry(device.Entries, Chunk{Length: uint32(n), BlobLength: 1})
		device.Blob.Size++
	}
	_, table, err := storeTable(t.Context(), []*Layer{{Tar: *device}}, &discard{})
	if err != nil {
		t.Fatal(err)
	}
	root := &layer.Node{Mode: layer.TypeDir, Children: map[string]*layer.Node{"f": f}}
	files := newBootFiles(t.Context(), root, table, []*Layer{{Tar: *device}}, make([]LayerSource, 1))
	files.decoded = decoded
	return files, resolved{f, "/f"}
}

func TestELFOfThisProgram(t *testing.T) {
	name, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{name, "/bin/sh"} {
		content, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		files, f := fuzzImage(t, content)
		e, ok := files.elf(f.Node)
		if !ok || len(e.segments) < 2 || e.entry <= 0 {
			t.Errorf("%s: %+v, %v", name, e, ok)
		}
		if name == "/bin/sh" && (!strings.Contains(e.interp, "ld-") || len(e.needed) == 0) {
			t.Errorf("%s: %+v", name, e)
		}
	}
}

func FuzzELF(f *testing.F) {
	f.Add([]byte(elfOf("/lib/ld.so", "libc.so", "libm.so")))
	big := []byte(elfOf("/lib/ld.so", "libc.so"))
	big[4], big[5] = 1, 2 // 32 bits, big endian
	f.Add(big)
	f.Add([]byte("#!/usr/bin/env -S X=1 /f\n"))
	f.Fuzz(func(t *testing.T, content []byte) {
		if len(content) > 1<<20 {
			return
		}
		files, _ := fuzzImage(t, content)
		selectBoot(files, cmd("/f", "f"))
		if files.err != nil {
			t.Fatal(files.err)
		}
	})
}

func FuzzPythonImports(f *testing.F) {
	f.Add("import a, b.c as d\nfrom . import e\nfrom ..f.g import (h,\n i)\n    import j\nfrom ... import")
	f.Fuzz(func(t *testing.T, text string) {
		files, _ := fuzzImage(t, []byte(text))
		m := pythonModules{p: newBootPlanner(files, cmd()), tag: "cpython-311", dirs: []string{"/", "/lib"}, known: make(map[string]bool)}
		m.imports(text, "/")
		if len(m.known) > maxModules+1 {
			t.Errorf("%d modules", len(m.known))
		}
	})
}
