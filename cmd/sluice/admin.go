package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sluice/internal/acr"
	"sluice/internal/human"
)

func newAdminCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "admin",
		Short: "Have a registry collect garbage, or import images by itself",
		Long: `Have a registry collect garbage, or import images by itself.

Only the admin user may. To copy an image through this machine, which needs no
more than the rights to push, see sluice import.`,
		RunE: group,
	}
	cmd.AddCommand(newAdminGCCommand(), newAdminImportCommand(), newAdminOperationCommand())
	return cmd
}

func newAdminGCCommand() *cobra.Command {
	f := managementFlags{patience: 24 * time.Hour} // the registry answers at the end
	cmd := &cobra.Command{
		Use:   "gc",
		Short: "Remove blobs that nothing needs, and deleted manifests whose time is over",
		Long: `Remove blobs that nothing needs, and deleted manifests whose time is over.

The registry does so by itself from time to time. It serves meanwhile, and spares
what may belong to a push that is under way.`,
		Args: arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := f.client(cmd)
			if err != nil {
				return err
			}
			r, err := client.Collect(cmd.Context())
			if err != nil {
				return err
			}
			return f.print(cmd.OutOrStdout(), r, func(w io.Writer) {
				fmt.Fprintf(w, "removed %s of %s, and for good %s\n", plural(r.Blobs, "blob"), human.Bytes(r.Bytes), plural(r.Purged, "deleted manifest"))
			})
		},
	}
	f.add(cmd)
	return noFiles(cmd)
}

func newAdminImportCommand() *cobra.Command {
	var f managementFlags
	var r acr.ImportRequest
	var noWait, passwordStdin bool
	cmd := &cobra.Command{
		Use:   "import SOURCE [TARGET]",
		Short: "Have the registry fetch an image from another registry",
		Long: `Have the registry fetch an image from another registry.

SOURCE is HOST[:PORT]/REPOSITORY with :TAG or @DIGEST, as the registry reaches it.
TARGET is REPOSITORY[:TAG] in --registry; by default it is as in SOURCE.`,
		Example: `  sluice admin import -r registry.example.com docker.io/library/debian:12 mirror/debian:12`,
		Args:    arguments(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			r.Source = args[0]
			if len(args) == 2 {
				r.Target = args[1]
			}
			client, err := f.client(cmd)
			if err != nil {
				return err
			}
			if passwordStdin {
				if r.Password, err = readPassword(cmd.InOrStdin()); err != nil {
					return err
				}
			}
			op, err := client.Import(cmd.Context(), r)
			if err != nil {
				return err
			}
			if noWait {
				fmt.Fprintf(cmd.ErrOrStderr(), "It goes on by itself. See: sluice admin operation show -r %s %s\n", f.registry, op.ID)
				return f.printOperation(cmd.OutOrStdout(), op)
			}
			if op, err = waitFor(cmd.Context(), client, op, cmd.ErrOrStderr()); err != nil {
				return err
			}
			if op.Status == acr.StatusSucceeded || f.output == "json" {
				err = f.printOperation(cmd.OutOrStdout(), op)
			}
			if err == nil && op.Status != acr.StatusSucceeded {
				return fmt.Errorf("the import to %s %s: %s", op.Resource, statusVerb(op.Status), op.Details)
			}
			return err
		},
	}
	f.add(cmd)
	flags := cmd.Flags()
	flags.StringVar(&r.Platform, "platform", "", "import only `PLATFORM`, such as linux/arm64 (default all)")
	flags.BoolVar(&r.Referrers, "referrers", false, "import signatures, attestations and SBOMs, too")
	flags.BoolVar(&r.Force, "force", false, "move the target's tag if it exists")
	flags.StringVar(&r.Username, "source-username", "", "`NAME` at the source's registry")
	flags.BoolVar(&passwordStdin, "source-password-stdin", false, "read the password for it from standard input")
	flags.BoolVar(&r.PlainHTTP, "source-plain-http", false, "let the registry speak HTTP without TLS with the source")
	flags.BoolVar(&noWait, "no-wait", false, "don't wait for the end")
	cmd.MarkFlagsRequiredTogether("source-username", "source-password-stdin")
	cmd.MarkFlagsMutuallyExclusive("password-stdin", "source-password-stdin")
	return noFiles(cmd)
}

// pollEvery is how often an operation is asked for.
const pollEvery = time.Second

// waitFor waits for the end of an operation, and says what changes. To end the
// program leaves the operation running.
func waitFor(ctx context.Context, client *acr.Client, op acr.Operation, stderr io.Writer) (acr.Operation, error) {
	id, said := op.ID, ""
	op, err := client.Wait(ctx, id, pollEvery, func(op acr.Operation) {
		now := cmp.Or(op.Details, op.Progress, string(op.Status))
		if now != said && !op.Status.Final() {
			said = now
			fmt.Fprintf(stderr, "%s: %s\n", op.Resource, now)
		}
	})
	if err != nil && ctx.Err() != nil {
		return op, fmt.Errorf("no longer waiting; operation %s goes on. To end it: sluice admin operation cancel %s", id, id)
	}
	return op, err
}

func statusVerb(s acr.Status) string {
	if s == acr.StatusCanceled {
		return "was canceled"
	}
	return "failed"
}

func (f *managementFlags) printOperation(w io.Writer, op acr.Operation) error {
	return f.print(w, op, func(w io.Writer) {
		fmt.Fprintf(w, "operation\t%s\n", op.ID)
		fmt.Fprintf(w, "resource\t%s\n", op.Resource)
		fmt.Fprintf(w, "status\t%s\n", strings.TrimSpace(string(op.Status)+" "+op.Progress))
		fmt.Fprintf(w, "started\t%s\n", when(op.StartTime))
		if op.Digest != "" {
			fmt.Fprintf(w, "digest\t%s\n", op.Digest)
		}
		if op.Details != "" {
			fmt.Fprintf(w, "details\t%s\n", op.Details)
		}
	})
}

func newAdminOperationCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "operation", Short: "Show or cancel what was begun", RunE: group}
	verb := func(use, short string, do func(*acr.Client, context.Context, string) (acr.Operation, error)) *cobra.Command {
		var f managementFlags
		cmd := &cobra.Command{
			Use: use + " ID", Short: short, Args: arguments(1, 1),
			RunE: func(cmd *cobra.Command, args []string) error {
				client, err := f.client(cmd)
				if err != nil {
					return err
				}
				op, err := do(client, cmd.Context(), args[0])
				if errors.Is(err, acr.ErrOperationUnknown) {
					return fmt.Errorf("%w: those that ended are forgotten after some time", err)
				}
				if err != nil {
					return err
				}
				return f.printOperation(cmd.OutOrStdout(), op)
			},
		}
		f.add(cmd)
		return noFiles(cmd)
	}
	cmd.AddCommand(
		verb("show", "Show an operation", (*acr.Client).Operation),
		verb("cancel", "Cancel an operation", (*acr.Client).CancelOperation),
	)
	return cmd
}
