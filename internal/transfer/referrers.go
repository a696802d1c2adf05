package transfer

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"

	"sluice/oci"
)

// referrerLister is what a source has whose referrers can be copied.
type referrerLister interface {
	Referrers(ctx context.Context, repo string, subject oci.Digest, artifactType string) iter.Seq2[oci.Descriptor, error]
}

// cosignTags are the suffixes of the tags in which cosign keeps signatures,
// attestations and SBOMs (sigstore, "Cosign Signature Specifications").
func cosignTags() []string { return []string{".sig", ".att", ".sbom"} }

// addReferrers adds what refers to a manifest.
func (c *copier) addReferrers(ctx context.Context, p *plan, n *node, a addition) error {
	subject := n.manifest.Descriptor.Digest
	next := addition{depth: a.depth + 1, referrer: true}
	if lister, ok := c.src.Registry.(referrerLister); ok {
		skipped, found := 0, 0
		for desc, err := range lister.Referrers(ctx, c.src.Repo, subject, "") {
			if err != nil {
				return fmt.Errorf("listing the referrers of %s in the source: %w", subject, err)
			}
			if found++; found > maxManifests {
				return oci.ErrManifestInvalid.Withf("%s has more than %d referrers", subject, maxManifests)
			}
			if desc.ArtifactType == oci.ArtifactTypeStreaming && !c.opts.Streaming {
				skipped++
				continue
			}
			if err := c.addReferrer(ctx, p, desc, subject, next); err != nil {
				return err
			}
		}
		if skipped > 0 {
			p.note("The streaming artifact of %s was not copied: the target's registry makes its own.", subject)
		}
	}
	for _, suffix := range cosignTags() {
		tag := strings.Replace(subject.String(), ":", "-", 1) + suffix
		m, err := c.src.Registry.GetManifest(ctx, c.src.Repo, tag)
		if errors.Is(err, oci.ErrManifestUnknown) || errors.Is(err, oci.ErrNameUnknown) {
			continue
		}
		if err != nil {
			return fmt.Errorf("reading %s from the source: %w", tag, err)
		}
		s, err := c.add(ctx, p, m, next)
		if err != nil {
			return err
		}
		s.tags = append(s.tags, tag)
	}
	return nil
}

// addReferrer adds one that the source lists.
func (c *copier) addReferrer(ctx context.Context, p *plan, desc oci.Descriptor, subject oci.Digest, a addition) error {
	m, err := c.read(ctx, desc)
	if errors.Is(err, oci.ErrManifestUnknown) {
		p.note("Referrer %s is listed by the source, but isn't there.", desc.Digest) // a tag's index may be older
		return nil
	}
	if err != nil {
		return err
	}
	info, err := oci.ParseManifestInfo(m.Content, m.Descriptor.MediaType)
	if err != nil {
		return fmt.Errorf("referrer %s of the source: %w", desc.Digest, err)
	}
	if info.Subject == nil || info.Subject.Digest != subject {
		p.note("Referrer %s was not copied: it doesn't refer to %s, as the source says.", desc.Digest, subject)
		return nil
	}
	if info.ArtifactType == oci.ArtifactTypeStreaming && !c.opts.Streaming {
		return nil // the source's list didn't tell its type
	}
	_, err = c.add(ctx, p, m, a)
	return err
}
