package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime/debug"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"sluice/internal/convert"
	"sluice/internal/remote"
	"sluice/oci"
)

func newArtifactStreamingCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "artifact-streaming",
		Short: "Make streaming artifacts of images",
		RunE:  group,
	}
	cmd.AddCommand(newArtifactStreamingCreateCommand())
	return cmd
}

// softMemory is from what heap size on, in bytes, garbage is collected more
// often: conversion of a layer with very many files shouldn't cost its
// neighbours memory. GOMEMLIMIT in the environment has precedence.
const softMemory = 192 << 20

// createConfig is the flags of `sluice artifact-streaming create`.
type createConfig struct {
	registry, image string
	platforms       []string
	plainHTTP       bool
	layers, workers int
	output          string
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

IMAGE is HOST[:PORT]/REPOSITORY with :TAG or @DIGEST. It may also be given in
two parts, by --registry and --image.

Credentials are docker's ("docker login"). Registries on the loopback interface
are spoken to without TLS.`,
		Example: `  sluice artifact-streaming create registry.example.com/team/app:v1
  sluice artifact-streaming create --registry 127.0.0.1:5000 --image debian:12`,
		Args: arguments(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ref, err := c.reference(args)
			if err != nil {
				return err
			}
			if os.Getenv("GOMEMLIMIT") == "" {
				debug.SetMemoryLimit(softMemory)
			}
			return c.run(cmd.Context(), ref, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.StringVarP(&c.registry, "registry", "r", "", "the image's registry, `HOST[:PORT]`")
	f.StringVarP(&c.image, "image", "t", "", "the `IMAGE`; with --registry without the host")
	f.StringSliceVar(&c.platforms, "platform", nil, "convert only `PLATFORM`, as linux/arm64 or\nlinux/arm/v7; may be repeated (default all)")
	f.BoolVar(&c.plainHTTP, "plain-http", false, "speak HTTP without TLS with any registry")
	f.IntVar(&c.layers, "layers", 0, "convert `N` layers at once (default 2)")
	f.IntVar(&c.workers, "workers", 0, "compress each layer on `N` processors (default all)")
	f.StringVarP(&c.output, "output", "o", "table", "print a `FORMAT`: table or json")
	return cmd
}

// reference returns the image that the arguments and flags name.
func (c createConfig) reference(args []string) (oci.Reference, error) {
	name := c.image
	switch {
	case len(args) == 1 && c.image != "":
		return oci.Reference{}, errors.New("name the image either as an argument or by --image, not both")
	case len(args) == 1:
		name = args[0]
	case c.image == "":
		return oci.Reference{}, errors.New("which image? Name it as an argument, HOST[:PORT]/REPOSITORY:TAG, or by --registry and --image")
	}
	if c.registry == "" {
		host, _, found := strings.Cut(name, "/")
		if len(args) == 0 && !(found && (strings.ContainsAny(host, ".:") || host == "localhost")) {
			return oci.Reference{}, fmt.Errorf("--image %s names no registry: add --registry HOST[:PORT], or write --image HOST[:PORT]/%s", name, name)
		}
		return oci.ParseReference(name)
	}
	host := strings.TrimSuffix(c.registry, "/")
	// A host without a dot is one here, unlike in a reference as docker reads it.
	ref, err := oci.ParseReference("registry.invalid/" + strings.TrimPrefix(name, host+"/"))
	if err != nil {
		return ref, fmt.Errorf("image %q: write REPOSITORY:TAG or REPOSITORY@DIGEST: %w", name, err)
	}
	ref.Registry = host
	return ref, nil
}

func (c createConfig) run(ctx context.Context, ref oci.Reference, stdout, stderr io.Writer) error {
	if c.output != "table" && c.output != "json" {
		return fmt.Errorf("--output %q: table or json", c.output)
	}
	platforms, err := parsePlatforms(c.platforms)
	if err != nil {
		return err
	}
	opts := remote.Options{}
	if c.plainHTTP {
		opts.PlainHTTP = remote.PlainHTTPAlways
	}
	reg, err := remote.New(ref.Registry, opts)
	if err != nil {
		return err
	}
	show := newProgress(stderr)
	result, err := convert.Convert(ctx, reg, ref.Repository, ref.Target(), convert.Options{
		Platforms: platforms, Layers: c.layers, Workers: c.workers, Progress: func(p convert.Progress) { show.show(convertStep(p)) },
		Log: slog.New(slog.NewTextHandler(show, &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
	show.close()
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("interrupted: %s has no streaming artifact yet", ref)
	}
	if err != nil {
		return fmt.Errorf("no streaming artifact of %s: %w", ref, withCode(err))
	}
	if result.Existed() {
		fmt.Fprintf(stderr, "The streaming artifact for image '%s' already exists. Skipping request.\n", ref)
	}
	if c.output == "json" {
		return printJSON(stdout, ref, result)
	}
	return printTable(stdout, result)
}

// withCode puts the error's code in front, by which documentation is searched.
func withCode(err error) error {
	var coded *oci.Error
	if errors.As(err, &coded) && coded.Code != "" {
		return fmt.Errorf("%s: %w", coded.Code, err)
	}
	return err
}

func parsePlatforms(list []string) ([]oci.Platform, error) {
	var platforms []oci.Platform
	for _, s := range list {
		parts := strings.Split(s, "/")
		if len(parts) < 2 || len(parts) > 3 || parts[0] == "" || parts[1] == "" {
			return nil, fmt.Errorf("--platform %q: write OS/ARCHITECTURE, or OS/ARCHITECTURE/VARIANT", s)
		}
		p := oci.Platform{OS: parts[0], Architecture: parts[1]}
		if len(parts) == 3 {
			p.Variant = parts[2]
		}
		platforms = append(platforms, p)
	}
	return platforms, nil
}

// createdArtifact is an artifact as --output json prints it.
type createdArtifact struct {
	Platform      string     `json:"platform"`
	Image         oci.Digest `json:"image"`
	Artifact      oci.Digest `json:"artifact"`
	IndexArtifact oci.Digest `json:"indexArtifact,omitempty"`
	Existed       bool       `json:"existed"`
	Layers        int        `json:"layers"`
	OriginalSize  int64      `json:"originalSize"`
	TarSize       int64      `json:"tarSize,omitempty"`
	LayersSize    int64      `json:"layersSize"`
	MetadataSize  int64      `json:"metadataSize"`
	Seconds       float64    `json:"seconds"`
}

func printJSON(w io.Writer, ref oci.Reference, result convert.Result) error {
	type skipped struct {
		Image  oci.Digest `json:"image"`
		Reason string     `json:"reason"`
	}
	doc := struct {
		Reference string            `json:"reference"`
		Subject   oci.Digest        `json:"subject"`
		Artifacts []createdArtifact `json:"artifacts"`
		Skipped   []skipped         `json:"skipped,omitempty"`
	}{Reference: ref.String(), Subject: result.Subject.Digest}
	for _, a := range result.Artifacts {
		c := createdArtifact{
			Platform: platformName(a.Platform), Image: a.Image.Digest, Artifact: a.Descriptor.Digest, Existed: a.Existed, Layers: a.Layers,
			OriginalSize: a.OriginalSize, TarSize: a.TarSize, LayersSize: a.LayersSize, MetadataSize: a.MetadataSize, Seconds: a.Duration.Seconds(),
		}
		if a.ForIndex != nil {
			c.IndexArtifact = a.ForIndex.Digest
		}
		doc.Artifacts = append(doc.Artifacts, c)
	}
	for _, s := range result.Skipped {
		doc.Skipped = append(doc.Skipped, skipped{s.Image.Digest, s.Reason})
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(doc)
}

func printTable(w io.Writer, result convert.Result) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "PLATFORM\tARTIFACT\tLAYERS\tIMAGE\tSTREAMED\tMETADATA\tTIME")
	for _, a := range result.Artifacts {
		took := a.Duration.Round(100 * time.Millisecond).String()
		if a.Existed {
			took = "existed"
		}
		fmt.Fprintf(t, "%s\t%s\t%d\t%s\t%s\t%s\t%s\n", platformName(a.Platform), shortDigest(a.Descriptor.Digest), a.Layers,
			size(a.OriginalSize), size(a.LayersSize), size(a.MetadataSize), took)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, s := range result.Skipped {
		if _, err := fmt.Fprintf(w, "skipped %s: %s\n", shortDigest(s.Image.Digest), s.Reason); err != nil {
			return err
		}
	}
	return nil
}

func platformName(p oci.Platform) string {
	s := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		s += "/" + p.Variant
	}
	return s
}

// shortDigest returns as much of a digest as people compare.
func shortDigest(d oci.Digest) string { return string(d)[:min(len(d), len("sha256:")+12)] }
