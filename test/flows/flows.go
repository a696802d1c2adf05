// Package flows starts containers from images that a node has never seen, in the
// ways that are compared: the traditional pull, Project Teleport, whose layers are
// disks on a file server, and streaming. All have the same registry, containerd and
// link, which the file server is behind, too. Package demo shows the figures to
// people; the test here holds what must be so on any machine.
package flows

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"time"

	"sluice/test/bed"
)

// Way is a way to start a container, named by the snapshotter.
type Way struct{ Name, Snapshotter string }

// The ways.
var (
	Traditional = Way{"traditional", bed.Overlayfs}
	Teleport    = Way{"Teleport", bed.Teleportd}
	Streamed    = Way{"streamed", bed.Sluice}
)

// Image is an image to be started.
type Image struct {
	Name    string   // for people
	Repo    string   // pushed as, with tag
	Path    string   // OCI layout or docker-save tar
	Layers  int      // 0: unknown
	Disks   int      // different layers, each of which is a disk of Teleport's; 0: unknown
	Command []string // empty: the image's own
}

// Debian returns the bed's images, one content in one layer and in many, to be
// started with a command.
func Debian(ctx context.Context, say func(string), command ...string) ([]Image, error) {
	images, err := bed.Debian(ctx, say)
	if err != nil {
		return nil, err
	}
	var all []Image
	for tag, layout := range map[string]string{"1": images.OneLayer, "28": images.ManyLayers} {
		files, err := bed.LayerFiles(layout)
		if err != nil {
			return nil, err
		}
		i := Image{Repo: "demo/debian:" + tag, Path: layout, Layers: len(files), Command: command}
		if i.Name = fmt.Sprintf("Debian, %d layers", i.Layers); i.Layers == 1 {
			i.Name = "Debian, 1 layer"
		}
		slices.Sort(files)
		i.Disks = len(slices.Compact(files))
		all = append(all, i)
	}
	slices.SortFunc(all, func(a, b Image) int { return a.Layers - b.Layers })
	return all, nil
}

// Options are what a Stage is made of.
type Options struct {
	Src  string        // the checkout
	Work string        // an existing directory for everything, not on overlayfs
	Ways []Way         // that there will be starts by
	Rate float64       // of the link, bits per second; 0: unlimited
	RTT  time.Duration // of the link
	Say  func(string)  // told what takes long
}

// Stage is what containers are started on: programs, a registry and a link, and a
// file server if a way needs one.
type Stage struct {
	o                 Options
	tools             bed.Tools
	sluice, teleportd string
	registry          *bed.Registry
	samba             *bed.Samba // nil without Teleport
	link              *bed.Link
	host              string // the registry, at the far end of the link
}

// Open builds and starts what is needed. What there is of a stage is returned along
// with an error, to be closed.
func Open(ctx context.Context, o Options) (*Stage, error) {
	s := &Stage{o: o}
	var err error
	if s.tools, err = bed.BuildTools(ctx, o.Src, o.Say); err != nil {
		return s, err
	}
	o.Say("building sluice")
	if s.sluice, err = bed.BuildSluice(ctx, o.Src, o.Work); err != nil {
		return s, err
	}
	if s.teleports() {
		return s, s.startBoth(ctx)
	}
	if s.registry, err = bed.StartRegistry(ctx, s.sluice, o.Work); err != nil {
		return s, err
	}
	if s.link, err = bed.NewLink(ctx, s.registry.Addr, o.Rate, o.RTT); err != nil {
		return s, err
	}
	s.host = s.link.Addr()
	return s, nil
}

func (s *Stage) teleports() bool { return slices.Contains(s.o.Ways, Teleport) }

// startBoth starts a file server and a registry behind one link. The registry tells
// clients that the file server is at the link's end.
func (s *Stage) startBoth(ctx context.Context) (err error) {
	if s.teleportd, err = bed.BuildTeleportd(ctx, s.o.Src, s.o.Work); err != nil {
		return err
	}
	if s.samba, err = bed.StartFileServer(ctx, s.sluice, s.o.Work); err != nil {
		return err
	}
	if s.link, err = bed.NewLink(ctx, s.samba.Address(), s.o.Rate, s.o.RTT); err != nil {
		return err
	}
	if s.registry, err = bed.StartRegistry(ctx, s.sluice, s.o.Work, bed.TeleportServer(s.link.Addr())...); err != nil {
		return err
	}
	s.host, err = s.link.Add(ctx, s.registry.Addr)
	return err
}

// Close ends everything; files stay in Work.
func (s *Stage) Close() error {
	var errs []error
	if s.link != nil {
		errs = append(errs, s.link.Close())
	}
	if s.registry != nil && s.registry.Process != nil {
		s.registry.Stop()
	}
	if s.samba != nil {
		s.samba.Stop()
	}
	return errors.Join(append(errs, bed.UnmountAll(s.o.Work))...)
}

// Publish pushes an image with crane, and makes of it what the ways need: a
// streaming artifact, disks.
func (s *Stage) Publish(ctx context.Context, i Image) error {
	s.o.Say("pushing " + i.Name + " with crane")
	if err := s.registry.Push(ctx, s.tools, i.Path, i.Repo); err != nil {
		return err
	}
	s.o.Say("converting " + i.Name)
	convert := exec.CommandContext(ctx, s.sluice, "artifact-streaming", "create", s.registry.Addr+"/"+i.Repo)
	convert.Stdout, convert.Stderr = os.Stderr, os.Stderr
	if err := convert.Run(); err != nil {
		return fmt.Errorf("converting %s: %w", i.Name, err)
	}
	if !s.teleports() {
		return nil
	}
	s.o.Say("expanding the layers of " + i.Name + " into disks")
	return s.registry.Expand(ctx, i.Repo)
}

// Start starts a container from an image on a node that has never seen it.
func (s *Stage) Start(ctx context.Context, i Image, w Way) (c bed.ColdStart, err error) {
	ref := s.host + "/" + i.Repo
	if w == Teleport {
		c, err = bed.ColdTeleport(ctx, s.tools, s.teleportd, s.o.Work, s.link, ref, i.Command...)
	} else {
		c, err = bed.Cold(ctx, s.tools, s.sluice, s.o.Work, s.link, w.Snapshotter, ref, i.Command...)
	}
	if err != nil {
		return c, fmt.Errorf("%s, %s: %w", i.Name, w.Name, err)
	}
	return c, nil
}
