package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"sluice/test/bed"
	"sluice/test/flows"
)

// options are the flags.
type options struct {
	src, image, command string
	rate                float64 // Mbit/s
	rtt                 time.Duration
	rounds              int
	teleport            bool
	json                bool
}

// ways are the ways to start a container that are compared, the traditional one
// first and streaming last.
func (o options) ways() []flows.Way {
	if o.teleport {
		return []flows.Way{flows.Traditional, flows.Teleport, flows.Streamed}
	}
	return []flows.Way{flows.Traditional, flows.Streamed}
}

// say tells a person what takes long; standard output is for the figures.
func say(s string) { fmt.Fprintln(os.Stderr, "·", s) }

// demo prepares everything, measures and prints.
func demo(ctx context.Context, o options) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("mounting images and running containers needs root: sudo make demo")
	}
	if o.image != "" {
		if _, err := os.Stat(o.image); err != nil {
			return fmt.Errorf("IMAGE must be an OCI layout directory or a docker-save tar: %w", err)
		}
	}
	images, err := images(ctx, o)
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp("", "sluice-demo-")
	if err != nil {
		return err
	}
	stage, err := flows.Open(ctx, flows.Options{Src: o.src, Work: work, Ways: o.ways(), Rate: o.rate * 1e6, RTT: o.rtt, Say: say})
	defer func() {
		closeErr := stage.Close()
		if closeErr == nil { // what is still mounted must not be removed
			os.RemoveAll(work)
		}
		err = errors.Join(err, closeErr)
	}()
	if err != nil {
		return err
	}
	for _, i := range images {
		if err := stage.Publish(ctx, i); err != nil {
			return err
		}
	}
	rows, err := measure(ctx, o, stage, images)
	if err != nil {
		return err
	}
	return show(o, rows)
}

// images returns the images to measure.
func images(ctx context.Context, o options) ([]flows.Image, error) {
	var command []string
	if o.command != "" {
		command = []string{"/bin/sh", "-c", o.command}
	}
	if o.image != "" {
		return []flows.Image{{Name: filepath.Base(o.image), Repo: "demo/image:1", Path: o.image, Command: command}}, nil
	}
	if command == nil {
		command = []string{"python3", "-c", `print("hi")`}
	}
	return flows.Debian(ctx, say, command...)
}

// row is a line of the table: one image, one way to start it.
type row struct {
	Image                string
	Way                  string
	TotalSeconds         float64
	PullSeconds          float64
	RunSeconds           float64
	Bytes                int64
	Connections          int64
	Mounts               int
	PerLayerMilliseconds *float64 `json:",omitempty"` // that each layer adds to the image in one

	image   flows.Image
	samples []bed.ColdStart
}

// measure starts every image in every way, interleaved, rounds times.
func measure(ctx context.Context, o options, stage *flows.Stage, images []flows.Image) ([]row, error) {
	var rows []row
	for _, i := range images {
		for _, w := range o.ways() {
			rows = append(rows, row{Image: i.Name, Way: w.Name, image: i})
		}
	}
	for round := range o.rounds {
		for i, image := range images {
			for j, w := range o.ways() {
				fmt.Fprintf(os.Stderr, "· round %d of %d: %s, %s: ", round+1, o.rounds, image.Name, w.Name)
				c, err := stage.Start(ctx, image, w)
				if err != nil {
					fmt.Fprintln(os.Stderr, "failed")
					return nil, err
				}
				fmt.Fprintf(os.Stderr, "%.2f s\n", c.Total().Seconds())
				r := &rows[i*len(o.ways())+j]
				r.samples = append(r.samples, c)
			}
		}
	}
	for i := range rows {
		rows[i].summarize()
	}
	for i := len(o.ways()); i < len(rows); i++ {
		rows[i].compare(rows[i%len(o.ways())])
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

// compare fills in what a layer costs, beside the same content in fewer layers.
func (r *row) compare(few row) {
	cost := 1000 * (r.TotalSeconds - few.TotalSeconds) / float64(r.image.Layers-few.image.Layers)
	r.PerLayerMilliseconds = &cost
}
