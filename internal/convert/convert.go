package convert

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"sluice/internal/artifact"
	"sluice/internal/layer"
	"sluice/oci"
)

// Options are the options of Convert. The zero value converts all linux
// platforms of an image.
type Options struct {
	// Platforms, if not empty, are the only ones to convert, compared by
	// operating system and architecture and, where set, variant.
	Platforms []oci.Platform

	// Layers is how many layers are converted at once; default 2. Each takes
	// about 20 MiB of memory, a connection in either direction, and as many
	// processors as it gets.
	Layers int

	// Workers is how many goroutines compress each layer; default: as many
	// as there are processors.
	Workers int

	// Attempts is how often a layer is tried before a network or storage error
	// of its fails the conversion; default 3. Content that is wrong is tried
	// once.
	Attempts int

	// Ask has the registry asked, before anything is converted, whether it
	// takes streaming artifacts from us at all: ours reserves them to itself
	// unless it's configured otherwise, and says so only to who pushes one. To be
	// set for registries that refuse manifests of which blobs are missing.
	Ask bool

	// Reuse, if set, is asked for every layer, and may know it already.
	Reuse Reuse

	// Progress, if set, is told how far the conversion is. It's called from
	// several goroutines, but by one at a time, and should return quickly.
	Progress func(Progress)

	// Log gets what is worth knowing afterwards; nil: nothing.
	Log *slog.Logger

	gunzip layer.Gunzip // what decodes gzip
}

