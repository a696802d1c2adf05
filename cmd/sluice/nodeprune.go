package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"sluice/internal/human"
	"sluice/internal/node/cache"
	"sluice/internal/node/mount"
	"sluice/internal/node/mount/control"
)

func newNodePruneCommand() *cobra.Command {
	var f daemonFlags
	var opts mount.PruneOptions
	var keep cache.Space
	var output string
	cmd := &cobra.Command{
		Use:   "prune",
		Short: "Free content that nobody uses",
		Long: `Free content that nobody uses.

By itself it removes layers that no image of this machine has any more; with
--all also those of images that aren't mounted now. Such images stay usable:
their content comes again when it is read. What is mounted or pinned stays.`,
		Example: `  sluice node prune --all --older-than 168h
  sluice node prune --all --keep 20GiB --dry-run`,
		Args: arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			if opts.Keep = keep.Bytes; keep.Percent != 0 {
				return errors.New("--keep takes bytes, such as 20GiB")
			}
			if opts.OlderThan < 0 {
				return errors.New("--older-than must not be negative")
			}
			p, err := askDaemon(cmd.Context(), f, func(c *control.Client, ctx context.Context) (mount.Pruned, error) { return c.Prune(ctx, opts) })
			if err != nil {
				return err
			}
			if output == "json" {
				return printJSON(cmd.OutOrStdout(), p)
			}
			return printPruned(cmd.OutOrStdout(), p)
		},
	}
	cmd.Flags().BoolVar(&opts.All, "all", false, "also content of images that aren't mounted")
	cmd.Flags().DurationVar(&opts.OlderThan, "older-than", 0, "only what wasn't used for this `TIME`, as 168h")
	cmd.Flags().TextVar(&keep, "keep", cache.Space{}, "leave `BYTES`, as 20GiB, of what was used last")
	cmd.Flags().BoolVar(&opts.DryRun, "dry-run", false, "only say what would be removed")
	f.registerAsk(cmd)
	registerOutput(cmd, &output)
	return cmd
}

// printPruned prints, for people, what was removed and kept, by image.
func printPruned(out io.Writer, p mount.Pruned) error {
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	freed, did := "FREED", "freed"
	if p.DryRun {
		freed, did = "WOULD FREE", "would free"
	}
	printLayers(w, freed, p.Removed)
	printLayers(w, "KEPT", p.Kept)
	fmt.Fprintf(w, "%s %s in %s; %s in %s stay\n", did, human.Bytes(p.Freed), plural(len(p.Removed), "layer"), human.Bytes(p.Left), plural(len(p.Kept), "layer"))
	return w.Flush()
}

// printLayers prints layers as a table: those of the same images, and kept for
// the same reason, in one line.
func printLayers(w io.Writer, title string, layers []mount.PrunedLayer) {
	type group struct{ images, why string }
	count, bytes := make(map[group]int), make(map[group]int64)
	var groups []group
	for _, l := range layers {
		g := group{strings.Join(l.Images, ", "), l.Why}
		if len(l.Images) > 2 {
			g.images = fmt.Sprintf("%s, %s and %d more", l.Images[0], l.Images[1], len(l.Images)-2)
		}
		if g.images == "" {
			g.images = "(no image)"
		}
		if count[g] == 0 {
			groups = append(groups, g)
		}
		count[g]++
		bytes[g] += l.Bytes
	}
	if len(groups) == 0 {
		return
	}
	slices.SortFunc(groups, func(a, b group) int { return cmp.Or(cmp.Compare(a.images, b.images), cmp.Compare(a.why, b.why)) })
	fmt.Fprintf(w, "%s\tLAYERS\tOF\tBECAUSE\n", title)
	for _, g := range groups {
		why := g.why
		if why == "" {
			why = "nobody uses it"
		}
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\n", human.Bytes(bytes[g]), count[g], g.images, why)
	}
	fmt.Fprintln(w)
}

// newNodePinCommand is `sluice node pin` and `sluice node unpin`.
func newNodePinCommand(pinned bool) *cobra.Command {
	var f daemonFlags
	cmd := &cobra.Command{
		Use:   "pin IMAGE",
		Short: "Keep an image on this machine, whatever the cache's bounds",
		Long: `Keep an image on this machine, whatever the cache's bounds.

All its content is fetched, and neither evicted nor pruned, also when containerd
has removed the image, until sluice node unpin. IMAGE is a reference that it was
pulled by, and then all images that were, or the digest of its artifact; sluice
node du lists them.`,
		Args: arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, err := askDaemon(cmd.Context(), f, func(c *control.Client, ctx context.Context) (struct{}, error) {
				return struct{}{}, c.Pin(ctx, args[0], pinned)
			})
			return err
		},
	}
	if !pinned {
		cmd.Use, cmd.Short, cmd.Long = "unpin IMAGE", "Let an image be evicted and removed again", ""
	}
	f.registerAsk(cmd)
	return cmd
}
