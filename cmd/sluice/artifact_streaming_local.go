package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"text/tabwriter"
	"time"

	"sluice/cmd/internal/program"
	"sluice/cmd/internal/progress"
	"sluice/internal/convert"
	"sluice/internal/human"
	"sluice/oci"
)

// convertHere converts an image on this machine, as any client of its registry
// could. ask is convert.Options.Ask.
func (c *createConfig) convertHere(ctx context.Context, p *place, ref oci.Reference, ask bool, stdout, stderr io.Writer) error {
	platforms, err := parsePlatforms(c.platforms)
	if err != nil {
		return err
	}
	show := progress.New(stderr)
	result, err := convert.Convert(ctx, p.images, ref.Repository, ref.Target(), convert.Options{
		Platforms: platforms, Layers: c.layers, Workers: c.workers, Ask: ask, Progress: func(p convert.Progress) { show.Show(convertStep(p)) },
		Log: slog.New(slog.NewTextHandler(show, &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
	show.Close()
	if err != nil && ctx.Err() != nil {
		return &program.CodedError{Err: fmt.Errorf("interrupted: %s has no streaming artifact yet", ref), Code: interrupted}
	}
	if ask && errors.Is(err, oci.ErrDenied) {
		return fmt.Errorf("no streaming artifact of %s: %w. It converts by itself: leave --local, --platform, --layers and --workers away", ref, withCode(err))
	}
	if err != nil {
		return fmt.Errorf("no streaming artifact of %s: %w", ref, withCode(err))
	}
	if result.Existed() {
		fmt.Fprint(stderr, existsAlready(ref))
	}
	made := createdHere(result)
	if c.output == "json" {
		return printCreatedJSON(stdout, ref, result.Subject.Digest, made, result.Skipped)
	}
	return printCreated(stdout, made, result.Skipped)
}

// existsAlready is what the Azure CLI says, too.
func existsAlready(ref oci.Reference) string {
	return fmt.Sprintf("The streaming artifact for image '%s' already exists. Skipping request.\n", ref)
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
	Seconds       float64    `json:"seconds,omitempty"`
	Gunzip        string     `json:"gunzip,omitempty"` // what decoded layers that are gzip
}

func createdHere(result convert.Result) (made []createdArtifact) {
	for _, a := range result.Artifacts {
		c := createdArtifact{
			Platform: platformName(a.Platform), Image: a.Image.Digest, Artifact: a.Descriptor.Digest, Existed: a.Existed, Layers: a.Layers,
			OriginalSize: a.OriginalSize, TarSize: a.TarSize, LayersSize: a.LayersSize, MetadataSize: a.MetadataSize,
			Seconds: a.Duration.Seconds(), Gunzip: a.Gunzip,
		}
		if a.ForIndex != nil {
			c.IndexArtifact = a.ForIndex.Digest
		}
		made = append(made, c)
	}
	return made
}

func printCreatedJSON(w io.Writer, ref oci.Reference, subject oci.Digest, made []createdArtifact, left []convert.Skipped) error {
	type skipped struct {
		Image  oci.Digest `json:"image"`
		Reason string     `json:"reason"`
	}
	doc := struct {
		Reference string            `json:"reference"`
		Subject   oci.Digest        `json:"subject"`
		Artifacts []createdArtifact `json:"artifacts"`
		Skipped   []skipped         `json:"skipped,omitempty"`
	}{Reference: ref.String(), Subject: subject, Artifacts: append([]createdArtifact{}, made...)}
	for _, s := range left {
		doc.Skipped = append(doc.Skipped, skipped{s.Image.Digest, s.Reason})
	}
	return printJSON(w, doc)
}

func printCreated(w io.Writer, made []createdArtifact, left []convert.Skipped) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "PLATFORM\tARTIFACT\tLAYERS\tIMAGE\tSTREAMED\tMETADATA\tTIME")
	for _, a := range made {
		took := time.Duration(a.Seconds * float64(time.Second)).Round(100 * time.Millisecond).String()
		if a.Existed {
			took = "existed"
		}
		fmt.Fprintf(t, "%s\t%s\t%d\t%s\t%s\t%s\t%s\n", a.Platform, shortDigest(a.Artifact), a.Layers,
			human.Bytes(a.OriginalSize), human.Bytes(a.LayersSize), human.Bytes(a.MetadataSize), took)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, s := range left {
		if _, err := fmt.Fprintf(w, "skipped %s: %s\n", shortDigest(s.Image.Digest), s.Reason); err != nil {
			return err
		}
	}
	return nil
}

// convertStep is the progress of a conversion as a step.
func convertStep(p convert.Progress) progress.Step {
	s := progress.Step{
		Name: platformName(p.Platform), Verb: "converting", Ended: "published", Parts: plural(p.Layers, "layer"), Size: p.Size,
		Complete: p.Stage == convert.StageDone,
	}
	if p.Stage == convert.StageLayer {
		s.Label, s.Part, s.Done, s.Total, s.Finished = fmt.Sprintf("layer %d", p.Layer+1), p.Layer, p.Done, p.Total, p.Finished
	}
	return s
}
