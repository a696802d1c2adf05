// Command orca runs images without containerd: teleported where the registry offers
// that, pulled the ordinary way otherwise. It is a client of teleportd, whose socket
// package internal/node/disks/control describes, and of runc. Each file holds one
// verb, or what several have in common.
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
		Use:   "orca",
		Short: "Run images without waiting for their pull",
		Long: `Run images without waiting for their pull.

Where the registry has expanded an image into disks, its layers are mounted from
there ("teleported"), and read when they are needed. Any other image, of any
registry, is pulled first.

Needs root, runc, and teleportd: the one that runs on this machine, or else one
that is started for the time being. Credentials are those that teleportd has;
docker login, as root, gives them to it.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       program.Version(),
	}
	root.SetVersionTemplate("orca {{.Version}}\n")
	root.AddCommand(newRunCommand(), newPullCommand(), newImagesCommand(), newRemoveCommand())
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
			wrong = "too many arguments: " + strings.Join(args[high:], " ")
		}
		return fmt.Errorf("%s\nusage: %s\nmore:  %s --help", wrong, cmd.UseLine(), cmd.CommandPath())
	}
}
