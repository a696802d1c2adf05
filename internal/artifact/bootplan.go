package artifact

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"path"

	"sluice/internal/blob"
	"sluice/internal/erofs"
	"sluice/internal/layer"
	"sluice/oci"
)

// BootRule says why a file is in a boot plan.
type BootRule string

// The rules of boot plans.
const (
	RuleAccount  BootRule = "account"  // the runtime looks up who the process runs as
	RuleProgram  BootRule = "program"  // the entrypoint, the command or a script runs it
	RuleScript   BootRule = "script"   // the same, of what isn't ELF
	RuleLoader   BootRule = "loader"   // the program's loader, and what that reads
	RuleLibrary  BootRule = "library"  // a program or a library needs it, or loads it by itself
	RuleLibc     BootRule = "libc"     // what the C library reads in many processes
	RuleLocale   BootRule = "locale"   // the environment names the locale
	RuleRuntime  BootRule = "runtime"  // the interpreter reads it before it runs anything
	RuleModule   BootRule = "module"   // code imports it
	RuleConfig   BootRule = "config"   // the program's configuration
	RuleArgument BootRule = "argument" // a command line names it
)

// BootPlan is what goes into an image's boot pack, and why. It depends on
// nothing but the image: the same image has the same plan on any machine.
type BootPlan struct {
	// Files are the files that start-up is expected to read, in about the order
	// in which it does. Each is there once, for the first rule that found it.
	Files []BootFile

	// Chunks are the boot pack's, in its order. There are at most MaxBootChunks.
	Chunks []ChunkRef

	// Size is how many bytes the frames of Chunks have, and Limit what it never
	// exceeds. What is planned when Full is left out: the plan is in the order of
	// reading, so it's what is read last.
	Size, Limit int64
	Full        bool
}

// BootFile is a file of a BootPlan.
type BootFile struct {
	Path string   // its real one, without symbolic links
	Rule BootRule // why it's there
	For  string   // what named it, such as the program that needs a library; empty: the image's config

	// Size is the file's, Planned how much of it is planned, in bytes. Of large
	// programs it's only what is known to be read.
	Size, Planned int64

	// Chunks is how many chunks what is planned of it lies in, and Added how
	// many bytes of frames those have which no earlier file has brought: small
	// files lie in one chunk with their neighbours.
	Chunks int
	Added  int64
}

// ExplainBoot plans the boot pack of an artifact again, from the artifact's own
// blobs: source is asked for the metadata, the chunk table, and as much of the
// layers as finding out takes (32 MiB at most). config is the image config's
// content. An artifact that this version made has exactly that boot pack.
//
// It may be used on hostile artifacts; the metadata is checked before it's used,
// and must not be larger than 256 MiB, because it's unpacked in memory.
func ExplainBoot(ctx context.Context, m *Manifest, config []byte, source func(oci.Descriptor) blob.Source) (*BootPlan, error) {
	table, err := OpenTable(ctx, m.Table, source(m.Table.Blob))
	if err != nil {
		return nil, err
	}
	if err := m.CheckTable(table); err != nil {
		return nil, err
	}
	var c oci.ImageConfig
	if err := json.Unmarshal(config, &c); err != nil {
		return nil, fmt.Errorf("image config %s: %w", m.Config.Digest, err)
	}
	root, err := m.Metadata.tree(ctx, source(m.Metadata.Blob), table)
	if err != nil {
		return nil, err
	}
	sources := make([]blob.Source, len(table.Devices))
	for n, d := range table.Devices {
		sources[n] = source(d.Blob)
	}
	return planBoot(openBootFiles(ctx, root, table, func(e layer.Extent) int { return e.Layer }, sources), c)
}

// maxExplained bounds the metadata that ExplainBoot unpacks.
const maxExplained = 256 << 20

// memoryFile is a MetadataFile in memory.
type memoryFile struct{ content []byte }

func (f *memoryFile) Write(p []byte) (int, error) {
	f.content = append(f.content, p...)
	return len(p), nil
}

func (f *memoryFile) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(f.content).ReadAt(p, off)
}

// tree returns the tree that metadata describes, whose extents' Layer is a
// device number.
func (ref MetadataRef) tree(ctx context.Context, src blob.Source, t *Table) (*layer.Node, error) {
	if ref.Size > maxExplained {
		return nil, fmt.Errorf("metadata %s has %d bytes, of more than %d no boot plan is made", ref.Blob.Digest, ref.Size, maxExplained)
	}
	var f memoryFile
	if err := ref.Unpack(ctx, src, &f, t.Sizes(ref.Devices)); err != nil {
		return nil, err
	}
	fs, err := erofs.Open(&f, ref.Size)
	if err != nil {
		return nil, err
	}
	dirs := make(map[string]*layer.Node)
	known := make(map[uint64]*layer.Node)
	err = fs.Walk(ctx, func(name string, info erofs.Info) error {
		n := known[info.NID]
		if n == nil {
			n = &layer.Node{Mode: info.Mode, Size: info.Size}
			known[info.NID] = n
			if err := ref.content(fs, info.NID, n); err != nil {
				return err
			}
		}
		if n.IsDir() {
			dirs[name] = n
		}
		if name == "/" {
			return nil
		}
		parent := dirs[path.Dir(name)]
		if parent == nil {
			return fmt.Errorf("%s comes before its directory", name)
		}
		if parent.Children == nil {
			parent.Children = make(map[string]*layer.Node)
		}
		parent.Children[path.Base(name)] = n
		return nil
	})
	return dirs["/"], err
}

// content sets what a file or a link holds.
func (ref MetadataRef) content(fs *erofs.FS, nid uint64, n *layer.Node) (err error) {
	switch n.Type() {
	case layer.TypeSymlink:
		n.Target, err = fs.ReadLink(nid)
	case layer.TypeRegular:
		var extents []erofs.Extent
		extents, err = fs.Extents(nid)
		for _, e := range extents {
			n.Extents = append(n.Extents, layer.Extent{Layer: ref.Devices[e.Device], Offset: e.Offset, Length: e.Length, FileOffset: e.FileOffset})
		}
	}
	return err
}

// planBoot makes the plan. The error is one of the sources'.
func planBoot(files *bootFiles, config oci.ImageConfig) (*BootPlan, error) {
	selectBoot(files, config)
	if files.err != nil {
		return nil, files.err
	}
	return &BootPlan{Files: files.files(), Chunks: files.order, Size: files.size, Limit: bootBudget, Full: files.full()}, nil
}
