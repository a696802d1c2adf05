package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"sluice/internal/acr"
	"sluice/internal/human"
	"sluice/oci"
)

func newManifestCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "manifest",
		Aliases: []string{"manifests"},
		Short:   "Manage the manifests of a repository: images by their digest",
		Long: `Manage the manifests of a repository: images by their digest.

IMAGE is HOST[:PORT]/REPOSITORY with @DIGEST or :TAG, or without the host and
with --registry HOST[:PORT]. A tag stands for the manifest that it names.
Credentials are docker's ("docker login") unless --username gives others.
Registries on the loopback interface are spoken to without TLS.`,
		RunE: group,
	}
	cmd.AddCommand(
		newManifestListCommand(), newManifestShowCommand(), newManifestUpdateCommand(), newManifestDeleteCommand(),
		newManifestListDeletedCommand(), newManifestRestoreCommand(),
	)
	return cmd
}

func newManifestListCommand() *cobra.Command {
	var f managementFlags
	var l listFlags
	cmd := &cobra.Command{
		Use:   "list REPOSITORY",
		Short: "List a repository's manifests",
		Args:  arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			opts, err := l.options()
			if err != nil {
				return err
			}
			client, repo, err := f.repository(cmd, args[0])
			if err != nil {
				return err
			}
			list, err := client.Manifests(cmd.Context(), repo, opts)
			if err != nil {
				return err
			}
			return f.print(cmd.OutOrStdout(), list, func(w io.Writer) {
				fmt.Fprintln(w, "DIGEST\tKIND\tSIZE\tUPDATED\tLOCKED\tTAGS")
				for _, m := range list {
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", shortDigest(m.Digest), kindOf(m), human.Bytes(m.ImageSize), when(m.Updated), lockText(m.Attributes), dash(strings.Join(m.Tags, ",")))
				}
			})
		},
	}
	f.add(cmd)
	l.add(cmd)
	return noFiles(cmd)
}

// kindOf tells in a few letters what a manifest is of.
func kindOf(m acr.Manifest) string {
	switch {
	case m.ArtifactType == oci.ArtifactTypeStreaming:
		return "streaming artifact"
	case m.Subject != "":
		return "referrer"
	case oci.IsIndex(m.MediaType):
		return "index"
	case m.OS != "" && m.OS != "unknown":
		return m.OS + "/" + m.Architecture
	}
	return "artifact"
}

func newManifestShowCommand() *cobra.Command {
	var f managementFlags
	cmd := &cobra.Command{
		Use:   "show IMAGE",
		Short: "Show a manifest's attributes",
		Args:  arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, ref, err := f.image(cmd, args[0])
			if err != nil {
				return err
			}
			d, err := digest(cmd.Context(), client, ref)
			if err != nil {
				return err
			}
			m, err := client.Manifest(cmd.Context(), ref.Repository, d)
			if err != nil {
				return err
			}
			return f.printManifest(cmd.OutOrStdout(), m)
		},
	}
	f.add(cmd)
	return noFiles(cmd)
}

func (f *managementFlags) printManifest(w io.Writer, m acr.Manifest) error {
	return f.print(w, m, func(w io.Writer) {
		field := func(name, value string) {
			if value != "" {
				fmt.Fprintf(w, "%s\t%s\n", name, value)
			}
		}
		field("digest", m.Digest.String())
		field("kind", kindOf(m))
		field("tags", dash(strings.Join(m.Tags, ",")))
		field("size", human.Bytes(m.ImageSize))
		field("pushed", when(m.Created))
		field("pushed by", m.CreatedBy)
		field("updated", when(m.Updated))
		field("locked", lockText(m.Attributes))
		field("media type", m.MediaType)
		field("config", m.ConfigMediaType)
		field("artifact type", m.ArtifactType)
		field("refers to", m.Subject.String())
		for _, r := range m.References {
			field("names", r.Digest.String()+"  "+strings.Trim(r.OS+"/"+r.Architecture, "/"))
		}
	})
}

func newManifestUpdateCommand() *cobra.Command {
	var f managementFlags
	var attributes attributeFlags
	cmd := &cobra.Command{
		Use:   "update IMAGE",
		Short: "Lock a manifest",
		Long: `Lock a manifest.

What a tag of the manifest allows is its own matter: see sluice tag update.`,
		Example: `  sluice manifest update registry.example.com/team/app:v1 --delete-enabled false`,
		Args:    arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			changes, err := attributes.given()
			if err != nil {
				return err
			}
			client, ref, err := f.image(cmd, args[0])
			if err != nil {
				return err
			}
			d, err := digest(cmd.Context(), client, ref)
			if err != nil {
				return err
			}
			m, err := client.UpdateManifest(cmd.Context(), ref.Repository, d, changes)
			if err != nil {
				return err
			}
			return f.printManifest(cmd.OutOrStdout(), m)
		},
	}
	f.add(cmd)
	attributes.add(cmd, false)
	return noFiles(cmd)
}

