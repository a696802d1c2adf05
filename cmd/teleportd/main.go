// Command teleportd is the node's half of Teleport: containerd's snapshotter that
// mounts the layers of images from a file server's disks instead of pulling them.
// Here are its flags and its wiring; package internal/node/disks is what it does.
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

// newCommand returns the root command, which is the daemon, with the verbs beneath
// it.
func newCommand() *cobra.Command {
	var c config
	cmd := &cobra.Command{
		Use:   "teleportd",
		Short: "Mount images' layers from a file server: containerd's snapshotter",
		Long: `Mount images' layers from a file server: containerd's snapshotter.

In containerd's config.toml:

  [proxy_plugins.teleportd]
    type = "snapshot"
    address = "` + defaultRun + `/snapshotter.sock"
    [proxy_plugins.teleportd.exports]
      root = "` + defaultRoot + `"
      enable_remote_snapshot_annotations = "true"
  [[plugins."io.containerd.transfer.v1.local".unpack_config]]
    platform = "linux"
    snapshotter = "teleportd"

Images of repositories that don't take part in Teleport are pulled the ordinary
way. The daemon may be stopped, killed and updated while containers run: their
reads wait for the next one.`,
		Args:          arguments(0),
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       program.Version(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := c.check(); err != nil {
				return err
			}
			return runDaemon(cmd.Context(), c)
		},
	}
	cmd.SetVersionTemplate("teleportd {{.Version}}\n")
	c.register(cmd)
	cmd.AddCommand(newStatusCommand(), newHolderCommand())
	return cmd
}

// arguments returns the check that a verb has n arguments, with an error that says
// how it's written.
func arguments(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == n {
			return nil
		}
		wrong := "arguments are missing"
		if len(args) > n {
			wrong = "too many arguments: " + strings.Join(args[n:], " ")
		}
		return fmt.Errorf("%s\nusage: %s\nmore:  %s --help", wrong, cmd.UseLine(), cmd.CommandPath())
	}
}
