package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/spf13/cobra"

	"sluice/oci"
)

func newArtifactStreamingDeleteCommand() *cobra.Command {
	var f streamingFlags
	cmd := &cobra.Command{
		Use:   "delete IMAGE",
		Short: "Delete the streaming artifacts of an image, and keep the image",
		Long: `Delete the streaming artifacts of an image, and keep the image.

Of a multi-platform image those of all its platforms are deleted, which another
tag may name as well. Containers that run from an artifact need it until they
have ended, unless all of it is in their nodes' caches.`,
		Example: `  sluice artifact-streaming delete registry.example.com/team/app:v1`,
		Args:    arguments(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, ref, err := f.image(cmd, args)
			if err != nil {
				return err
			}
			_, found, err := findArtifacts(cmd.Context(), p.images, ref.Repository, ref.Target())
			if err != nil {
				return err
			}
			digests := artifactDigests(found)
			if len(digests) == 0 {
				return fmt.Errorf("%s has no streaming artifact", ref)
			}
			if err := f.confirm(cmd, "Delete %s of %s?", plural(len(digests), "streaming artifact"), ref); err != nil {
				return err
			}
			deleted, err := deleteArtifacts(cmd.Context(), p.images, ref.Repository, digests)
			if printed := f.print(cmd.OutOrStdout(), map[string]any{"image": ref.String(), "deleted": deleted}, func(w io.Writer) {
				fmt.Fprintf(w, "deleted %s of %s\n", plural(len(deleted), "streaming artifact"), ref)
			}); err == nil {
				err = printed
			}
			return err
		},
	}
	f.addImage(cmd)
	f.addYes(cmd)
	return noFiles(cmd)
}

// artifactDigests returns the artifacts' digests, those of the index first: what
// is left if it's interrupted is what another conversion begins with.
func artifactDigests(found []*streamed) (all []oci.Digest) {
	add := func(d oci.Digest) {
		if d != "" && !slices.Contains(all, d) {
			all = append(all, d)
		}
	}
	for _, s := range found {
		if s.forIndex != nil {
			add(s.forIndex.Digest)
		}
	}
	for _, s := range found {
		add(s.artifact.Digest)
	}
	return all
}

func deleteArtifacts(ctx context.Context, reg oci.Deleter, repo string, digests []oci.Digest) (deleted []oci.Digest, err error) {
	deleted = []oci.Digest{}
	for _, d := range digests {
		if err := reg.DeleteManifest(ctx, repo, d); err != nil && !errors.Is(err, oci.ErrManifestUnknown) {
			return deleted, fmt.Errorf("%w (deleted before that: %d of %d)", err, len(deleted), len(digests))
		}
		deleted = append(deleted, d)
	}
	return deleted, nil
}
