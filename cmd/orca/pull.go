package main

import (
	"github.com/spf13/cobra"

	"sluice/internal/node/disks/control"
)

func newPullCommand() *cobra.Command {
	var f daemonFlags
	var debug, ordinary bool
	var output string
	cmd := &cobra.Command{
		Use:   "pull [OPTION]... IMAGE",
		Short: "Make an image ready to run",
		Long: `Make an image ready to run.

Of an image that is teleported only what mounting it takes comes now, and its
content when it is read. Any other is pulled as a whole. It stays until orca rm.

What orca does is told on standard error.`,
		Example: `  orca pull registry.example.com/team/app:v1
  orca pull -o json registry.example.com/team/app:v1`,
		DisableFlagsInUseLine: true,

		Args:              arguments(1, 1),
		ValidArgsFunction: completeImages(&f, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(output, "none"); err != nil {
				return err
			}
			s := newStages(args[0], cmd.ErrOrStderr(), debug)
			d, err := f.connect(cmd.Context())
			if err != nil {
				return err
			}
			m, err := s.mount(cmd.Context(), d, control.Mount{Reference: args[0], PullOnly: true, Ordinary: ordinary})
			if err != nil {
				return err
			}
			s.end()
			if output == "json" {
				return printJSON(cmd.OutOrStdout(), m)
			}
			return nil
		},
	}
	cmd.Flags().SortFlags = false
	registerOutput(cmd, &output, "none")
	cmd.Flags().BoolVar(&debug, "debug", false, "tell how long everything takes")
	cmd.Flags().BoolVar(&ordinary, "ordinary", false, "pull the image the ordinary way in any case")
	f.register(cmd)
	return cmd
}
