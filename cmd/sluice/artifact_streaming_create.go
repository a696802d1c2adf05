package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sluice/cmd/internal/program"
	"sluice/cmd/internal/progress"
	"sluice/internal/acr"
	"sluice/internal/convert"
	"sluice/oci"
)

// softMemory is from what heap size on, in bytes, garbage is collected more
// often: conversion of a layer with very many files shouldn't cost its
// neighbours memory. GOMEMLIMIT in the environment has precedence.
const softMemory = 192 << 20

// createConfig is the flags of `sluice artifact-streaming create`.
type createConfig struct {
	streamingFlags
	platforms       []string
	layers, workers int
	local, noWait   bool
}

func newArtifactStreamingCreateCommand() *cobra.Command {
	var c createConfig
	cmd := &cobra.Command{
		Use:   "create IMAGE",
		Short: "Make the streaming artifact of an image in a registry",
		Long: `Make the streaming artifact of an image in a registry.

The image stays as it is. Its streaming form is stored in the same repository
and linked to it as a referrer, so that nodes find it. Of a multi-platform image
all linux platforms are converted. What exists already is not made again.

A registry of Sluice's converts by itself; ^C ends the waiting, not the
conversion. For any other OCI registry, and with --local, the image is converted
on this machine. gzip is decoded by igzip or unpigz there if one is installed.`,
		Example: `  sluice artifact-streaming create registry.example.com/team/app:v1
  sluice artifact-streaming create --registry 127.0.0.1:5000 --image debian:12 --no-wait
  sluice artifact-streaming create --registry https://harbor.example.com --image team/app:v1`,
		Args: arguments(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, ref, err := c.image(cmd, args)
			if err != nil {
				return err
			}
			for _, flag := range []string{"platform", "layers", "workers"} {
				c.local = c.local || cmd.Flags().Changed(flag)
			}
			if c.local && c.noWait {
				return errors.New("--no-wait is for conversions in the registry: leave it or --local, --platform, --layers and --workers away")
			}
			return c.run(cmd.Context(), p, ref, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	c.addImage(cmd)
	f := cmd.Flags()
	f.BoolVar(&c.noWait, "no-wait", false, "don't wait until the registry has converted the image")
	f.BoolVar(&c.local, "local", false, "convert on this machine, whatever the registry can;\nthe following flags imply it")
	f.StringSliceVar(&c.platforms, "platform", nil, "convert only `PLATFORM`, as linux/arm64 or\nlinux/arm/v7; may be repeated (default all)")
	f.IntVar(&c.layers, "layers", 0, "convert `N` layers at once (default 2)")
	f.IntVar(&c.workers, "workers", 0, "compress each layer on `N` processors (default all)")
	return noFiles(cmd)
}

func (c *createConfig) run(ctx context.Context, p *place, ref oci.Reference, stdout, stderr io.Writer) error {
	converts := p.converts(ctx, ref.Repository)
	if converts && !c.local {
		err := c.convertThere(ctx, p, ref, stdout, stderr)
		if !errors.Is(err, oci.ErrUnsupported) {
			return err
		}
		fmt.Fprintln(stderr, "the registry doesn't convert images: converting on this machine")
	}
	if c.noWait {
		if _, err := p.digest(ctx, ref); err != nil {
			return fmt.Errorf("no streaming artifact of %s: %w", ref, withCode(err))
		}
		return fmt.Errorf("--no-wait: %s doesn't convert images, and this machine can't go on without this program", p.host)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(softMemory)
	}
	return c.convertHere(ctx, p, ref, converts, stdout, stderr)
}

// converts reports whether the registry has the API by which it is told to
// convert. One that says anything else, or nothing, has not.
func (p *place) converts(ctx context.Context, repo string) bool {
	_, err := p.manage.Streaming(ctx, repo)
	return err == nil
}

// digest returns the digest of an image that a tag may name.
func (p *place) digest(ctx context.Context, ref oci.Reference) (oci.Digest, error) {
	if ref.Digest != "" {
		return ref.Digest, nil
	}
	t, err := p.manage.Tag(ctx, ref.Repository, ref.Tag)
	if err == nil {
		return t.Digest, nil
	}
	// Whoever may pull and push may still not read metadata.
	desc, perr := p.images.ResolveManifest(ctx, ref.Repository, ref.Target())
	if errors.Is(perr, oci.ErrManifestUnknown) || errors.Is(perr, oci.ErrNameUnknown) {
		return "", convert.ErrResourceNotFound.Withf("the image doesn't exist: %v", err)
	}
	return desc.Digest, perr
}

// convertThere has the registry convert an image, and waits for that.
func (c *createConfig) convertThere(ctx context.Context, p *place, ref oci.Reference, stdout, stderr io.Writer) error {
	failed := func(err error) error { return fmt.Errorf("no streaming artifact of %s: %w", ref, withCode(err)) }
	subject, err := p.digest(ctx, ref)
	if err != nil {
		return failed(err)
	}
	there, err := artifactsOf(ctx, p.images, ref.Repository, subject)
	if err != nil {
		return failed(err)
	}
	for _, s := range there {
		if s.parsed != nil {
			fmt.Fprint(stderr, existsAlready(ref))
			return c.report(ctx, p, ref, subject, true, 0, stdout)
		}
	}
	op, err := p.manage.LatestStreaming(ctx, ref.Repository, subject)
	if errors.Is(err, acr.ErrOperationUnknown) || err == nil && op.Status.Final() {
		op, err = p.manage.StartStreaming(ctx, ref.Repository, subject)
	} else if err == nil {
		fmt.Fprintf(stderr, "The image '%s' is being converted already. Following operation %s.\n", ref, op.ID)
	}
	if err != nil {
		return failed(err)
	}
	if c.noWait {
		fmt.Fprintf(stderr, "The streaming artifact for image '%s' is being created. Use `%s` to see how far it is.\n", ref, operationCommand("show", p, ref.Repository, op.ID))
		return c.print(stdout, op, func(w io.Writer) { printOperation(w, op) })
	}
	start := time.Now()
	op, err = c.follow(ctx, p, ref, subject, op, stderr)
	switch {
	case ctx.Err() != nil:
		return &program.CodedError{Code: interrupted, Err: fmt.Errorf("interrupted: the registry goes on converting %s. How far it is: %s; to stop it: %s", ref,
			operationCommand("show", p, ref.Repository, op.ID), operationCommand("cancel", p, ref.Repository, op.ID))}
	case err != nil:
		return failed(err)
	case op.Status == acr.StatusSucceeded:
		return c.report(ctx, p, ref, subject, false, time.Since(start), stdout)
	}
	return failed(operationError(op))
}

// operationCommand is the command that does something with an operation.
func operationCommand(verb string, p *place, repo, id string) string {
	return fmt.Sprintf("sluice artifact-streaming operation %s -r %s --repository %s --id %s", verb, p.host, repo, id)
}

// operationError is why an operation that has ended did not succeed.
func operationError(op acr.Operation) error {
	if op.Status == acr.StatusCanceled {
		return fmt.Errorf("operation %s was canceled", op.ID)
	}
	details := op.Details
	if details == "" {
		details = "the registry doesn't say why; its log does"
	}
	if op.ErrorCode == "" {
		return fmt.Errorf("operation %s failed: %s", op.ID, details)
	}
	return &oci.Error{Code: op.ErrorCode, Message: details}
}

// How often an operation is asked for: soon after something changed, and ever
// more seldom while nothing does.
const (
	pollFirst = 200 * time.Millisecond
	pollLast  = 2 * time.Second
)

// follow shows an operation's progress until it has ended.
func (c *createConfig) follow(ctx context.Context, p *place, ref oci.Reference, subject oci.Digest, op acr.Operation, stderr io.Writer) (acr.Operation, error) {
	show := progress.New(stderr)
	defer show.Close()
	s := progress.Step{Name: ref.String(), Verb: "converting", Ended: "converted", Parts: "in the registry", Label: "image", Single: true}
	if _, list, err := images(ctx, p.images, ref.Repository, subject.String()); err == nil {
		for _, image := range list {
			s.Size += image.originalSize()
		}
		s.Parts = plural(len(list), "image")
	}
	s.Total = s.Size
	pause := pollFirst
	for {
		now, err := p.manage.ImageOperation(ctx, ref.Repository, op.ID)
		if err != nil {
			return op, err
		}
		if now.Progress != op.Progress || now.Status != op.Status {
			pause = pollFirst
		}
		op = now
		percent, _ := strconv.ParseInt(strings.TrimSuffix(op.Progress, "%"), 10, 64) // 0 before there is any
		s.Done = s.Size / 100 * min(max(percent, 0), 100)
		s.Complete = op.Status == acr.StatusSucceeded
		show.Show(s)
		if op.Status.Final() {
			return op, nil
		}
		select {
		case <-ctx.Done():
			return op, ctx.Err()
		case <-time.After(pause):
		}
		pause = min(pause*5/4, pollLast)
	}
}

// report prints the artifacts of an image that the registry has converted.
func (c *createConfig) report(ctx context.Context, p *place, ref oci.Reference, subject oci.Digest, existed bool, took time.Duration, stdout io.Writer) error {
	_, found, err := findArtifacts(ctx, p.images, ref.Repository, subject.String())
	if err != nil {
		return err
	}
	var made []createdArtifact
	for _, s := range found {
		if s.parsed == nil {
			continue
		}
		l := listed(s)
		made = append(made, createdArtifact{
			Platform: l.Platform, Image: l.Image, Artifact: l.Artifact, IndexArtifact: l.IndexArtifact, Existed: existed,
			Layers: l.Layers, OriginalSize: l.OriginalSize, LayersSize: l.LayersSize, MetadataSize: l.MetadataSize, Seconds: took.Seconds(),
		})
	}
	if c.output == "json" {
		return printCreatedJSON(stdout, ref, subject, made, nil)
	}
	return printCreated(stdout, made, nil)
}
