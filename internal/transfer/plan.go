package transfer

import (
	"context"
	"errors"
	"fmt"

	"sluice/oci"
)

// Bounds of what one copy holds in memory.
const (
	maxManifests     = 10_000
	maxManifestBytes = 64 << 20 // of all manifests together
	maxDepth         = 8        // of indexes in indexes and referrers of referrers
)

// plan is all that is to be copied.
type plan struct {
	root      *node
	order     []*node // the manifests: what one needs comes before it, what refers to it after it
	blobs     []oci.Descriptor
	platforms []oci.Platform
	notes     []string

	nodes map[oci.Digest]*node
	sizes map[oci.Digest]int64 // of the blobs
	bytes int64                // of the manifests
}

// node is a manifest to be copied.
type node struct {
	manifest oci.Manifest
	info     *oci.ManifestInfo
	tags     []string // that cosign keeps it under
	referrer bool     // it, or what it is a part of, refers to another
}

func (p *plan) note(format string, args ...any) {
	p.notes = append(p.notes, fmt.Sprintf(format, args...))
}

// plan reads the manifests of the source.
func (c *copier) plan(ctx context.Context) (*plan, error) {
	p := &plan{nodes: make(map[oci.Digest]*node), sizes: make(map[oci.Digest]int64)}
	m, err := c.src.Registry.GetManifest(ctx, c.src.Repo, c.src.Reference)
	if err != nil {
		return nil, fmt.Errorf("reading the image from the source: %w", err)
	}
	root, made, err := c.choose(ctx, p, m)
	if err != nil {
		return nil, err
	}
	// Nothing refers to an index that has only just been made.
	if p.root, err = c.add(ctx, p, root, addition{alone: made}); err != nil {
		return nil, err
	}
	if made && c.opts.Referrers {
		p.note("Referrers of the original index were not copied, because they name its digest.")
	}
	return p, nil
}

// addition is how a manifest becomes part of a plan.
type addition struct {
	depth    int
	referrer bool
	alone    bool // without its own referrers, but with those of what it needs
}

// read reads the manifest that a descriptor of another names.
func (c *copier) read(ctx context.Context, desc oci.Descriptor) (oci.Manifest, error) {
	m, err := c.src.Registry.GetManifest(ctx, c.src.Repo, desc.Digest.String())
	if err != nil {
		return m, fmt.Errorf("reading manifest %s from the source: %w", desc.Digest, err)
	}
	if int64(len(m.Content)) != desc.Size {
		return m, oci.ErrManifestInvalid.Withf("manifest %s of the source has %d bytes, and its descriptor says %d", desc.Digest, len(m.Content), desc.Size)
	}
	// Who refers to it decides how it is to be understood.
	m.Descriptor = oci.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size}
	return m, nil
}

// add adds a manifest and all that it needs, then its referrers if they are
// wanted.
func (c *copier) add(ctx context.Context, p *plan, m oci.Manifest, a addition) (*node, error) {
	digest := m.Descriptor.Digest
	if n := p.nodes[digest]; n != nil {
		return n, nil
	}
	if digest.Algorithm().FromBytes(m.Content) != digest {
		return nil, oci.ErrDigestInvalid.Withf("manifest %s of the source has another content", digest)
	}
	p.bytes += int64(len(m.Content))
	switch {
	case len(p.nodes) >= maxManifests || p.bytes > maxManifestBytes:
		return nil, oci.ErrManifestInvalid.Withf("the image has more than %d manifests, or %d MiB of them: copy its parts one by one", maxManifests, maxManifestBytes>>20)
	case a.depth > maxDepth:
		return nil, oci.ErrManifestInvalid.Withf("manifest %s: more than %d levels of indexes and referrers", digest, maxDepth)
	}
	info, err := oci.ParseManifestInfo(m.Content, m.Descriptor.MediaType)
	if err != nil {
		return nil, fmt.Errorf("manifest %s of the source: %w", digest, err)
	}
	n := &node{manifest: m, info: info, referrer: a.referrer}
	p.nodes[digest] = n
	for _, desc := range info.Manifests {
		child, err := c.read(ctx, desc)
		if errors.Is(err, oci.ErrManifestUnknown) {
			return nil, fmt.Errorf("index %s is not complete in the source: choose the platforms that are: %w", digest, err)
		}
		if err != nil {
			return nil, err
		}
		if _, err := c.add(ctx, p, child, addition{depth: a.depth + 1, referrer: a.referrer}); err != nil {
			return nil, err
		}
	}
	if err := p.addBlobs(info.Blobs); err != nil {
		return nil, fmt.Errorf("manifest %s of the source: %w", digest, err)
	}
	if k := len(info.Foreign); k > 0 {
		p.note("Manifest %s has %d layers that are kept elsewhere; they were not copied, and it still says where they are.", digest, k)
	}
	p.order = append(p.order, n)
	if c.opts.Referrers && !a.alone {
		return n, c.addReferrers(ctx, p, n, a)
	}
	return n, nil
}

// addBlobs adds blobs that the plan doesn't have yet.
func (p *plan) addBlobs(blobs []oci.Descriptor) error {
	for _, desc := range blobs {
		size, ok := p.sizes[desc.Digest]
		switch {
		case !ok:
			p.sizes[desc.Digest] = desc.Size
			p.blobs = append(p.blobs, oci.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size})
		case size != desc.Size:
			return oci.ErrManifestInvalid.Withf("blob %s has %d bytes here and %d elsewhere", desc.Digest, desc.Size, size)
		}
	}
	return nil
}