func newManifestDeleteCommand() *cobra.Command {
	var f managementFlags
	cmd := &cobra.Command{
		Use:   "delete IMAGE",
		Short: "Delete a manifest with all tags that name it",
		Args:  arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, ref, err := f.image(cmd, args[0])
			if err != nil {
				return err
			}
			d, err := digest(cmd.Context(), client, ref)
			if err != nil {
				return err
			}
			m, err := client.Manifest(cmd.Context(), ref.Repository, d)
			if err != nil {
				return err
			}
			if err := f.confirm(cmd, "Delete manifest %s of %s with its tags (%s)?", d, ref.Repository, dash(strings.Join(m.Tags, ", "))); err != nil {
				return err
			}
			if err := client.DeleteManifest(cmd.Context(), ref.Repository, d); err != nil {
				return err
			}
			deleted := acr.DeletedContent{Manifests: []oci.Digest{d}, Tags: append([]string{}, m.Tags...)}
			return f.print(cmd.OutOrStdout(), deleted, func(w io.Writer) {
				fmt.Fprintf(w, "deleted %s@%s, tags: %s\n", ref.Repository, d, dash(strings.Join(m.Tags, ", ")))
			})
		},
	}
	f.add(cmd)
	f.addYes(cmd)
	return noFiles(cmd)
}

func newManifestListDeletedCommand() *cobra.Command {
	var f managementFlags
	cmd := &cobra.Command{
		Use:   "list-deleted REPOSITORY",
		Short: "List deleted manifests that can be restored",
		Args:  arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, repo, err := f.repository(cmd, args[0])
			if err != nil {
				return err
			}
			list, err := client.DeletedManifests(cmd.Context(), repo)
			if err != nil {
				return err
			}
			return f.print(cmd.OutOrStdout(), list, func(w io.Writer) {
				fmt.Fprintln(w, "DIGEST\tSIZE\tDELETED\tLOST AFTER\tTAGS")
				for _, d := range list {
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", d.Digest, human.Bytes(d.ImageSize), when(d.Deleted), when(d.Purged), dash(strings.Join(d.Tags, ",")))
				}
			})
		},
	}
	f.add(cmd)
	return noFiles(cmd)
}

func newManifestRestoreCommand() *cobra.Command {
	var f managementFlags
	var of string
	var force bool
	cmd := &cobra.Command{
		Use:   "restore IMAGE",
		Short: "Restore a deleted manifest",
		Long: `Restore a deleted manifest.

REPOSITORY@DIGEST restores that manifest with the tags that it had.
REPOSITORY:TAG restores the one that the tag named, deleted last if there are
several, and gives it this tag; --digest says which one instead.`,
		Example: `  sluice manifest restore registry.example.com/team/app:v1`,
		Args:    arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, ref, err := f.image(cmd, args[0])
			if err != nil {
				return err
			}
			d := ref.Digest
			if of != "" {
				if d != "" {
					return errors.New("give the digest either in IMAGE or by --digest")
				}
				if d, err = oci.ParseDigest(of); err != nil {
					return err
				}
			}
			if d == "" {
				if d, err = deletedDigest(cmd, client, ref); err != nil {
					return err
				}
			}
			r, err := client.Restore(cmd.Context(), ref.Repository, d, ref.Tag, force)
			if err != nil {
				return err
			}
			return f.print(cmd.OutOrStdout(), r, func(w io.Writer) {
				name := ref.Repository + "@" + r.Digest.String()
				if r.Tag != "" {
					name = ref.Repository + ":" + r.Tag + ", " + r.Digest.String()
				}
				fmt.Fprintf(w, "restored %s\n", name)
			})
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&of, "digest", "", "restore the manifest with this `DIGEST`")
	cmd.Flags().BoolVar(&force, "force", false, "move the tag if it names another manifest by now")
	return noFiles(cmd)
}

// deletedDigest returns the digest of the manifest that was deleted last of
// those that had the tag.
func deletedDigest(cmd *cobra.Command, client *acr.Client, ref oci.Reference) (oci.Digest, error) {
	list, err := client.DeletedManifests(cmd.Context(), ref.Repository)
	if err != nil {
		return "", err
	}
	for _, d := range slices.Backward(list) {
		if slices.Contains(d.Tags, ref.Tag) {
			return d.Digest, nil
		}
	}
	return "", fmt.Errorf("repository %s has no deleted manifest that had the tag %s: see sluice manifest list-deleted, and name it by --digest", ref.Repository, ref.Tag)
}
