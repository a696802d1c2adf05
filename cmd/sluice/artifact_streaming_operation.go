package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"sluice/internal/acr"
)

func newArtifactStreamingOperationCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "operation",
		Short: "Show or cancel a conversion that a registry does",
		Long: `Show or cancel a conversion that a registry does: the one with an ID in a
repository, or the last one of an image.`,
		RunE: group,
	}
	cmd.AddCommand(
		newOperationCommand("show", "Show how far a conversion is", (*acr.Client).StreamingOperation),
		newOperationCommand("cancel", "Cancel a conversion", (*acr.Client).CancelStreaming),
	)
	return cmd
}

func newOperationCommand(verb, short string, do func(c *acr.Client, ctx context.Context, repo, id string) (acr.Operation, error)) *cobra.Command {
	var f streamingFlags
	var id string
	cmd := &cobra.Command{
		Use:   verb + " (--repository REPOSITORY --id ID | --image IMAGE)",
		Short: short,
		Example: "  sluice artifact-streaming operation " + verb + ` -r 127.0.0.1:5000 --image debian:12
  sluice artifact-streaming operation ` + verb + " --repository registry.example.com/team/app --id 43d5…",
		Args: arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			p, repo, id, err := f.operation(cmd, id)
			if err != nil {
				return err
			}
			op, err := do(p.manage, cmd.Context(), repo, id)
			if err != nil {
				return withCode(err)
			}
			return f.print(cmd.OutOrStdout(), op, func(w io.Writer) { printOperation(w, op) })
		},
	}
	f.addImage(cmd)
	cmd.Flags().StringVar(&f.repositoryFlag, "repository", "", "the operation's `REPOSITORY`")
	cmd.Flags().StringVar(&id, "id", "", "the operation's `ID`")
	return noFiles(cmd)
}

// operation returns which operation the flags mean.
func (f *streamingFlags) operation(cmd *cobra.Command, id string) (p *place, repo, operation string, err error) {
	byID := f.repositoryFlag != "" && id != "" && f.imageFlag == ""
	byImage := f.imageFlag != "" && f.repositoryFlag == "" && id == ""
	switch {
	case byID:
		p, repo, err := f.repository(cmd, nil)
		return p, repo, id, err
	case !byImage:
		return nil, "", "", errors.New("which operation? Give either --repository and --id, or --image")
	}
	p, ref, err := f.image(cmd, nil)
	if err != nil {
		return nil, "", "", err
	}
	subject, err := p.digest(cmd.Context(), ref)
	if err != nil {
		return nil, "", "", withCode(err)
	}
	op, err := p.manage.LatestStreaming(cmd.Context(), ref.Repository, subject)
	if errors.Is(err, acr.ErrOperationUnknown) {
		err = fmt.Errorf("nothing has converted %s lately: %w", ref, err)
	}
	if err != nil {
		return nil, "", "", withCode(err)
	}
	return p, ref.Repository, op.ID, nil
}

func printOperation(w io.Writer, op acr.Operation) {
	field := func(name, value string) {
		if value != "" {
			fmt.Fprintf(w, "%s\t%s\n", name, value)
		}
	}
	field("id", op.ID)
	field("name", op.Name)
	field("resource", op.Resource)
	field("status", string(op.Status))
	if !op.StartTime.IsZero() {
		field("started", when(op.StartTime))
	}
	field("progress", op.Progress)
	field("error", op.ErrorCode)
	field("details", op.Details)
}
