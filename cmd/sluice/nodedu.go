package main

import (
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

func newNodeDiskUsageCommand() *cobra.Command {
	var f daemonFlags
	var output string
	cmd := &cobra.Command{
		Use:   "du",
		Short: "Show what images have on this machine's disk",
		Long: `Show what images have on this machine's disk.

OWN is what removing the image would free; SHARED belongs to layers that other
images have, too. SIZE is what the whole image takes when all of it is here.`,
		Args: arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			du, err := askDaemon(cmd.Context(), f, (*control.Client).DiskUsage)
			if err != nil {
				return err
			}
			if output == "json" {
				return printJSON(cmd.OutOrStdout(), du)
			}
			return printDiskUsage(cmd.OutOrStdout(), du, time.Now())
		},
	}
	f.registerAsk(cmd)
	registerOutput(cmd, &output)
	return cmd
}

// printDiskUsage prints the usage for people.
func printDiskUsage(out io.Writer, du mount.DiskUsage, now time.Time) error {
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	if len(du.Images) > 0 {
		fmt.Fprintln(w, "IMAGE\tSIZE\tHERE\tSHARED\tOWN\tUSED\tSTATE")
	}
	for _, i := range du.Images {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n",
			i.Reference, human.Bytes(i.Size), human.Bytes(i.Here), human.Bytes(i.Shared), human.Bytes(i.Own), lastUsed(i, now), diskState(i))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if len(du.Images) > 0 {
		fmt.Fprintln(w)
	}
	fmt.Fprintf(w, "content\t%s in %s", human.Bytes(du.Cache), plural(du.Layers, "layer"))
	if du.Unneeded > 0 {
		fmt.Fprintf(w, "; no image has %s of it, which sluice node prune would free", human.Bytes(du.Unneeded))
	}
	if du.High > 0 {
		fmt.Fprintf(w, "\nbounds\tlayers are evicted above %s, down to %s", human.Bytes(du.High), human.Bytes(du.Low))
	}
	fmt.Fprintf(w, "\ndisk\t%s free of %s\n", human.Bytes(du.DiskFree), human.Bytes(du.DiskSize))
	return w.Flush()
}

func lastUsed(i mount.ImageUsage, now time.Time) string {
	d := now.Sub(i.Used)
	switch {
	case i.InUse:
		return "now"
	case d < time.Minute:
		return "just now"
	case d < time.Hour:
		return fmt.Sprintf("%d min ago", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h ago", int(d.Hours()))
	}
	return fmt.Sprintf("%d days ago", int(d.Hours()/24))
}

func diskState(i mount.ImageUsage) string {
	state := []string{"partial"}
	if i.Complete {
		state[0] = "complete"
	}
	if i.InUse {
		state = append(state, "in use")
	}
	if i.Pinned {
		state = append(state, "pinned")
	}
	return strings.Join(state, ", ")
}
