package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"sluice/internal/acr"
	"sluice/oci"
)

func newTagCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "tag",
		Aliases: []string{"tags"},
		Short:   "Manage the tags of a repository",
		Long: `Manage the tags of a repository.

IMAGE is HOST[:PORT]/REPOSITORY:TAG, or without the host and with --registry
HOST[:PORT]. Credentials are docker's ("docker login") unless --username gives
others. Registries on the loopback interface are spoken to without TLS.`,
		RunE: group,
	}
	cmd.AddCommand(newTagListCommand(), newTagShowCommand(), newTagUpdateCommand(), newTagDeleteCommand())
	return cmd
}

func newTagListCommand() *cobra.Command {
	var f managementFlags
	var l listFlags
	cmd := &cobra.Command{
		Use:   "list REPOSITORY",
		Short: "List a repository's tags",
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
			list, err := client.Tags(cmd.Context(), repo, opts)
			if err != nil {
				return err
			}
			return f.print(cmd.OutOrStdout(), list, func(w io.Writer) {
				fmt.Fprintln(w, "TAG\tDIGEST\tUPDATED\tLOCKED")
				for _, t := range list {
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", t.Name, shortDigest(t.Digest), when(t.Updated), lockText(t.Attributes))
				}
			})
		},
	}
	f.add(cmd)
	l.add(cmd)
	return noFiles(cmd)
}

// tag is image for a tag.
func (f *managementFlags) tag(cmd *cobra.Command, name string) (*acr.Client, oci.Reference, error) {
	client, ref, err := f.image(cmd, name)
	if err == nil && ref.Tag == "" {
		err = fmt.Errorf("%s: name a tag, as REPOSITORY:TAG", name)
	}
	return client, ref, err
}

func (f *managementFlags) printTag(w io.Writer, t acr.Tag) error {
	return f.print(w, t, func(w io.Writer) {
		fmt.Fprintf(w, "tag\t%s\n", t.Name)
		fmt.Fprintf(w, "digest\t%s\n", t.Digest)
		fmt.Fprintf(w, "created\t%s\n", when(t.Created))
		fmt.Fprintf(w, "updated\t%s\n", when(t.Updated))
		fmt.Fprintf(w, "locked\t%s\n", lockText(t.Attributes))
	})
}

func newTagShowCommand() *cobra.Command {
	var f managementFlags
	cmd := &cobra.Command{
		Use:   "show IMAGE",
		Short: "Show a tag's attributes",
		Args:  arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, ref, err := f.tag(cmd, args[0])
			if err != nil {
				return err
			}
			t, err := client.Tag(cmd.Context(), ref.Repository, ref.Tag)
			if err != nil {
				return err
			}
			return f.printTag(cmd.OutOrStdout(), t)
		},
	}
	f.add(cmd)
	return noFiles(cmd)
}

func newTagUpdateCommand() *cobra.Command {
	var f managementFlags
	var attributes attributeFlags
	cmd := &cobra.Command{
		Use:     "update IMAGE",
		Short:   "Lock a tag",
		Example: `  sluice tag update registry.example.com/team/app:v1 --write-enabled false`,
		Args:    arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			changes, err := attributes.given()
			if err != nil {
				return err
			}
			client, ref, err := f.tag(cmd, args[0])
			if err != nil {
				return err
			}
			t, err := client.UpdateTag(cmd.Context(), ref.Repository, ref.Tag, changes)
			if err != nil {
				return err
			}
			return f.printTag(cmd.OutOrStdout(), t)
		},
	}
	f.add(cmd)
	attributes.add(cmd, false)
	return noFiles(cmd)
}

func newTagDeleteCommand() *cobra.Command {
	var f managementFlags
	cmd := &cobra.Command{
		Use:   "delete IMAGE",
		Short: "Delete a tag and leave the manifest",
		Args:  arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, ref, err := f.tag(cmd, args[0])
			if err != nil {
				return err
			}
			if err := f.confirm(cmd, "Delete tag %s of %s?", ref.Tag, ref.Repository); err != nil {
				return err
			}
			if err := client.DeleteTag(cmd.Context(), ref.Repository, ref.Tag); err != nil {
				return err
			}
			deleted := acr.DeletedContent{Manifests: []oci.Digest{}, Tags: []string{ref.Tag}}
			return f.print(cmd.OutOrStdout(), deleted, func(w io.Writer) {
				fmt.Fprintf(w, "deleted tag %s of %s\n", ref.Tag, ref.Repository)
			})
		},
	}
	f.add(cmd)
	f.addYes(cmd)
	return noFiles(cmd)
}
