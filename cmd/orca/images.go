package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"sluice/internal/human"
	"sluice/internal/node/disks/control"
)

func newImagesCommand() *cobra.Command {
	var f daemonFlags
	var output string
	cmd := &cobra.Command{
		Use:   "images",
		Short: "List the images on this machine",
		Long: `List the images that orca pulled or ran and that are still on this machine.

SIZE is what they take here: of teleported images what has been read, of others
all of it. Images may share some of that.`,
		Args:              arguments(0, 0),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(output, "table"); err != nil {
				return err
			}
			d, err := f.connect(cmd.Context())
			if err != nil {
				return err
			}
			list, err := d.Images(cmd.Context())
			if err != nil {
				return err
			}
			if output == "json" {
				return printJSON(cmd.OutOrStdout(), list)
			}
			return printImages(cmd.OutOrStdout(), list)
		},
	}
	registerOutput(cmd, &output, "table")
	f.register(cmd)
	return cmd
}

// digits is how many of a digest are shown.
const digits = 12

func printImages(out io.Writer, list []control.Kept) error {
	if len(list) == 0 {
		_, err := fmt.Fprintln(out, "There are no images. Pull one: orca pull IMAGE")
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "IMAGE\tDIGEST\tPLATFORM\tLAYERS\tSIZE\tHOW\tWHEN")
	for _, k := range list {
		how := "pulled"
		if k.Teleported {
			how = "teleported"
		}
		digest := k.Manifest.Encoded()
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%s\t%s\n", k.Reference, digest[:min(len(digest), digits)], k.Platform, k.Layers, human.Bytes(k.Size), how, k.Pulled.Local().Format(time.DateTime))
	}
	return w.Flush()
}

func newRemoveCommand() *cobra.Command {
	var f daemonFlags
	cmd := &cobra.Command{
		Use:     "rm IMAGE...",
		Aliases: []string{"rmi"},
		Short:   "Remove images from this machine",
		Long: `Remove images from this machine, which are named as orca images lists them: by
reference, or by digest. What other images need as well stays. Images that run
can't be removed.`,
		Example: `  orca rm registry.example.com/team/app:v1
  orca rm 5002f8ef3bd1`,
		Args:              arguments(1, math.MaxInt),
		ValidArgsFunction: completeImages(&f, math.MaxInt),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := f.connect(cmd.Context())
			if err != nil {
				return err
			}
			var errs []error
			for _, name := range args {
				err := d.Remove(cmd.Context(), name)
				if errors.Is(err, control.ErrUnknown) {
					err = fmt.Errorf("there's no image %s: orca images lists them", name)
				}
				if err == nil {
					fmt.Fprintln(cmd.OutOrStdout(), "removed", name)
				}
				errs = append(errs, err)
			}
			return errors.Join(errs...)
		},
	}
	f.register(cmd)
	return cmd
}

// completeImages has the shell complete up to n images that are here, without
// starting a daemon for that.
func completeImages(f *daemonFlags, n int) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) >= n {
			return nil, cobra.ShellCompDirectiveDefault // a command's arguments may be files
		}
		var names []string
		ctx, cancel := context.WithTimeout(cmd.Context(), time.Second)
		defer cancel()
		for _, socket := range []string{f.socket, machineSocket, standaloneRun + "/control.sock"} {
			if _, err := os.Stat(socket); err != nil || len(names) > 0 {
				continue
			}
			list, _ := control.NewClient(socket).Images(ctx) // there's nothing to tell a shell
			for _, k := range list {
				if !slices.Contains(args, k.Reference) {
					names = append(names, k.Reference)
				}
			}
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}

// registerOutput registers --output, whose default is for people.
func registerOutput(cmd *cobra.Command, output *string, people string) {
	cmd.Flags().StringVarP(output, "output", "o", people, "print a `FORMAT`: "+people+" or json")
	err := cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{people, "json"}, cobra.ShellCompDirectiveNoFileComp))
	if err != nil {
		panic(err) // there is no such flag: a mistake of the program
	}
}

func checkOutput(output, people string) error {
	if output != people && output != "json" {
		return fmt.Errorf("--output %q: use %s or json", output, people)
	}
	return nil
}

func printJSON(out io.Writer, v any) error {
	e := json.NewEncoder(out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
