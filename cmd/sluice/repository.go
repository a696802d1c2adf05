package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"sluice/internal/acr"
	"sluice/internal/human"
	"sluice/oci"
)

func newRepositoryCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "repository",
		Aliases: []string{"repositories"},
		Short:   "Manage a registry's repositories",
		Long: `Manage a registry's repositories.

REPOSITORY is HOST[:PORT]/NAME, or NAME with --registry HOST[:PORT].
Credentials are docker's ("docker login") unless --username gives others.
Registries on the loopback interface are spoken to without TLS.`,
		RunE: group,
	}
	cmd.AddCommand(
		newRepositoryListCommand(), newRepositoryShowCommand(), newRepositoryUpdateCommand(), newRepositoryDeleteCommand(),
		newRepositoryUsageCommand(), newRepositoryListDeletedCommand(), newRepositoryRestoreCommand(),
	)
	return cmd
}

func newRepositoryListCommand() *cobra.Command {
	var f managementFlags
	var top int
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the repositories",
		Args:  arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := f.client(cmd)
			if err != nil {
				return err
			}
			names, err := client.Repositories(cmd.Context(), acr.ListOptions{Top: max(top, 0)})
			if err != nil {
				return err
			}
			return f.print(cmd.OutOrStdout(), names, func(w io.Writer) {
				for _, name := range names {
					fmt.Fprintln(w, name)
				}
			})
		},
	}
	f.add(cmd)
	cmd.Flags().IntVar(&top, "top", 0, "list at most `N` (default all)")
	return noFiles(cmd)
}

func newRepositoryShowCommand() *cobra.Command {
	var f managementFlags
	cmd := &cobra.Command{
		Use:   "show REPOSITORY",
		Short: "Show a repository's attributes",
		Args:  arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, repo, err := f.repository(cmd, args[0])
			if err != nil {
				return err
			}
			r, err := client.Repository(cmd.Context(), repo)
			if err != nil {
				return err
			}
			return f.printRepository(cmd.OutOrStdout(), r)
		},
	}
	f.add(cmd)
	return noFiles(cmd)
}

func (f *managementFlags) printRepository(w io.Writer, r acr.Repository) error {
	return f.print(w, r, func(w io.Writer) {
		fmt.Fprintf(w, "repository\t%s\n", r.Name)
		fmt.Fprintf(w, "created\t%s\n", when(r.Created))
		fmt.Fprintf(w, "updated\t%s\n", when(r.Updated))
		fmt.Fprintf(w, "manifests\t%d\n", r.ManifestCount)
		fmt.Fprintf(w, "tags\t%d\n", r.TagCount)
		fmt.Fprintf(w, "locked\t%s\n", lockText(r.Attributes.Attributes))
		fmt.Fprintf(w, "streaming\t%s\n", yesNo(r.Attributes.StreamingEnabled))
		fmt.Fprintf(w, "teleport\t%s\n", yesNo(r.Attributes.TeleportEnabled))
		fmt.Fprintf(w, "anonymous pull\t%s\n", yesNo(r.Attributes.AnonymousPullEnabled))
	})
}

func newRepositoryUpdateCommand() *cobra.Command {
	var f managementFlags
	var attributes attributeFlags
	cmd := &cobra.Command{
		Use:   "update REPOSITORY",
		Short: "Lock a repository, or change its other attributes",
		Example: `  sluice repository update registry.example.com/team/app --write-enabled false
  sluice repository update -r 127.0.0.1:5000 team/app --streaming-enabled true`,
		Args: arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			changes, err := attributes.given()
			if err != nil {
				return err
			}
			client, repo, err := f.repository(cmd, args[0])
			if err != nil {
				return err
			}
			r, err := client.UpdateRepository(cmd.Context(), repo, changes)
			if err != nil {
				return err
			}
			return f.printRepository(cmd.OutOrStdout(), r)
		},
	}
	f.add(cmd)
	attributes.add(cmd, true)
	return noFiles(cmd)
}

func newRepositoryDeleteCommand() *cobra.Command {
	var f managementFlags
	cmd := &cobra.Command{
		Use:   "delete REPOSITORY",
		Short: "Delete a repository with all its images",
		Args:  arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, repo, err := f.repository(cmd, args[0])
			if err != nil {
				return err
			}
			r, err := client.Repository(cmd.Context(), repo)
			if err != nil {
				return err
			}
			if err := f.confirm(cmd, "Delete repository %s with %s and %s?", repo, plural(r.ManifestCount, "manifest"), plural(r.TagCount, "tag")); err != nil {
				return err
			}
			d, err := client.DeleteRepository(cmd.Context(), repo)
			if err != nil {
				return err
			}
			return f.print(cmd.OutOrStdout(), d, func(w io.Writer) {
				fmt.Fprintf(w, "deleted %s: %s, %s\n", repo, plural(len(d.Manifests), "manifest"), plural(len(d.Tags), "tag"))
			})
		},
	}
	f.add(cmd)
	f.addYes(cmd)
	return noFiles(cmd)
}

