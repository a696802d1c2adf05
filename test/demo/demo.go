package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"sluice/test/bed"
)

// options are the flags.
type options struct {
	src, image, command string
	rate                float64 // Mbit/s
	rtt                 time.Duration
	rounds              int
	json                bool
}

// subject is an image under measurement.
type subject struct {
	Name    string // shown
	repo    string // pushed as, with tag
	path    string // OCI layout or tar
	command []string
}

// row is a line of the table: one image, one way to start it.
type row struct {
	Image        string
	Way          string
	TotalSeconds float64
	PullSeconds  float64
	RunSeconds   float64
	Bytes        int64
	Connections  int64
	Mounts       int
	samples      []bed.ColdStart
}

// ways are the ways to start a container that are compared.
var ways = [...]struct{ name, snapshotter string }{
	{"traditional", bed.Overlayfs},
	{"streamed", bed.Sluice},
}

func say(s string) { fmt.Println("·", s) }

// demo prepares everything, measures and prints.
func demo(ctx context.Context, o options) error {
	if os.Geteuid() != 0 {
		return errors.New("mounting images and running containers needs root: sudo make demo")
	}
	if o.image != "" {
		if _, err := os.Stat(o.image); err != nil {
			return fmt.Errorf("IMAGE must be an OCI layout directory or a docker-save tar: %w", err)
		}
	}
	tools, err := bed.BuildTools(ctx, o.src, say)
	if err != nil {
		return err
	}
	subjects, err := subjects(ctx, o)
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp("", "sluice-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	say("building sluice")
	sluice, err := bed.BuildSluice(ctx, o.src, work)
	if err != nil {
		return err
	}
	reg, err := bed.StartRegistry(ctx, sluice, work)
	if err != nil {
		return err
	}
	defer reg.Stop()
	for _, s := range subjects {
		if err := publish(ctx, reg, tools, sluice, s); err != nil {
			return err
		}
	}
	link, err := bed.NewLink(ctx, reg.Addr, o.rate*1e6, o.rtt)
	if err != nil {
		return err
	}
	defer link.Close()
	rows, err := measure(ctx, o, tools, sluice, work, link, subjects)
	if err != nil {
		return err
	}
	return show(o, rows)
}

// subjects returns the images to measure.
func subjects(ctx context.Context, o options) ([]subject, error) {
	if o.image != "" {
		s := subject{Name: filepath.Base(o.image), repo: "demo/image:1", path: o.image}
		if o.command != "" {
			s.command = []string{"/bin/sh", "-c", o.command}
		}
		return []subject{s}, nil
	}
	images, err := bed.Debian(ctx, say)
	if err != nil {
		return nil, err
	}
	command := []string{"python3", "-c", `print("hi")`}
	if o.command != "" {
		command = []string{"/bin/sh", "-c", o.command}
	}
	return []subject{
		{"Debian, 1 layer", "demo/debian:1", images.OneLayer, command},
		{fmt.Sprintf("Debian, %d layers", bed.ManyLayers), "demo/debian:28", images.ManyLayers, command},
	}, nil
}

// publish pushes an image with crane and has it converted.
func publish(ctx context.Context, reg *bed.Registry, tools bed.Tools, sluice string, s subject) error {
	say("pushing " + s.Name + " with crane")
	if err := reg.Push(ctx, tools, s.path, s.repo); err != nil {
		return err
	}
	say("converting " + s.Name)
	convert := exec.CommandContext(ctx, sluice, "artifact-streaming", "create", reg.Addr+"/"+s.repo)
	convert.Stdout, convert.Stderr = os.Stdout, os.Stderr
	return convert.Run()
}

// measure starts every image in every way, interleaved, rounds times.
func measure(ctx context.Context, o options, tools bed.Tools, sluice, work string, link *bed.Link, subjects []subject) ([]row, error) {
	var rows []row
	for _, s := range subjects {
		for _, w := range ways {
			rows = append(rows, row{Image: s.Name, Way: w.name})
		}
	}
	for round := range o.rounds {
		for i, s := range subjects {
			for j, w := range ways {
				say(fmt.Sprintf("round %d of %d: %s, %s", round+1, o.rounds, s.Name, w.name))
				c, err := bed.Cold(ctx, tools, sluice, work, link, w.snapshotter, link.Addr()+"/"+s.repo, s.command...)
				if err != nil {
					return nil, fmt.Errorf("%s, %s: %w", s.Name, w.name, err)
				}
				r := &rows[i*len(ways)+j]
				r.samples = append(r.samples, c)
			}
		}
	}
	for i := range rows {
		rows[i].summarize()
	}
	return rows, nil
}

// summarize fills the figures with those of the sample with median time.
func (r *row) summarize() {
	s := slices.SortedFunc(slices.Values(r.samples), func(a, b bed.ColdStart) int { return int(a.Total() - b.Total()) })
	m := s[len(s)/2]
	r.TotalSeconds, r.PullSeconds, r.RunSeconds = m.Total().Seconds(), m.Pull.Seconds(), m.FirstOutput.Seconds()
	r.Bytes, r.Connections, r.Mounts = m.Bytes, m.Connections, m.Mounts
}

// show prints the table, and what it says.
func show(o options, rows []row) error {
	if o.json {
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		return e.Encode(rows)
	}
	fmt.Printf("\nFrom nothing on the node to the first output, over %g Mbit/s and %s (medians of %d)\n\n", o.rate, o.rtt, o.rounds)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "image\tway\ttime to output\tpull\trun\tfetched\tconnections\tmounts\t")
	for _, r := range rows {
		fmt.Fprintf(w, "%s\t%s\t%.2f s\t%.2f s\t%.2f s\t%.1f MB\t%d\t%d\t\n",
			r.Image, r.Way, r.TotalSeconds, r.PullSeconds, r.RunSeconds, float64(r.Bytes)/1e6, r.Connections, r.Mounts)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Println()
	for i := 0; i+1 < len(rows); i += len(ways) {
		fmt.Printf("%s: streaming is %.1f times faster and fetches %.1f %% of the bytes\n", rows[i].Image,
			rows[i].TotalSeconds/rows[i+1].TotalSeconds, 100*float64(rows[i+1].Bytes)/float64(rows[i].Bytes))
	}
	if len(rows) == 2*len(ways) {
		fmt.Printf("Streamed, %s take %.2f times as long as one\n",
			strings.TrimPrefix(rows[2].Image, "Debian, "), rows[3].TotalSeconds/rows[1].TotalSeconds)
	}
	return nil
}
