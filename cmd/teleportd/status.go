package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"sluice/internal/human"
	"sluice/internal/node/disks"
	"sluice/internal/node/disks/control"
	"sluice/internal/node/serve"
	"sluice/oci"
)

func newStatusCommand() *cobra.Command {
	var run, output string
	cmd := &cobra.Command{
		Use:               "status",
		Short:             "Show which images are teleported, which aren't and why",
		Args:              arguments(0),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "table" && output != "json" {
				return fmt.Errorf("--output %q: use table or json", output)
			}
			s, err := control.NewClient(serve.Control(run)).Status(cmd.Context())
			switch {
			case errors.Is(err, os.ErrPermission):
				return errors.New("teleportd answers root only: run it with sudo")
			case err != nil:
				return fmt.Errorf("%w: is it running?", err)
			case output == "json":
				e := json.NewEncoder(cmd.OutOrStdout())
				e.SetIndent("", "  ")
				return e.Encode(s)
			}
			var n node
			if err := json.Unmarshal(s.Node, &n); err != nil {
				return fmt.Errorf("teleportd's answer: %w", err)
			}
			return printStatus(cmd.OutOrStdout(), s, n)
		},
	}
	cmd.Flags().StringVar(&run, "run", defaultRun, "`DIR` of the daemon's sockets\n")
	cmd.Flags().StringVarP(&output, "output", "o", "table", "print a `FORMAT`: table or json")
	complete(cmd, "output", []string{"table", "json"})
	return cmd
}

// printStatus prints the status for people.
func printStatus(out io.Writer, s control.Status, n node) error {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 4, 2, ' ', 0)
	fmt.Fprintf(w, "daemon\tpid %d, state in %s\n", s.Daemon.PID, s.Daemon.Root)
	fmt.Fprintf(w, "kernel\t%s\n", kernelText(s.Daemon, n))
	for _, reason := range s.Daemon.Unusable {
		fmt.Fprintf(w, "\t%s\n", reason)
	}
	fmt.Fprintf(w, "cache\t%s of disks%s\n", human.Bytes(n.Cache.Bytes), ofQuota(n.Cache.Quota))
	fmt.Fprintf(w, "traffic\t%s in %d requests, %d failed; %d reads waited, %d blocks came damaged\n",
		human.Bytes(n.Traffic.Bytes), n.Traffic.Requests, n.Traffic.Failures, n.Cache.Faults, n.Cache.Corrupt)
	printImages(w, n)
	if len(n.Shares) > 0 {
		fmt.Fprintln(w, "\nSHARE\tOF\tCREDENTIAL UNTIL\tSTATE")
	}
	for _, share := range n.Shares {
		until, state := "-", "works"
		if !share.Expires.IsZero() {
			until = share.Expires.Local().Format(time.DateTime)
		}
		if share.Problem != "" {
			state = "fails"
		}
		fmt.Fprintf(w, "%s\t%s/%s\t%s\t%s\n", cmp.Or(share.Share, "-"), share.Registry, share.Repository, until, state)
	}
	if len(s.Claims) > 0 {
		fmt.Fprintln(w, "\nMOUNTED FOR\tIMAGE\tTELEPORTED")
	}
	for _, c := range s.Claims {
		fmt.Fprintf(w, "process %d\t%s\t%s\n", c.PID, c.Reference, yes(c.Teleported))
	}
	if len(n.Pulls) > 0 {
		fmt.Fprintln(w, "\nPULLED\tIMAGE\tTOOK\tTELEPORTED")
	}
	for _, p := range n.Pulls[max(0, len(n.Pulls)-shownPulls):] {
		teleported := "yes"
		if p.Reason != "" {
			teleported = "no: " + string(p.Reason)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", p.Time.Local().Format(time.TimeOnly), p.Reference, p.Duration.Round(time.Millisecond), teleported)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	describeProblems(&b, n)
	_, err := io.WriteString(out, b.String())
	return err
}

// shownPulls is how many of the last pulls the table has.
const shownPulls = 20

// printImages prints a line for each image, and one for each of its layers.
func printImages(w io.Writer, n node) {
	byDigest := make(map[oci.Digest]disks.DiskStatus)
	for _, d := range n.Disks {
		byDigest[d.Digest] = d
	}
	if len(n.Images) > 0 {
		fmt.Fprintln(w, "\nIMAGE\tLAYER\tSIZE\tHERE\tUSERS\tMOUNTED AT")
	}
	for _, i := range n.Images {
		name := i.Reference
		for _, l := range i.Layers {
			d := byDigest[l.Disk]
			here := "-"
			if d.Size > 0 {
				here = fmt.Sprintf("%d%%", 100*d.Cached/d.Size)
			}
			fmt.Fprintf(w, "%s\t%.19s\t%s\t%s\t%d\t%s\n", name, l.Digest, human.Bytes(d.Size), here, len(d.Owners), cmp.Or(d.Path, "-"))
			name = ""
		}
	}
}

// describeProblems tells what is wrong and what to do about it.
func describeProblems(b *strings.Builder, n node) {
	for _, d := range n.Disks {
		if d.Problem != "" {
			fmt.Fprintf(b, "\nThe disk %.19s couldn't be mounted:\n  %s\n", d.Digest, indent(d.Problem))
		}
	}
	for _, s := range n.Shares {
		if s.Problem != "" {
			fmt.Fprintf(b, "\nThe share of %s/%s fails:\n  %s\n  What to do: see that this machine reaches the file server, port 445 in general. Reads\n  that fail until then work when it does.\n", s.Registry, s.Repository, indent(s.Problem))
		}
	}
	for _, i := range n.NotTeleported {
		fmt.Fprintf(b, "\n%s isn't teleported: %s\n  %s\n  What to do: %s\n", i.Reference, i.Meaning, indent(i.Message), i.Remedy)
	}
	for _, c := range n.Credentials {
		if len(c.Passed) == 0 && c.Error == "" {
			continue
		}
		fmt.Fprintf(b, "\n%s/%s, credentials that aren't used:\n", c.Host, c.Repository)
		for _, p := range c.Passed {
			fmt.Fprintf(b, "  %s: %s\n", p.Source, p.Reason)
		}
		if c.Error != "" {
			fmt.Fprintf(b, "  %s\n", c.Error)
		}
	}
	for _, p := range n.Registries {
		what := "its file is wrong and doesn't count"
		if p.Host != "" {
			what = p.Host + " fails"
		}
		fmt.Fprintf(b, "\nregistry %s: %s:\n  %s\n", p.Registry, what, indent(p.Error))
	}
}

// kernelText says how disks get to the kernel.
func kernelText(d control.Info, n node) string {
	if len(d.Unusable) > 0 {
		return "Linux " + n.Kernel + ", which can't mount disks: images are pulled the ordinary way"
	}
	by := "this program speaks with file servers itself"
	if n.Source == sourceKernel {
		by = "shares are mounted by CIFS"
	}
	return "Linux " + n.Kernel + "; " + by
}

// indent indents the second and later lines of a message.
func indent(s string) string { return strings.ReplaceAll(strings.TrimSpace(s), "\n", "\n  ") }

func ofQuota(q int64) string {
	if q == 0 {
		return ""
	}
	return ", at most " + human.Bytes(q)
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