func newRepositoryUsageCommand() *cobra.Command {
	var f managementFlags
	cmd := &cobra.Command{
		Use:   "usage [REPOSITORY]",
		Short: "Show how much a repository holds, or each and all together",
		Long: `Show how much a repository holds, or each and all together.

SHARED is the part of SIZE in blobs that other repositories have as well: they
are stored once, so to delete the repository frees SIZE - SHARED. That of all
together needs the admin user.`,
		Args: arguments(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			usages, err := f.usages(cmd, args)
			if err != nil {
				return err
			}
			var doc any = usages
			if len(args) == 1 {
				doc = usages[0]
			}
			return f.print(cmd.OutOrStdout(), doc, func(w io.Writer) {
				fmt.Fprintln(w, "REPOSITORY\tMANIFESTS\tBLOBS\tSIZE\tSHARED")
				for _, u := range usages {
					name := u.Repository
					if name == "" {
						name = "(the whole registry)"
					}
					fmt.Fprintf(w, "%s\t%d\t%d\t%s\t%s\n", name, u.Manifests, u.Blobs, human.Bytes(u.Size), human.Bytes(u.Shared))
				}
			})
		},
	}
	f.add(cmd)
	return noFiles(cmd)
}

// usages returns the usage of one repository, or of each and of the registry.
func (f *managementFlags) usages(cmd *cobra.Command, args []string) ([]acr.Usage, error) {
	if len(args) == 1 {
		client, repo, err := f.repository(cmd, args[0])
		if err != nil {
			return nil, err
		}
		u, err := client.Usage(cmd.Context(), repo)
		return []acr.Usage{u}, err
	}
	client, err := f.client(cmd)
	if err != nil {
		return nil, err
	}
	names, err := client.Repositories(cmd.Context(), acr.ListOptions{})
	if err != nil {
		return nil, err
	}
	var all []acr.Usage
	for _, name := range append(names, "") {
		u, err := client.Usage(cmd.Context(), name)
		if errors.Is(err, oci.ErrNameUnknown) {
			continue // it was deleted meanwhile
		}
		if err != nil {
			return nil, err
		}
		all = append(all, u)
	}
	return all, nil
}

func newRepositoryListDeletedCommand() *cobra.Command {
	var f managementFlags
	cmd := &cobra.Command{
		Use:   "list-deleted",
		Short: "List deleted repositories that can be restored",
		Args:  arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := f.client(cmd)
			if err != nil {
				return err
			}
			list, err := client.DeletedRepositories(cmd.Context())
			if err != nil {
				return err
			}
			return f.print(cmd.OutOrStdout(), list, func(w io.Writer) {
				fmt.Fprintln(w, "REPOSITORY\tDELETED")
				for _, d := range list {
					fmt.Fprintf(w, "%s\t%s\n", d.Name, when(d.Deleted))
				}
			})
		},
	}
	f.add(cmd)
	return noFiles(cmd)
}

func newRepositoryRestoreCommand() *cobra.Command {
	var f managementFlags
	cmd := &cobra.Command{
		Use:   "restore REPOSITORY",
		Short: "Restore all deleted manifests of a repository, with their tags",
		Args:  arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, repo, err := f.repository(cmd, args[0])
			if err != nil {
				return err
			}
			deleted, err := client.DeletedManifests(cmd.Context(), repo)
			if err != nil {
				return err
			}
			if len(deleted) == 0 {
				return fmt.Errorf("repository %s has no deleted manifests", repo)
			}
			restored, err := restoreAll(cmd.Context(), client, repo, deleted)
			if printed := f.print(cmd.OutOrStdout(), restored, func(w io.Writer) {
				fmt.Fprintf(w, "restored %s of %d in %s\n", plural(len(restored), "manifest"), len(deleted), repo)
			}); err == nil {
				err = printed
			}
			return err
		},
	}
	f.add(cmd)
	return noFiles(cmd)
}

// restoreAll restores manifests. An index can be restored only after the
// manifests that it names, so it goes on as long as something succeeds.
func restoreAll(ctx context.Context, client *acr.Client, repo string, deleted []acr.DeletedManifest) ([]acr.Restored, error) {
	restored := []acr.Restored{}
	for len(deleted) > 0 {
		var failed []acr.DeletedManifest
		var errs error
		for _, d := range deleted {
			r, err := client.Restore(ctx, repo, d.Digest, "", false)
			if ctx.Err() != nil {
				return restored, ctx.Err()
			}
			if err != nil {
				failed, errs = append(failed, d), errors.Join(errs, err)
				continue
			}
			restored = append(restored, r)
		}
		if len(failed) == len(deleted) {
			return restored, errs
		}
		deleted = failed
	}
	return restored, nil
}
