// Command sluice is the whole system in one binary: the registry that turns
// images into streaming artifacts, the node daemon that starts containers from
// them, and the verbs that people type. Each file holds one verb: its flags,
// and the wiring of the packages that do the work.
package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"sluice/cmd/internal/program"
)

func main() {
	program.Main(newCommand())
}

// newCommand returns the root command with every verb.
func newCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "sluice",
		Short:         "Start containers without pulling their images first",
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       program.Version(),
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
