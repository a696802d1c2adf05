package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"sluice/internal/artifact"
	"sluice/internal/blob"
	"sluice/internal/human"
	"sluice/oci"
)

// inspected is what `inspect` tells of an artifact. Sizes are in bytes.
type inspected struct {
	listedArtifact
	MediaTypes   []string         `json:"originalMediaTypes"` // of the layers
	TarSize      int64            `json:"tarSize"`
	Chunks       int              `json:"chunks"`
	Mount        int64            `json:"mountSize"` // what a node fetches before it mounts
	LayerDetails []inspectedLayer `json:"layerDetails"`
	BootPack     *inspectedBoot   `json:"bootPack,omitempty"`
}

type inspectedLayer struct {
	DiffID       oci.Digest `json:"diffID"`
	Blob         oci.Digest `json:"blob"`
	OriginalSize int64      `json:"originalSize"`
	TarSize      int64      `json:"tarSize"`
	Size         int64      `json:"size"` // of the layer blob
	SparseSize   int64      `json:"sparseSize,omitempty"`
	MetadataSize int64      `json:"metadataSize"`
	Chunks       int        `json:"chunks"`
	SharedWith   []string   `json:"sharedWith,omitempty"` // other images of the repository that have it
}

type inspectedBoot struct {
	Chunks  int   `json:"chunks"`
	Size    int64 `json:"size"`
	Content int64 `json:"contentSize"` // what its chunks decode to
}

func newArtifactStreamingInspectCommand() *cobra.Command {
	var f streamingFlags
	var boot bool
	cmd := &cobra.Command{
		Use:   "inspect IMAGE",
		Short: "Show what the streaming artifacts of an image are made of",
		Long: `Show what the streaming artifacts of an image are made of: layers, chunks,
sizes, the boot pack, and which layers other images of the repository share.

With --boot it shows the plan of the boot pack: the files that the image is
expected to read when it starts, in that order, and why each is among them.`,
		Example: `  sluice artifact-streaming inspect registry.example.com/team/app:v1
  sluice artifact-streaming inspect registry.example.com/team/app:v1 --boot`,
		Args: arguments(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, ref, err := f.image(cmd, args)
			if err != nil {
				return err
			}
			i := inspector{reg: p.images, ref: ref}
			if boot {
				plans, err := i.boot(cmd.Context())
				if err != nil {
					return err
				}
				return f.print(cmd.OutOrStdout(), plans, func(w io.Writer) { printPlannedBoot(w, plans) })
			}
			all, err := i.run(cmd.Context())
			if err != nil {
				return err
			}
			return f.print(cmd.OutOrStdout(), all, func(w io.Writer) { printInspected(w, all) })
		},
	}
	f.addImage(cmd)
	cmd.Flags().BoolVar(&boot, "boot", false, "show the plan of the boot pack")
	return noFiles(cmd)
}

// ratio tells how much of what is left, in percent.
func ratio(part, whole int64) string {
	if whole <= 0 {
		return "-"
	}
	return fmt.Sprintf("%.0f %%", 100*float64(part)/float64(whole))
}

func printInspected(w io.Writer, all []inspected) {
	for i, a := range all {
		if i > 0 {
			fmt.Fprintln(w)
		}
		fmt.Fprintf(w, "%s\tartifact\t%s\n\tof image\t%s\n", a.Platform, a.Artifact, a.Image)
		fmt.Fprintf(w, "\tcontent\t%s in %s, %s\n", human.Bytes(a.TarSize), plural(a.Layers, "layer"), plural(a.Chunks, "chunk"))
		fmt.Fprintf(w, "\toriginal\t%s\n", human.Bytes(a.OriginalSize))
		fmt.Fprintf(w, "\tstreamed\t%s (%s of the original), metadata %s\n", human.Bytes(a.LayersSize), ratio(a.LayersSize, a.OriginalSize), human.Bytes(a.MetadataSize))
		fmt.Fprintf(w, "\tto mount\t%s\n", human.Bytes(a.Mount))
		if b := a.BootPack; b != nil {
			fmt.Fprintf(w, "\tboot pack\t%s: %s of content in %s\n", human.Bytes(b.Size), human.Bytes(b.Content), plural(b.Chunks, "chunk"))
		} else {
			fmt.Fprintf(w, "\tboot pack\tnone\n")
		}
		fmt.Fprintln(w, "\nLAYER\tDIFF ID\tORIGINAL\tTAR\tSTREAMED\tRATIO\tCHUNKS\tSHARED WITH")
		for n, l := range a.LayerDetails {
			shared := "-"
			if k := len(l.SharedWith); k > 0 {
				shared = strings.Join(l.SharedWith[:min(k, 3)], ",")
				if k > 3 {
					shared = fmt.Sprintf("%s and %d more", shared, k-3)
				}
			}
			fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\t%d\t%s\n", n+1, shortDigest(l.DiffID), human.Bytes(l.OriginalSize), human.Bytes(l.TarSize),
				human.Bytes(l.Size+l.SparseSize), ratio(l.Size+l.SparseSize, l.TarSize), l.Chunks, shared)
		}
	}
}

