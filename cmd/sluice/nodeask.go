package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"sluice/internal/node/mount/control"
	"sluice/internal/node/serve"
)

// registerAsk registers the flags of verbs that ask a daemon that runs.
func (f *daemonFlags) registerAsk(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.root, "root", "", "ask the daemon with its state in `DIR` (default: the\nmachine's sluice node, or else that of sluice mount)")
	cmd.Flags().StringVar(&f.run, "run", "", "`DIR` of the daemon's sockets (default: where the\ndaemon of --root says)")
}

// askDaemon asks the machine's node daemon, or without one the standalone one;
// with a root, only the one there.
func askDaemon[T any](ctx context.Context, f daemonFlags, ask func(*control.Client, context.Context) (T, error)) (T, error) {
	roots := []string{f.root}
	if f.root == "" {
		roots = []string{nodeRoot, standaloneRoot}
	}
	var none T
	var first error
	for _, root := range roots {
		dir, err := filepath.Abs(root)
		if err != nil {
			return none, err
		}
		answer, err := ask(control.NewClient(serve.Control(f.sockets(dir))), ctx)
		switch {
		case errors.Is(err, os.ErrPermission):
			return none, errors.New("the node daemon answers root only: run it with sudo")
		case !errors.Is(err, control.ErrNoDaemon):
			return answer, err
		case first == nil:
			first = fmt.Errorf("%w: is sluice node running?", err)
		}
	}
	return none, first
}
