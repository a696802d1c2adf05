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
	"runtime/debug"
	"strings"
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
		var coded *codedError
		if errors.As(err, &coded) {
			os.Exit(coded.code)
		}
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
		Version:       version(),
	}
	root.SetVersionTemplate("sluice {{.Version}}\n")
	root.AddCommand(
		newArtifactStreamingCommand(),
		newRegistryCommand(),
		newNodeCommand(),
		newMountCommand(),
		newUmountCommand(),
		newRunCommand(),
		newImportCommand(),
		newRepositoryCommand(),
		newManifestCommand(),
		newTagCommand(),
		newTokenCommand(),
		newScopeMapCommand(),
		newTeleportCommand(),
		newAdminCommand(),
	)
	return root
}

// version returns what the Go toolchain recorded about this build.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return info.Main.Version + " " + info.GoVersion
}

// arguments returns the check that a verb has at least low and at most high
// arguments, with an error that says how the verb is written.
func arguments(low, high int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) >= low && len(args) <= high {
			return nil
		}
		wrong := "arguments are missing"
		if len(args) > high {
			wrong = "too many arguments: " + strings.Join(args, " ")
		}
		return fmt.Errorf("%s\nusage: %s\nmore:  %s --help", wrong, cmd.UseLine(), cmd.CommandPath())
	}
}

// group is what a verb does that only has others beneath it.
func group(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("unknown command %q, see %s --help", args[0], cmd.CommandPath())
	}
	return cmd.Help()
}
