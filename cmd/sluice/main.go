// Command sluice is the whole system in one binary: the registry that turns
// images into streaming artifacts, the node daemon that starts containers from
// them, and the verbs that people type. Each file holds one verb: its flags,
// and the wiring of the packages that do the work.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := newCommand().ExecuteContext(ctx)
	stop()
	var exit exitError
	if errors.As(err, &exit) {
		os.Exit(int(exit)) // what the process had to say, it has said
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "sluice:", err)
		os.Exit(1)
	}
}

// newCommand returns the root command with every verb.
func newCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "sluice",
		Short:         "Start containers without pulling their images first",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(
		newArtifactStreamingCommand(),
		newRegistryCommand(),
		newNodeCommand(),
		newMountCommand(),
		newUmountCommand(),
		newRunCommand(),
	)
	return root
}
