package main

import (
	"context"
	"fmt"
	"io"
	"slices"

	"sluice/internal/artifact"
	"sluice/internal/human"
	"sluice/oci"
)

// plannedBoot is the plan of a boot pack.
type plannedBoot struct {
	Platform string        `json:"platform"`
	Artifact oci.Digest    `json:"artifact"`
	Size     int64         `json:"size"`
	Limit    int64         `json:"limit"`
	Full     bool          `json:"full,omitempty"`
	Chunks   int           `json:"chunks"`
	Files    []plannedFile `json:"files"`

	// Packed is false if the artifact's boot pack is another one: an earlier
	// version made it.
	Packed bool `json:"packed"`
}

// plannedFile is a file of which something is in a boot pack.
type plannedFile struct {
	Path    string            `json:"path"`
	Why     artifact.BootRule `json:"why"`
	For     string            `json:"for,omitempty"`
	Size    int64             `json:"size"`
	Planned int64             `json:"planned"`
	Chunks  int               `json:"chunks"`
	Added   int64             `json:"added"`
}

// boot explains the boot packs of an image.
func (i *inspector) boot(ctx context.Context) ([]plannedBoot, error) {
	_, found, err := findArtifacts(ctx, i.reg, i.ref.Repository, i.ref.Target())
	if err != nil {
		return nil, err
	}
	var all []plannedBoot
	for _, s := range found {
		if s.parsed == nil {
			continue
		}
		p, err := i.plan(ctx, s)
		if err != nil {
			return nil, fmt.Errorf("boot pack of artifact %s: %w", s.artifact.Digest, err)
		}
		all = append(all, p)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%s has no streaming artifact that can be read", i.ref)
	}
	return all, nil
}

func (i *inspector) plan(ctx context.Context, s *streamed) (plannedBoot, error) {
	p := plannedBoot{Platform: platformName(s.platform), Artifact: s.artifact.Digest, Files: []plannedFile{}}
	config, err := readBlob(ctx, i.reg, i.ref.Repository, s.parsed.Config)
	if err != nil {
		return p, err
	}
	plan, err := artifact.ExplainBoot(ctx, s.parsed, config, i.source)
	if err != nil {
		return p, err
	}
	p.Size, p.Limit, p.Full, p.Chunks = plan.Size, plan.Limit, plan.Full, len(plan.Chunks)
	for _, f := range plan.Files {
		p.Files = append(p.Files, plannedFile{Path: f.Path, Why: f.Rule, For: f.For, Size: f.Size, Planned: f.Planned, Chunks: f.Chunks, Added: f.Added})
	}
	p.Packed, err = i.packed(ctx, s.parsed.BootPack, plan.Chunks)
	return p, err
}

// packed reports whether a boot pack has these chunks.
func (i *inspector) packed(ctx context.Context, pack *oci.Descriptor, chunks []artifact.ChunkRef) (bool, error) {
	if pack == nil {
		return len(chunks) == 0, nil
	}
	r, err := i.source(*pack).ReadRange(ctx, 0, pack.Size)
	if err != nil {
		return false, err
	}
	defer r.Close()
	refs, err := artifact.ParseBootPackHeader(r)
	return slices.Equal(refs, chunks), err
}

func printPlannedBoot(w io.Writer, all []plannedBoot) {
	for i, p := range all {
		if i > 0 {
			fmt.Fprintln(w)
		}
		fmt.Fprintf(w, "%s\t%s in %s, at most %s\n", p.Platform, human.Bytes(p.Size), plural(p.Chunks, "chunk"), human.Bytes(p.Limit))
		if p.Full {
			fmt.Fprintf(w, "\tit is full: what would be read last is left out\n")
		}
		if !p.Packed {
			fmt.Fprintf(w, "\tthe artifact was made by another version, and has another boot pack\n")
		}
		fmt.Fprintln(w, "\nFILE\tSIZE\tPLANNED\tADDS\tWHY\tFOR")
		for _, f := range p.Files {
			why := f.For
			if why == "" {
				why = "the image's config"
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", f.Path, human.Bytes(f.Size), ratio(f.Planned, f.Size), human.Bytes(f.Added), f.Why, why)
		}
	}
}
