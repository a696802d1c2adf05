package main

import (
	"context"
	"io"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"

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
	cmd.MarkFlagsMutuallyExclusive("no-wait", "local")
	return noFiles(cmd)
}

func (c *createConfig) run(ctx context.Context, p *place, ref oci.Reference, stdout, stderr io.Writer) error {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(softMemory)
	}
	return c.convertHere(ctx, p, ref, false, stdout, stderr)
}
