package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sys/unix"

	"sluice/internal/node/mount/control"
	"sluice/internal/node/run"
	"sluice/internal/node/timeline"
	"sluice/oci"
)

// traceConfig is the flags of `sluice node trace`.
type traceConfig struct {
	imageFlags
	runc, output string
	last         bool
	requests     bool
	time         time.Duration
}

func newNodeTraceCommand() *cobra.Command {
	var c traceConfig
	cmd := &cobra.Command{
		Use:   "trace IMAGE [COMMAND [ARGUMENT]...]",
		Short: "Start an image and show what took how long",
		Long: `Start an image and show what took how long.

Runs the image's process like sluice run, and then draws every step from asking
the registry to the first output: when it began, how long it took, how many
requests and bytes it waited for. With --last nothing is run: the daemon
remembers the last pulls and starts, also those of containerd.

What is on the node already needs no step. For a start on an empty node give a
--root of its own, such as a new directory.`,
		Example: `  sluice node trace registry.example.com/team/app:v1
  sluice node trace --root /var/tmp/cold registry.example.com/team/app:v1 sh -c 'echo hi'
  sluice node trace --last registry.example.com/team/app:v1`,
		Args: arguments(1, math.MaxInt),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(c.output); err != nil {
				return err
			}
			if c.last {
				return lastTrace(cmd, c, args[0])
			}
			return traceImage(cmd, c, args[0], args[1:])
		},
	}
	c.register(cmd)
	registerOutput(cmd, &c.output)
	cmd.Flags().BoolVar(&c.last, "last", false, "run nothing: show the last pull or start that the\ndaemon remembers")
	cmd.Flags().BoolVar(&c.requests, "requests", false, "a line for each HTTP request, too")
	cmd.Flags().DurationVar(&c.time, "time", 10*time.Second, "`TIME` after which the process is ended")
	cmd.Flags().StringVar(&c.runc, "runc", "runc", "`PROGRAM` with runc's command line")
	// What follows the image is the container's.
	cmd.Flags().SetInterspersed(false)
	return cmd
}

// lastTrace shows what the daemon remembers.
func lastTrace(cmd *cobra.Command, c traceConfig, image string) error {
	ref, err := oci.ParseReference(c.image(image))
	if err != nil {
		return err
	}
	spans, err := askDaemon(cmd.Context(), c.daemonFlags, func(client *control.Client, ctx context.Context) ([]timeline.Span, error) {
		return client.LastTrace(ctx, ref.String())
	})
	if err != nil {
		return err
	}
	if len(spans) == 0 {
		return fmt.Errorf("the daemon remembers no start of %s: it was pulled before the daemon started, or many others since", ref)
	}
	return c.show(cmd.OutOrStdout(), spans)
}

// traceImage runs an image's process and shows the start.
func traceImage(cmd *cobra.Command, c traceConfig, image string, args []string) error {
	client, err := connect(cmd.Context(), c.daemonFlags, c.plainHTTP)
	if err != nil {
		return err
	}
	var recorder timeline.Recorder
	provider, err := newTraces(cmd.Context(), "sluice", "", &recorder)
	if err != nil {
		return err
	}
	// What the process prints isn't part of a JSON document.
	out := cmd.OutOrStdout()
	if c.output == "json" {
		out = cmd.ErrOrStderr()
	}
	id, runErr := tracedRun(cmd.Context(), client, provider.Tracer("sluice/cmd"), c, image, run.Container{
		Args: args, Stdout: out, Stderr: cmd.ErrOrStderr(),
	})
	spans, err := client.Trace(cmd.Context(), id)
	if err != nil {
		return errors.Join(runErr, err)
	}
	if c.output == "table" {
		fmt.Fprintln(out)
	}
	return errors.Join(c.show(cmd.OutOrStdout(), append(recorder.Trace(id), spans...)), runErr)
}

// tracedRun runs a container with spans, and returns the trace's ID.
func tracedRun(ctx context.Context, client *control.Client, tracer trace.Tracer, c traceConfig, image string, container run.Container) (id string, err error) {
	ctx, start := tracer.Start(ctx, "start", trace.WithAttributes(attribute.String(timeline.Image, c.image(image))))
	defer start.End()
	id = start.SpanContext().TraceID().String()
	mounting, span := tracer.Start(ctx, "mount image")
	done, err := mountContainer(mounting, client, c.image(image), &container)
	if err != nil {
		span.SetStatus(codes.Error, err.Error())
	}
	span.End()
	if err != nil {
		return id, err
	}
	defer func() { err = errors.Join(err, done()) }()

	running, span := tracer.Start(ctx, "run")
	defer span.End()
	_, silence := tracer.Start(running, "first output")
	first := &firstWrite{what: func() { silence.End() }}
	container.Stdout, container.Stderr = first.of(container.Stdout), first.of(container.Stderr)
	limited, cancel := context.WithTimeout(running, c.time)
	defer cancel()
	err = runContainer(limited, container, c.runc)
	if limited.Err() != nil && ctx.Err() == nil {
		err = nil // a server that would run for ever
	}
	return id, err
}

// firstWrite calls what when something is written for the first time to one of
// several writers.
type firstWrite struct {
	once sync.Once
	what func()
}

func (f *firstWrite) of(w io.Writer) io.Writer {
	return writerFunc(func(p []byte) (int, error) {
		f.once.Do(f.what)
		return w.Write(p)
	})
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// show prints a trace.
func (c *traceConfig) show(w io.Writer, spans []timeline.Span) error {
	if c.output == "json" {
		return printJSON(w, spans)
	}
	width := 0
	if size, err := unix.IoctlGetWinsize(int(os.Stdout.Fd()), unix.TIOCGWINSZ); err == nil {
		width = int(size.Col)
	}
	return timeline.Draw(w, spans, timeline.DrawOptions{Width: width, Requests: c.requests})
}
