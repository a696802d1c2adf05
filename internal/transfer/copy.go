package transfer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"sluice/oci"
)

// Source is an image to copy.
type Source struct {
	// Registry is where it is. If it has the method Referrers of oci.Lister,
	// referrers can be copied.
	Registry oci.Reader

	// Repo is its repository, and Reference its tag or digest; Archive says
	// what they are in one.
	Repo, Reference string
}

// Target is where an image is copied to.
type Target struct {
	Registry interface {
		oci.Reader
		oci.Writer
	}
	Repo string

	// Tags are set when everything else is there. With none the image can be
	// pulled by its digest only.
	Tags []string

	// Name tells this registry from others, such as its host and port.
	// Options.StateDir needs it.
	Name string
}

// Options are the options of Copy. The zero value copies all platforms and no
// referrers.
type Options struct {
	// Platforms, if not empty, are the only ones to copy, compared by operating
	// system and architecture and, where set, variant.
	//
	// One platform of an index is copied as the image that it is: its manifest
	// is what the tags point at, as crane and oras do it. Of several, an index
	// is made that has only them (and their attestations), because registries
	// refuse an index whose images aren't there; its digest is not the
	// original's, so the original's referrers, which name that digest, are not
	// copied. Referrers of the images are.
	Platforms []oci.Platform

	// Referrers says to copy what refers to the manifests, such as signatures,
	// attestations and SBOMs, and what refers to those. Signatures that cosign
	// keeps in tags (sha256-HEX.sig, .att, .sbom) are among them. Streaming
	// artifacts are left out, because a registry makes its own, unless
	// Streaming is set.
	Referrers, Streaming bool

	// SameRegistry says that source and target are repositories of one
	// registry, so that blobs can be mounted instead of copied.
	SameRegistry bool

	// Jobs is how many blobs are copied at once; default 4. Each needs memory
	// for about what the target sends in one request (internal/remote: 8 MiB).
	Jobs int

	// Attempts is how often in a row the transfer of a blob may fail without
	// a byte having arrived; default 5.
	Attempts int

	// MinBackoff is about how long the first pause after a failure is. The
	// following are longer, up to 10 seconds. Default 250 ms.
	MinBackoff time.Duration

	// StateDir is a directory in which unfinished uploads are remembered, so
	// that the next run continues them; made if it doesn't exist. What is in it
	// lets others write to these uploads, so it is made for the user only.
	// Empty: blobs that are unfinished begin anew, and are canceled on failure.
	StateDir string

	// DryRun says to find out what would be copied, and to change nothing.
	DryRun bool

	// Progress, if set, is told how far the copy is. It's called from several
	// goroutines, but by one at a time, and should return quickly.
	Progress func(Progress)

	// Log gets what is worth knowing afterwards; nil: nothing.
	Log *slog.Logger
}

