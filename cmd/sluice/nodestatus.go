package main

import (
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"sluice/internal/node/mount/control"
)

func newNodeStatusCommand() *cobra.Command {
	var f daemonFlags
	var output string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show which images stream, which don't and why",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "table" && output != "json" {
				return fmt.Errorf("--output %q: use table or json", output)
			}
			dir, err := filepath.Abs(f.root)
			if err != nil {
				return err
			}
			s, err := control.NewClient(controlSocket(f.sockets(dir))).Status(cmd.Context())
			if err != nil {
				return fmt.Errorf("%w: is `sluice node` running?", err)
			}
			if output == "json" {
				e := json.NewEncoder(cmd.OutOrStdout())
				e.SetIndent("", "  ")
				return e.Encode(s)
			}
			return printStatus(cmd.OutOrStdout(), s)
		},
	}
	cmd.Flags().StringVar(&f.root, "root", nodeRoot, "ask the daemon with its state in this directory")
	cmd.Flags().StringVar(&f.run, "run", "", "directory of the daemon's sockets (default: where the daemon says)")
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	return cmd
}

// printStatus prints the status for people.
func printStatus(out io.Writer, s control.Status) error {
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintf(w, "daemon\tpid %d, state in %s\n", s.Daemon.PID, s.Daemon.Root)
	if s.Daemon.Reason != "" {
		fmt.Fprintf(w, "\t%s\n", s.Daemon.Reason)
	}
	fmt.Fprintf(w, "cache\t%s in %d layers%s\n", size(s.Cache.Bytes), s.Cache.Layers, ofQuota(s.Cache.Quota))
	fmt.Fprintf(w, "traffic\t%s in %d requests, %d failed; %d reads waited, %d chunks came damaged\n\n",
		size(s.Traffic.Bytes), s.Traffic.Requests, s.Traffic.Failures, s.Cache.Faults, s.Cache.Corrupt)
	if len(s.Images) > 0 {
		fmt.Fprintln(w, "IMAGE\tLAYERS\tSIZE\tHERE\tMOUNTS\tSTATE")
	}
	for _, i := range s.Images {
		state := "streaming"
		if i.Complete {
			state = "complete"
		}
		if i.Problem != "" {
			state = i.Problem
		}
		here := 100.0
		if i.Size > 0 {
			here = 100 * float64(i.Cached) / float64(i.Size)
		}
		fmt.Fprintf(w, "%s\t%d\t%s\t%.0f%%\t%d\t%s\n", i.Reference, i.Layers, size(i.Size), here, len(i.Mounts), state)
	}
	if len(s.Claims) > 0 {
		fmt.Fprintln(w, "\nMOUNTED\tIMAGE")
	}
	for _, c := range s.Claims {
		where := c.Dir
		if where == "" {
			where = fmt.Sprintf("process %d", c.PID)
		}
		fmt.Fprintf(w, "%s\t%s\n", where, c.Reference)
	}
	if len(s.Pulls) > 0 {
		fmt.Fprintln(w, "\nPULLED\tIMAGE\tTOOK\tSTREAMS")
	}
	for _, p := range s.Pulls {
		streams := "yes"
		if p.Reason != "" {
			streams = fmt.Sprintf("no: %s (%s)", p.Reason, p.Message)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", p.Time.Format(time.TimeOnly), p.Reference, p.Duration.Round(time.Millisecond), streams)
	}
	return w.Flush()
}

func ofQuota(q int64) string {
	if q == 0 {
		return ""
	}
	return " of at most " + size(q)
}

// size prints bytes in the unit that fits.
func size(n int64) string {
	const units = "kMGTPE"
	if n < 1000 {
		return fmt.Sprintf("%d B", n)
	}
	f, u := float64(n), -1
	for f >= 999.95 && u < len(units)-1 {
		f /= 1000
		u++
	}
	return fmt.Sprintf("%.1f %cB", f, units[u])
}
