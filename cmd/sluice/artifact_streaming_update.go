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

func newArtifactStreamingShowCommand() *cobra.Command {
	var f streamingFlags
	cmd := &cobra.Command{
		Use:     "show REPOSITORY",
		Short:   "Show whether a registry converts what is pushed to a repository",
		Example: `  sluice artifact-streaming show -r 127.0.0.1:5000 --repository debian`,
		Args:    arguments(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, repo, err := f.repository(cmd, args)
			if err != nil {
				return err
			}
			s, err := p.manage.Streaming(cmd.Context(), repo)
			if err != nil {
				return err
			}
			return f.print(cmd.OutOrStdout(), s, func(w io.Writer) { printStreaming(w, repo, s) })
		},
	}
	f.addRepository(cmd)
	return noFiles(cmd)
}

func printStreaming(w io.Writer, repo string, s acr.Streaming) {
	fmt.Fprintf(w, "repository\t%s\nconverts what is pushed\t%s\n", repo, yesNo(s.ConvertPushedImages))
}

func newArtifactStreamingUpdateCommand() *cobra.Command {
	var f streamingFlags
	var enable *bool
	var backfill bool
	cmd := &cobra.Command{
		Use:   "update REPOSITORY",
		Short: "Have a registry convert what is pushed to a repository, or not",
		Long: `Have a registry convert what is pushed to a repository or imported into it, or
not. Images that are there already are converted with --backfill only; artifacts
that exist stay.`,
		Example: `  sluice artifact-streaming update registry.example.com/team/app --enable-streaming true --backfill
  sluice artifact-streaming update -r 127.0.0.1:5000 --repository debian --enable-streaming false`,
		Args: arguments(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if enable == nil {
				return errors.New("nothing to change: give --enable-streaming true or false")
			}
			if backfill && !*enable {
				return errors.New("--backfill needs --enable-streaming true")
			}
			p, repo, err := f.repository(cmd, args)
			if err != nil {
				return err
			}
			if err := setStreaming(cmd.Context(), p.manage, repo, *enable, backfill); err != nil {
				return withCode(err)
			}
			s := acr.Streaming{ConvertPushedImages: *enable}
			return f.print(cmd.OutOrStdout(), s, func(w io.Writer) {
				printStreaming(w, repo, s)
				if backfill {
					fmt.Fprintln(w, "images that are there\tbeing converted")
				}
			})
		},
	}
	f.addRepository(cmd)
	cmd.Flags().Var(&optionalBool{&enable}, "enable-streaming", "whether pushed images are converted, `true|false`")
	complete(cmd, "enable-streaming", "true", "false")
	cmd.Flags().BoolVar(&backfill, "backfill", false, "also convert the images that are there")
	return noFiles(cmd)
}

func setStreaming(ctx context.Context, c *acr.Client, repo string, enable, backfill bool) error {
	var err error
	if backfill {
		_, err = c.BackfillStreaming(ctx, repo)
	} else {
		_, err = c.SetStreaming(ctx, repo, enable)
	}
	if errors.Is(err, oci.ErrUnsupported) {
		return fmt.Errorf("%w. `sluice artifact-streaming watch` converts what is pushed to a registry that can't", err)
	}
	return err
}