func (o Options) withDefaults() Options {
	if o.Jobs <= 0 {
		o.Jobs = 4
	}
	if o.Attempts <= 0 {
		o.Attempts = 5
	}
	if o.MinBackoff <= 0 {
		o.MinBackoff = 250 * time.Millisecond
	}
	if o.Progress == nil {
		o.Progress = func(Progress) {}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

// Result is what Copy did or, with Options.DryRun, would do.
type Result struct {
	// Root is what the tags point at.
	Root oci.Descriptor

	// Tags are the target's tags, and Moved those of them that didn't point
	// at Root before.
	Tags, Moved []string

	// Platforms are those of the image's manifests.
	Platforms []oci.Platform

	// Manifests is how many were pushed, ManifestsSkipped how many were there.
	// Referrers is how many of all these are referrers.
	Manifests, ManifestsSkipped, Referrers int

	// Blobs are all that the manifests need, each once.
	Blobs []Blob

	// Notes say what a person should know, in whole sentences.
	Notes []string

	Duration time.Duration
}

// Blob is a blob of a Result.
type Blob struct {
	oci.Descriptor
	State State // Copied, Skipped or Mounted; of a copy that failed also Waiting
}

// Count returns how many blobs are in a state, and how many bytes they have.
func (r Result) Count(s State) (blobs int, bytes int64) {
	for _, b := range r.Blobs {
		if b.State == s {
			blobs++
			bytes += b.Size
		}
	}
	return blobs, bytes
}

// Copy copies an image and what it needs. When it has returned nil, the image is
// complete in the target, as durable as what the target acknowledges. When it
// fails, the target has no new tag, and what has arrived stays and is not sent
// again by the next Copy. The Result says how far it came also then.
//
// Blobs are verified on their way and by the target. A blob that an earlier run
// had begun to send is verified by the target only.
//
// Errors: those of the source and the target, which say which of the two they
// are of; ErrManifestUnknown if a platform isn't there; ErrManifestInvalid if
// there are more manifests than memory is for.
func Copy(ctx context.Context, dst Target, src Source, opts Options) (Result, error) {
	start := time.Now()
	if err := oci.CheckRepository(dst.Repo); err != nil {
		return Result{}, err
	}
	for _, tag := range dst.Tags {
		if err := oci.CheckTag(tag); err != nil {
			return Result{}, err
		}
	}
	c := &copier{src: src, dst: dst, opts: opts.withDefaults()}
	c.opts.Progress = serialized(c.opts.Progress)
	p, err := c.plan(ctx)
	if err != nil {
		return Result{}, err
	}
	c.result = Result{Root: p.root.manifest.Descriptor, Tags: dst.Tags, Platforms: p.platforms, Notes: p.notes}
	if !c.opts.DryRun {
		c.state = openState(c.opts.StateDir, dst, c.opts.Log)
		defer c.state.close()
	}
	err = c.blobs(ctx, p)
	if err == nil {
		err = c.manifests(ctx, p)
	}
	c.result.Duration = time.Since(start)
	if err != nil {
		return c.result, err
	}
	c.report(Progress{Stage: StageDone})
	copied, bytes := c.result.Count(Copied)
	c.opts.Log.InfoContext(ctx, "image copied", "source", src.Repo, "reference", src.Reference, "repository", dst.Repo, "tags", dst.Tags,
		"digest", c.result.Root.Digest, "manifests", c.result.Manifests, "blobs", copied, "bytes", bytes, "dry", c.opts.DryRun, "duration", c.result.Duration)
	return c.result, nil
}

// copier is one run of Copy.
type copier struct {
	src    Source
	dst    Target
	opts   Options
	state  *state // nil with DryRun
	total  Progress
	result Result // its Blobs are each written by the blob's own goroutine
}

// manifests pushes the manifests in the plan's order, and then the tags.
func (c *copier) manifests(ctx context.Context, p *plan) error {
	c.report(Progress{Stage: StageManifests})
	for _, n := range p.order {
		if n.referrer {
			c.result.Referrers++
		}
		desc := n.manifest.Descriptor
		there, err := c.has(ctx, desc.Digest.String(), desc.Digest)
		if err != nil {
			return err
		}
		if there {
			c.result.ManifestsSkipped++
		} else {
			c.result.Manifests++
			// A tag's push is the digest's too, and comes last.
			last := n == p.order[len(p.order)-1] && n == p.root && desc.Digest.Algorithm() == oci.SHA256
			if !last || len(c.dst.Tags) == 0 {
				if err := c.pushManifest(ctx, n, desc.Digest.String()); err != nil {
					return err
				}
			}
		}
		for _, tag := range n.tags {
			if _, err := c.tag(ctx, n, tag); err != nil {
				return err
			}
		}
	}
	for _, tag := range c.dst.Tags {
		moved, err := c.tag(ctx, p.root, tag)
		if err != nil {
			return err
		}
		if moved {
			c.result.Moved = append(c.result.Moved, tag)
		}
	}
	return nil
}

// tag points a tag of the target at a manifest, and reports whether it didn't.
func (c *copier) tag(ctx context.Context, n *node, tag string) (moved bool, err error) {
	there, err := c.has(ctx, tag, n.manifest.Descriptor.Digest)
	if err != nil || there {
		return false, err
	}
	return true, c.pushManifest(ctx, n, tag)
}

// has reports whether the target's reference is the manifest.
func (c *copier) has(ctx context.Context, reference string, digest oci.Digest) (bool, error) {
	desc, err := c.dst.Registry.ResolveManifest(ctx, c.dst.Repo, reference)
	switch {
	case err == nil:
		return desc.Digest == digest, nil
	case errors.Is(err, oci.ErrManifestUnknown), errors.Is(err, oci.ErrNameUnknown):
		return false, nil
	}
	return false, fmt.Errorf("looking for manifest %s in the target: %w", reference, err)
}

func (c *copier) pushManifest(ctx context.Context, n *node, reference string) error {
	if c.opts.DryRun {
		return nil
	}
	desc := n.manifest.Descriptor
	if _, err := c.dst.Registry.PushManifest(ctx, c.dst.Repo, reference, desc.MediaType, n.manifest.Content); err != nil {
		return fmt.Errorf("pushing manifest %s to the target as %s: %w", desc.Digest, reference, err)
	}
	return nil
}
