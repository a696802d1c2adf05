package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"sluice/internal/human"
	"sluice/oci"
)

// listedImage is what `list` tells of an image.
type listedImage struct {
	Image     string           `json:"image"` // REPOSITORY:TAG
	Digest    oci.Digest       `json:"digest"`
	Artifacts []listedArtifact `json:"artifacts"`
}

// listedArtifact is what `list` tells of a platform.
type listedArtifact struct {
	Platform      string     `json:"platform"`
	Image         oci.Digest `json:"image"`
	Artifact      oci.Digest `json:"artifact,omitempty"` // empty: there's none
	IndexArtifact oci.Digest `json:"indexArtifact,omitempty"`
	Format        string     `json:"format,omitempty"`
	Layers        int        `json:"layers"`
	OriginalSize  int64      `json:"originalSize"`
	LayersSize    int64      `json:"layersSize,omitempty"`
	MetadataSize  int64      `json:"metadataSize,omitempty"`

	blobs []oci.Digest // the layers'
}

func listed(s *streamed) listedArtifact {
	a := listedArtifact{
		Platform: platformName(s.platform), Image: s.image.Digest, Artifact: s.artifact.Digest, Format: s.format,
		Layers: len(s.manifest.Layers), OriginalSize: s.originalSize(),
	}
	if s.platform.OS == "" {
		a.Platform = ""
	}
	if s.forIndex != nil {
		a.IndexArtifact = s.forIndex.Digest
	}
	a.LayersSize, a.MetadataSize = s.sizes()
	if s.parsed != nil {
		for _, l := range s.parsed.Layers {
			a.blobs = append(a.blobs, l.Tar.Digest)
		}
	}
	return a
}

// lookups is how many images `list` looks up at once.
const lookups = 8

func newArtifactStreamingListCommand() *cobra.Command {
	var f streamingFlags
	cmd := &cobra.Command{
		Use:   "list REPOSITORY|IMAGE",
		Short: "List images with their streaming artifacts",
		Long: `List images with their streaming artifacts: of a repository those that have a
tag, or one image. Those that have none are listed, too.`,
		Example: `  sluice artifact-streaming list registry.example.com/team/app
  sluice artifact-streaming list -r 127.0.0.1:5000 debian:12 -o json`,
		Args: arguments(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := name(args, f.repositoryFlag, "repository", "repository")
			if err != nil {
				return err
			}
			p, rest, err := f.at(cmd, name)
			if err != nil {
				return err
			}
			all, err := listStreaming(cmd.Context(), p.images, rest)
			if err != nil {
				return err
			}
			return f.print(cmd.OutOrStdout(), all, func(w io.Writer) { printListed(w, all) })
		},
	}
	f.addRepository(cmd)
	return noFiles(cmd)
}

func printListed(w io.Writer, all []listedImage) {
	fmt.Fprintln(w, "IMAGE\tPLATFORM\tARTIFACT\tFORMAT\tLAYERS\tSIZE\tSTREAMED\tMETADATA")
	for _, image := range all {
		for _, a := range image.Artifacts {
			streamedSize, metadata := "-", "-"
			if a.MetadataSize > 0 {
				streamedSize, metadata = human.Bytes(a.LayersSize), human.Bytes(a.MetadataSize)
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\t%s\t%s\n", image.Image, dash(a.Platform), dash(shortDigest(a.Artifact)), dash(a.Format),
				a.Layers, human.Bytes(a.OriginalSize), streamedSize, metadata)
		}
	}
}

// listStreaming lists the image that name is of, or those of the repository.
func listStreaming(ctx context.Context, reg oci.Registry, name string) ([]listedImage, error) {
	if strings.ContainsAny(name, ":@") {
		ref, err := oci.ParseReference("registry.invalid/" + name)
		if err != nil {
			return nil, err
		}
		image, err := listImage(ctx, reg, ref.Repository, ref.Target())
		return []listedImage{image}, err
	}
	if err := oci.CheckRepository(name); err != nil {
		return nil, err
	}
	var tags []string
	for tag, err := range reg.Tags(ctx, name, "") {
		if err != nil {
			return nil, err
		}
		if !isReferrersTag(tag) {
			tags = append(tags, tag)
		}
	}
	found := make([]*listedImage, len(tags))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(lookups)
	for i, tag := range tags {
		group.Go(func() error {
			image, err := listImage(ctx, reg, name, tag)
			if errors.Is(err, oci.ErrManifestUnknown) {
				return nil // deleted meanwhile
			}
			found[i] = &image
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	all := []listedImage{}
	for _, image := range found {
		if image != nil {
			all = append(all, *image)
		}
	}
	return all, nil
}

func listImage(ctx context.Context, reg oci.Registry, repo, reference string) (listedImage, error) {
	subject, found, err := findArtifacts(ctx, reg, repo, reference)
	image := listedImage{Image: repo + ":" + reference, Digest: subject.Digest, Artifacts: []listedArtifact{}}
	if subject.Digest.String() == reference {
		image.Image = repo + "@" + reference
	}
	for _, s := range found {
		image.Artifacts = append(image.Artifacts, listed(s))
	}
	return image, err
}

// isReferrersTag reports whether a tag is the index of a manifest's referrers
// (distribution-spec 1.1, "Referrers Tag Schema").
func isReferrersTag(tag string) bool {
	algorithm, encoded, ok := strings.Cut(tag, "-")
	_, err := oci.ParseDigest(algorithm + ":" + encoded)
	return ok && err == nil
}
