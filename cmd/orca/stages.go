package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"sluice/cmd/internal/progress"
	"sluice/internal/human"
	"sluice/internal/node/disks/control"
	"sluice/internal/node/mount"
	"sluice/internal/node/pulled"
)

// The lines that tell how a start goes on are those of the original: scripts know
// them. All of them go to standard error.
const (
	lineManifest    = "requesting manifest"
	lineTeleporting = "teleporting %s %s using the loopback snapshotter...\n"
	lineTeleported  = "Successfully teleported!"
	lineMounted     = "All mounts set up"
	lineCreating    = "Creating the container..."
	lineStarting    = "Starting the container..."
)

// stages tells how a start goes on.
type stages struct {
	image string
	out   io.Writer
	debug bool

	bars  progress.Progress // of the pull; nil when there is none
	began time.Time         // the start
	last  time.Time         // the last stage
	doing string            // what began then; "": nothing to tell of
}

func newStages(image string, out io.Writer, debug bool) *stages {
	now := time.Now()
	return &stages{image: image, out: out, debug: debug, began: now, last: now, doing: "finding teleportd"}
}

// say begins a stage with a line.
func (s *stages) say(doing, format string, args ...any) {
	s.lap(doing)
	fmt.Fprintf(s.out, format, args...)
}

// lap ends a stage and begins another one.
func (s *stages) lap(doing string) {
	if s.bars != nil {
		s.bars.Close()
		s.bars = nil
	}
	now := time.Now()
	if s.doing != "" {
		s.note("%s took %.3f s", s.doing, now.Sub(s.last).Seconds())
	}
	s.last, s.doing = now, doing
}

// note tells something that only --debug does.
func (s *stages) note(format string, args ...any) {
	if s.debug {
		fmt.Fprintf(s.out, "debug: "+format+"\n", args...)
	}
}

// show shows a line of the daemon's.
func (s *stages) show(l control.Line) {
	switch l.Stage {
	case control.StageManifest:
		s.say("requesting the manifest, and what mounting takes,", lineManifest+"\n")
	case control.StageTeleporting:
		s.say("mounting the layers", lineTeleporting, l.Platform, l.Manifest)
		s.note("the image has %s; of the file server %d requests were made, and %s came", layers(l.Layers), l.Requests, human.Bytes(l.Bytes))
	case control.StageTeleported:
		s.say("", lineTeleported+"\n")
	case control.StageOrdinary:
		s.say("requesting the manifest", "%s can't be teleported (%s): pulling it the ordinary way\n", s.image, l.Why)
		if l.Reason != "" {
			s.note("the reason is %s", l.Reason)
		}
	case control.StagePulling:
		s.pull(*l.Progress)
	case control.StagePulled:
		s.say("", "pulled %s %s, %s\n", l.Platform, l.Manifest, layers(l.Layers))
	case control.StageKept:
		s.say("", "the registry doesn't answer (%s): using %s %s as it was pulled before\n", l.Why, l.Platform, l.Manifest)
	}
}

// pull shows how far a pull is.
func (s *stages) pull(p pulled.Progress) {
	if s.bars == nil {
		s.lap("pulling")
		s.bars = progress.New(s.out)
	}
	step := progress.Step{Name: s.image, Verb: "pulling", Ended: "pulled", Parts: layers(p.Layers), Size: p.Size}
	if p.Layer >= 0 {
		step.Label, step.Part, step.Done, step.Total, step.Finished = fmt.Sprintf("layer %d", p.Layer+1), p.Layer, p.Done, p.Total, p.Finished
	}
	s.bars.Show(step)
	if p.Finished && s.debug {
		what := "came"
		if p.Here {
			what = "was here"
		}
		fmt.Fprintf(s.bars, "debug: layer %d of %d, %s, %s after %.3f s\n", p.Layer+1, p.Layers, human.Bytes(p.Total), what, time.Since(s.last).Seconds())
	}
}

// end tells how long it all took.
func (s *stages) end() {
	s.lap("")
	s.note("all that took %.3f s", time.Since(s.began).Seconds())
}

// mount has an image mounted, or pulled, and tells how that goes on.
func (s *stages) mount(ctx context.Context, d *daemon, req control.Mount) (control.Mounted, error) {
	s.note("teleportd has process %d, its state in %s, and answers on %s", d.info.PID, d.info.Root, d.socket)
	m, err := d.Mount(ctx, req, s.show)
	if err != nil {
		s.lap("")
		if ctx.Err() != nil {
			return m, errors.New("interrupted")
		}
		var answer *control.Error
		if errors.As(err, &answer) && answer.Reason == mount.Unauthorized {
			return m, fmt.Errorf("%s: %w: %s", s.image, err, answer.Reason.Remedy())
		}
		return m, fmt.Errorf("%s: %w", s.image, err)
	}
	return m, nil
}

// layers returns "1 layer" or "2 layers".
func layers(n int) string {
	if n == 1 {
		return "1 layer"
	}
	return fmt.Sprintf("%d layers", n)
}