func (o Options) withDefaults() Options {
	if o.Layers <= 0 {
		o.Layers = 2
	}
	if o.Attempts <= 0 {
		o.Attempts = 3
	}
	if o.Progress == nil {
		o.Progress = func(Progress) {}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	o.gunzip = layer.FindGunzip()
	return o
}

// Result is what Convert found or made.
type Result struct {
	// Subject is what the reference names: an image manifest or an index.
	Subject oci.Descriptor

	// Artifacts has one element per converted platform.
	Artifacts []Artifact

	// Skipped says which entries of an index were left out, and why.
	Skipped []Skipped
}

// Existed reports whether there was nothing to do.
func (r Result) Existed() bool {
	for _, a := range r.Artifacts {
		if !a.Existed {
			return false
		}
	}
	return true
}

// Artifact is the streaming artifact of one platform.
type Artifact struct {
	Platform oci.Platform

	// Image is the platform's image manifest, and Descriptor the artifact whose
	// subject it is.
	Image      oci.Descriptor
	Descriptor oci.Descriptor

	// ForIndex is the artifact whose subject is the index; nil if the
	// reference doesn't name one.
	ForIndex *oci.Descriptor

	// Existed says that all of it was there before.
	Existed bool

	// Sizes in bytes: of the original layers as they are in the registry, of
	// their tars, of the artifact's layer and sparse blobs, and of its metadata
	// and chunk table. The tars' is zero if the artifact existed.
	OriginalSize, TarSize, LayersSize, MetadataSize int64
	Layers                                          int

	// Duration is how long the conversion took, and Gunzip what decoded layers
	// that are gzip: "igzip", "unpigz", or "go", this process. Empty if the
	// artifact existed.
	Duration time.Duration
	Gunzip   string
}

// Skipped is an entry of an index that isn't converted.
type Skipped struct {
	Image  oci.Descriptor
	Reason string
}

// Convert makes the streaming artifacts of the image that reference, a tag or
// a digest, names in repo, and pushes them. For an index it does so for each
// of its linux platforms, and each artifact is pushed twice: as referrer of the
// platform's manifest and as referrer of the index. What exists already is not
// made again.
//
// The artifacts of a Result are complete and durable in the registry. When it
// fails, so are those of the platforms that it had finished before.
//
// Errors: one of this package's codes if the image can't be streamed (see
// eligible.go), and otherwise what the registry or the layers' content gave.
func Convert(ctx context.Context, reg oci.Registry, repo, reference string, opts Options) (Result, error) {
	c := &converter{reg: reg, repo: repo, opts: opts.withDefaults(), layers: make(map[oci.Digest]*artifact.Layer)}
	c.report = c.reporter()
	p, err := c.plan(ctx, reference)
	if err != nil {
		return Result{}, err
	}
	result := Result{Subject: p.subject, Skipped: p.skipped}
	for i, img := range p.images {
		a, err := c.artifact(ctx, p, img)
		if err != nil {
			return result, fmt.Errorf("converting %s@%s for %s: %w", repo, img.desc.Digest, platformString(img.platform), err)
		}
		result.Artifacts = append(result.Artifacts, a)
		c.forget(p.images[i+1:])
	}
	return result, nil
}

// converter is one run of Convert.
type converter struct {
	reg    oci.Registry
	repo   string
	opts   Options
	report func(Progress) // serialized

	// layers are the converted layers by diff ID: an image may have one twice,
	// and platforms may share some.
	layers map[oci.Digest]*artifact.Layer

	asked bool // see Options.Ask
}

// forget drops the layers that none of the images still to come has.
func (c *converter) forget(coming []*image) {
	needed := make(map[oci.Digest]bool)
	for _, img := range coming {
		for _, id := range img.diffIDs {
			needed[id] = true
		}
	}
	for id := range c.layers {
		if !needed[id] {
			delete(c.layers, id)
		}
	}
}

// artifact makes what is missing of an image's artifact.
func (c *converter) artifact(ctx context.Context, p *plan, img *image) (Artifact, error) {
	start := time.Now()
	a := Artifact{Platform: img.platform, Image: img.desc, Layers: len(img.layers), OriginalSize: img.size()}
	built, err := c.existing(ctx, img)
	if err != nil {
		return a, err
	}
	a.Existed = built != nil
	if built == nil {
		a.Gunzip = c.opts.gunzip.String()
		if built, err = c.convert(ctx, img, &a); err != nil {
			return a, err
		}
	}
	a.Descriptor = built.Descriptor
	a.MetadataSize = built.Manifest.Metadata.Blob.Size + built.Manifest.Table.Blob.Size
	for _, l := range built.Manifest.Layers {
		a.MetadataSize += l.Metadata.Blob.Size
		a.LayersSize += l.Tar.Size
		if l.Sparse != nil {
			a.LayersSize += l.Sparse.Size
		}
	}
	if p.index {
		pushed, err := c.pushForIndex(ctx, p, built, &a)
		if err != nil {
			return a, err
		}
		a.Existed = a.Existed && !pushed
	}
	a.Duration = time.Since(start)
	done := img.progress(StageDone)
	done.Existed = a.Existed
	c.report(done)
	c.opts.Log.InfoContext(ctx, "streaming artifact", "repository", c.repo, "image", img.desc.Digest, "platform", platformString(img.platform),
		"artifact", a.Descriptor.Digest, "existed", a.Existed, "layers", len(img.layers), "original", a.OriginalSize, "tar", a.TarSize,
		"blobs", a.LayersSize, "metadata", a.MetadataSize, "gunzip", a.Gunzip, "duration", a.Duration)
	return a, nil
}

// pushForIndex pushes the artifact as the index's referrer, unless it is one.
func (c *converter) pushForIndex(ctx context.Context, p *plan, built *artifact.Built, a *Artifact) (pushed bool, err error) {
	again, err := built.For(p.subject)
	if err != nil {
		return false, err
	}
	a.ForIndex = &again.Descriptor
	if _, err := c.reg.ResolveManifest(ctx, c.repo, again.Descriptor.Digest.String()); err == nil {
		return false, nil
	}
	return true, c.push(ctx, again)
}

// push pushes an artifact's manifest.
func (c *converter) push(ctx context.Context, b *artifact.Built) error {
	_, err := c.reg.PushManifest(ctx, c.repo, b.Descriptor.Digest.String(), b.Descriptor.MediaType, b.Content)
	if err != nil {
		return fmt.Errorf("pushing the artifact's manifest %s: %w", b.Descriptor.Digest, err)
	}
	return nil
}

// existing returns the streaming artifact that the image has, or nil.
func (c *converter) existing(ctx context.Context, img *image) (*artifact.Built, error) {
	for desc, err := range c.reg.Referrers(ctx, c.repo, img.desc.Digest, oci.ArtifactTypeStreaming) {
		if err != nil {
			return nil, fmt.Errorf("listing the referrers of %s: %w", img.desc.Digest, err)
		}
		if desc.ArtifactType != oci.ArtifactTypeStreaming {
			continue // a registry that doesn't filter
		}
		if f, ok := desc.Annotations[artifact.AnnotationFormat]; ok && f != artifact.Format {
			continue // another format's artifact is none of ours
		}
		m, err := c.reg.GetManifest(ctx, c.repo, desc.Digest.String())
		if errors.Is(err, oci.ErrManifestUnknown) {
			continue // deleted, while an index of referrers kept in a tag still lists it
		}
		if err != nil {
			return nil, fmt.Errorf("reading referrer %s: %w", desc.Digest, err)
		}
		parsed, err := artifact.ParseManifest(m.Content)
		if err != nil || parsed.Subject.Digest != img.desc.Digest || parsed.Config.Digest != img.config.Digest {
			c.opts.Log.WarnContext(ctx, "referrer isn't a streaming artifact that can be used; converting anew",
				"repository", c.repo, "image", img.desc.Digest, "referrer", desc.Digest, "error", err)
			continue
		}
		return &artifact.Built{Manifest: parsed, Content: m.Content, Descriptor: m.Descriptor}, nil
	}
	return nil, nil
}
