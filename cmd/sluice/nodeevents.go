package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"sluice/internal/human"
	"sluice/internal/node/happening"
	"sluice/internal/node/mount/control"
)

// eventsConfig is the flags of what pods say and are told.
type eventsConfig struct {
	optOut string
}

func (c *eventsConfig) register(f *pflag.FlagSet) {
	f.StringVar(&c.optOut, "opt-out-annotation", "sluice.dev/artifact-streaming", "`KEY` of the annotation by which a pod says, with\n\"false\", to pull its images the ordinary way; needs\n--cri-socket")
}

func newNodeEventsCommand() *cobra.Command {
	var f daemonFlags
	var output string
	var follow bool
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Show what happened to the images of pods, and why they don't stream",
		Long: `Show what happened to the images of pods: which container started on which,
whether it's streamed, and why not. The node daemon has the last ` + fmt.Sprint(happening.Capacity) + ` events
since its start.`,
		Args: arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			return showEvents(cmd.Context(), cmd.OutOrStdout(), f, output, follow)
		},
	}
	f.registerAsk(cmd)
	registerOutput(cmd, &output)
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with those to come; as JSON one a line")
	return cmd
}

// showEvents prints a daemon's events.
func showEvents(ctx context.Context, out io.Writer, f daemonFlags, output string, follow bool) error {
	all := []control.Happening{}
	show := func(h control.Happening) error { all = append(all, h); return nil }
	table := eventTable{out: out}
	switch {
	case follow && output == "json":
		show = func(h control.Happening) error { return json.NewEncoder(out).Encode(h) }
	case follow:
		show = table.print
	}
	_, err := askDaemon(ctx, f, func(c *control.Client, ctx context.Context) (struct{}, error) {
		return struct{}{}, c.Events(ctx, "", follow, show)
	})
	switch {
	case follow && ctx.Err() != nil:
		return nil
	case errors.Is(err, io.ErrUnexpectedEOF):
		return errors.New("the node daemon has ended")
	case err != nil:
		return err
	case output == "json":
		return printJSON(out, all)
	}
	for _, h := range all {
		table.fit(h)
	}
	for _, h := range all {
		if err := table.print(h); err != nil {
			return err
		}
	}
	return nil
}

// eventTable prints events for people, in columns that grow.
type eventTable struct {
	out    io.Writer
	widths []int // but of the last column
	headed bool
}

// eventColumns are the columns' names, and how wide they are at least.
var eventColumns = []string{"TIME    ", "POD             ", "CONTAINER ", "IMAGE                   ", "RESULT"}

// row is an event's cells.
func (t *eventTable) row(h control.Happening) []string {
	cells := []string{h.Time.Local().Format(time.TimeOnly), orDash(h.Pod.Name), orDash(h.Container), h.Image, eventResult(h.Event)}
	if h.Pod.Namespace != "" {
		cells[1] = h.Pod.Namespace + "/" + h.Pod.Name
	}
	if h.Attempt > 0 {
		cells[2] += fmt.Sprintf(" (%d)", h.Attempt)
	}
	return cells
}

// fit makes room for an event.
func (t *eventTable) fit(h control.Happening) {
	if t.widths == nil {
		for _, c := range eventColumns[:len(eventColumns)-1] {
			t.widths = append(t.widths, len(c))
		}
	}
	if h.Lost == 0 {
		for i, c := range t.row(h)[:len(t.widths)] {
			t.widths[i] = max(t.widths[i], utf8.RuneCountInString(c))
		}
	}
}

func (t *eventTable) print(h control.Happening) error {
	t.fit(h)
	if h.Lost > 0 {
		_, err := fmt.Fprintf(t.out, "%d events were lost: they were too many to keep\n", h.Lost)
		return err
	}
	rows := [][]string{t.row(h)}
	if !t.headed {
		t.headed = true
		rows = [][]string{eventColumns, rows[0]}
	}
	for _, cells := range rows {
		var line strings.Builder
		for i, c := range cells[:len(t.widths)] {
			fmt.Fprintf(&line, "%-*s  ", t.widths[i], c)
		}
		if _, err := fmt.Fprintln(t.out, line.String()+cells[len(t.widths)]); err != nil {
			return err
		}
	}
	return nil
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// eventResult says in a line what an event means.
func eventResult(e happening.Event) string {
	here := fmt.Sprintf("%s of %s here", human.Bytes(e.BytesHere), human.Bytes(e.BytesTotal))
	switch {
	case e.Kind == happening.Pulling:
		return "is pulled, and streams"
	case e.Kind != happening.Started:
		return string(e.Kind)
	case !e.Streamed:
		return fmt.Sprintf("not streamed: %s: %s", e.Reason, e.Message)
	case e.Present:
		return "streamed; it was here already; " + here
	}
	return fmt.Sprintf("streamed; pulled in %s; %s", e.Duration.Round(time.Millisecond), here)
}
