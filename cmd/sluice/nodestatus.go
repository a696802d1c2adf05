package main

import (
	"cmp"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"sluice/internal/human"
	"sluice/internal/node/mount"
	"sluice/internal/node/mount/control"
)

func newNodeStatusCommand() *cobra.Command {
	var f daemonFlags
	var output string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show which images stream, which don't and why",
		Args:  arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			s, err := askDaemon(cmd.Context(), f, (*control.Client).Status)
			if err != nil {
				return err
			}
			if output == "json" {
				return printJSON(cmd.OutOrStdout(), s)
			}
			if err := printStatus(cmd.OutOrStdout(), s); err != nil {
				return err
			}
			if err := printCredentials(cmd.OutOrStdout(), s.Credentials); err != nil {
				return err
			}
			return printRegistries(cmd.OutOrStdout(), s.Registries)
		},
	}
	f.registerAsk(cmd)
	registerOutput(cmd, &output)
	return cmd
}

// printStatus prints the status for people.
func printStatus(out io.Writer, s control.Status) error {
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintf(w, "daemon\tpid %d, state in %s\n", s.Daemon.PID, s.Daemon.Root)
	if s.Daemon.Reason != "" {
		fmt.Fprintf(w, "\t%s\n", s.Daemon.Reason)
	}
	fmt.Fprintf(w, "plane\t%s\n", planeText(s.Daemon.Plane))
	for _, reason := range s.Daemon.Plane.Reasons {
		fmt.Fprintf(w, "\t%s\n", reason)
	}
	if s.Switch.Off {
		fmt.Fprintf(w, "switch\tnew images don't stream: %s\n", cmp.Or(s.Switch.Why, "streaming was switched off"))
	}
	fmt.Fprintf(w, "cache\t%s in %s%s\n", human.Bytes(s.Cache.Bytes), plural(s.Cache.Layers, "layer"), ofQuota(s.Cache.Quota))
	fmt.Fprintf(w, "traffic\t%s in %d requests, %d failed; %d reads waited, %d chunks came damaged\n\n",
		human.Bytes(s.Traffic.Bytes), s.Traffic.Requests, s.Traffic.Failures, s.Cache.Faults, s.Cache.Corrupt)
	if len(s.Images) > 0 {
		fmt.Fprintln(w, "IMAGE\tLAYERS\tSIZE\tHERE\tMOUNTS\tPLANE\tSTATE")
	}
	for _, i := range s.Images {
		plane := i.Plane
		if plane == "" {
			plane = "-"
		}
		fmt.Fprintf(w, "%s\t%d\t%s\t%.0f%%\t%d\t%s\t%s\n", i.Reference, i.Layers, human.Bytes(i.Size), i.Percent, len(i.Mounts), plane, i.State)
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
	for _, p := range s.Pulls[max(0, len(s.Pulls)-shownPulls):] {
		streams := "yes"
		if p.Reason != "" {
			streams = "no: " + string(p.Reason)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", p.Time.Local().Format(time.TimeOnly), p.Reference, p.Duration.Round(time.Millisecond), streams)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	return printProblems(out, s.Status)
}

// printProblems tells what is wrong and what to do about it: of images on the
// node, and of those whose last pull went the ordinary way.
func printProblems(out io.Writer, s mount.Status) error {
	var b strings.Builder
	for _, i := range s.Images {
		if i.Problem == "" && i.Remedy == "" {
			continue
		}
		fmt.Fprintf(&b, "\n%s is %s, with a problem:\n", i.Reference, i.State)
		for _, text := range []string{i.Problem, i.Remedy} {
			if text != "" {
				fmt.Fprintf(&b, "  %s\n", indent(text))
			}
		}
	}
	for _, n := range s.NotStreaming {
		fmt.Fprintf(&b, "\n%s doesn't stream: %s\n  %s\n  What to do: %s\n", n.Reference, n.Meaning, indent(n.Message), n.Remedy)
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// indent indents the second and later lines of a message.
func indent(s string) string { return strings.ReplaceAll(strings.TrimSpace(s), "\n", "\n  ") }

// shownPulls is how many of the last pulls the table has.
const shownPulls = 20

func ofQuota(q int64) string {
	if q == 0 {
		return ""
	}
	return " of at most " + human.Bytes(q)
}
