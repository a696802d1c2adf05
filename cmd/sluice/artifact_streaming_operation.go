package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"sluice/internal/acr"
	"sluice/oci"
)

// operationVerbs are the verbs of one kind of operations on images.
type operationVerbs struct {
	group, noun string // "artifact-streaming", "conversion"
	name        string // of the operations, in the API
	latest      func(c *acr.Client, ctx context.Context, repo string, digest oci.Digest) (acr.Operation, error)
}

func newArtifactStreamingOperationCommand() *cobra.Command {
	return operationVerbs{"artifact-streaming", "conversion", acr.ConversionName, (*acr.Client).LatestStreaming}.command()
}

func (v operationVerbs) command() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "operation",
		Short: "Show, list or cancel " + v.noun + "s that a registry does",
		Long: fmt.Sprintf(`Show or cancel a %[1]s that a registry does: the one with an ID in a
repository, or the last one of an image. List those of a repository.`, v.noun),
		RunE: group,
	}
	cmd.AddCommand(
		v.newCommand("show", "Show how far a "+v.noun+" is", (*acr.Client).ImageOperation),
		v.newCommand("cancel", "Cancel a "+v.noun, (*acr.Client).CancelImageOperation),
		v.newListCommand(),
	)
	return cmd
}

func (v operationVerbs) newCommand(verb, short string, do func(c *acr.Client, ctx context.Context, repo, id string) (acr.Operation, error)) *cobra.Command {
	var f streamingFlags
	var id string
	cmd := &cobra.Command{
		Use:   verb + " (--repository REPOSITORY --id ID | --image IMAGE)",
		Short: short,
		Example: "  sluice " + v.group + " operation " + verb + ` -r 127.0.0.1:5000 --image debian:12
  sluice ` + v.group + " operation " + verb + " --repository registry.example.com/team/app --id 43d5…",
		Args: arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			p, repo, id, err := v.operation(cmd, &f, id)
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

func (v operationVerbs) newListCommand() *cobra.Command {
	var f streamingFlags
	cmd := &cobra.Command{
		Use:     "list REPOSITORY",
		Short:   "List the last " + v.noun + "s of a repository's images",
		Example: "  sluice " + v.group + " operation list registry.example.com/team/app",
		Args:    arguments(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, repo, err := f.repository(cmd, args)
			if err != nil {
				return err
			}
			list, err := p.manage.ImageOperations(cmd.Context(), repo, v.name)
			if err != nil {
				return withCode(err)
			}
			return f.print(cmd.OutOrStdout(), list, func(w io.Writer) { printOperations(w, list) })
		},
	}
	f.addRepository(cmd)
	return noFiles(cmd)
}

// operation returns which operation the flags mean.
func (v operationVerbs) operation(cmd *cobra.Command, f *streamingFlags, id string) (p *place, repo, operation string, err error) {
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
	op, err := v.latest(p.manage, cmd.Context(), ref.Repository, subject)
	if errors.Is(err, acr.ErrOperationUnknown) {
		err = fmt.Errorf("there was no %s of %s lately: %w", v.noun, ref, err)
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

func printOperations(w io.Writer, list []acr.Operation) {
	fmt.Fprintln(w, "ID\tSTATUS\tPROGRESS\tSTARTED\tERROR\tIMAGE")
	for _, op := range list {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", op.ID, op.Status, op.Progress, when(op.StartTime), dash(op.ErrorCode), op.Resource)
	}
}