// inspector inspects the artifacts of one image.
type inspector struct {
	reg oci.Registry
	ref oci.Reference
}

func (i *inspector) run(ctx context.Context) ([]inspected, error) {
	_, found, err := findArtifacts(ctx, i.reg, i.ref.Repository, i.ref.Target())
	if err != nil {
		return nil, err
	}
	var all []inspected
	for _, s := range found {
		if s.parsed == nil {
			continue
		}
		a, err := i.artifact(ctx, s)
		if err != nil {
			return nil, fmt.Errorf("artifact %s: %w", s.artifact.Digest, err)
		}
		all = append(all, a)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%s has no streaming artifact that can be read", i.ref)
	}
	return all, i.share(ctx, all)
}

func (i *inspector) source(desc oci.Descriptor) blob.Source {
	return blob.Retry(blob.FromRegistry(i.reg, i.ref.Repository, desc), blob.RetryOptions{})
}

// artifact reads an artifact's chunk table and the beginning of its boot pack.
func (i *inspector) artifact(ctx context.Context, s *streamed) (inspected, error) {
	m := s.parsed
	a := inspected{listedArtifact: listed(s), Mount: m.Metadata.Blob.Size + m.Table.RootSize}
	a.Layers = len(m.Layers)
	table, err := artifact.OpenTable(ctx, m.Table, i.source(m.Table.Blob))
	if err == nil {
		err = m.CheckTable(table)
	}
	if err != nil {
		return a, err
	}
	for n, l := range m.Layers {
		tar, sparse := m.LayerDevices(n)
		d := table.Devices[tar]
		layer := inspectedLayer{DiffID: l.DiffID, Blob: l.Tar.Digest, TarSize: d.ContentSize, Size: l.Tar.Size, MetadataSize: l.Metadata.Blob.Size, Chunks: d.Chunks}
		if n < len(s.manifest.Layers) {
			layer.OriginalSize = s.manifest.Layers[n].Size
			a.MediaTypes = append(a.MediaTypes, s.manifest.Layers[n].MediaType)
		}
		if sparse >= 0 {
			layer.SparseSize = l.Sparse.Size
			layer.Chunks += table.Devices[sparse].Chunks
		}
		a.TarSize += layer.TarSize
		a.Chunks += layer.Chunks
		a.LayerDetails = append(a.LayerDetails, layer)
	}
	if m.BootPack != nil {
		a.BootPack, err = i.bootPack(ctx, *m.BootPack, table)
	}
	return a, err
}

func (i *inspector) bootPack(ctx context.Context, desc oci.Descriptor, table *artifact.Table) (*inspectedBoot, error) {
	r, err := i.source(desc).ReadRange(ctx, 0, desc.Size)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	refs, err := artifact.ParseBootPackHeader(r)
	if err != nil {
		return nil, err
	}
	b := &inspectedBoot{Chunks: len(refs), Size: desc.Size}
	for _, ref := range refs {
		if ref.Device >= len(table.Devices) {
			return nil, fmt.Errorf("boot pack: device %d of %d", ref.Device, len(table.Devices))
		}
		c, err := table.Devices[ref.Device].Chunk(ctx, ref.Index)
		if err != nil {
			return nil, err
		}
		b.Content += int64(c.Length)
	}
	return b, nil
}

// maxSharing is in how many images of a repository shared layers are looked for.
const maxSharing = 200

// share finds the layers that other tags of the repository have as well. In a
// repository of very many tags it isn't worth the requests.
func (i *inspector) share(ctx context.Context, all []inspected) error {
	tags := 0
	for _, err := range i.reg.Tags(ctx, i.ref.Repository, "") {
		if err != nil {
			return err
		}
		if tags++; tags > maxSharing {
			return nil
		}
	}
	images, err := listStreaming(ctx, i.reg, i.ref.Repository)
	if err != nil {
		return err
	}
	own := map[oci.Digest]bool{}
	for _, a := range all {
		own[a.Artifact] = true
	}
	has := map[oci.Digest][]string{} // images by layer blob
	for _, image := range images {
		for _, other := range image.Artifacts {
			if own[other.Artifact] {
				continue
			}
			for _, blob := range other.blobs {
				has[blob] = append(has[blob], strings.TrimPrefix(image.Image, i.ref.Repository))
			}
		}
	}
	for n := range all {
		for k := range all[n].LayerDetails {
			l := &all[n].LayerDetails[k]
			l.SharedWith = slices.Compact(has[l.Blob])
		}
	}
	return nil
}
