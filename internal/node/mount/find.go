package mount

import (
	"context"
	"errors"
	"fmt"

	"sluice/internal/artifact"
	"sluice/oci"
)

// Bounds of a look-up: a repository in which anybody may write referrers must
// not be able to occupy a node.
const (
	maxReferrers  = 256 // read of a listing
	maxCandidates = 4   // manifests looked into
)

// find looks for the image's streaming artifact for this node's platform.
func (m *Manager) find(ctx context.Context, reg Registry, ref oci.Reference, s subject) (*found, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, m.opts.Decide, fmt.Errorf("the registry didn't say within %v whether the image has a streaming artifact", m.opts.Decide))
	defer cancel()
	f, err := try(ctx, m, "find artifact", func(ctx context.Context) (*found, error) { return m.findFor(ctx, reg, ref, s) })
	if err != nil && ctx.Err() != nil {
		// A registry's client may not report why its context ended.
		return nil, notStreaming(RegistryUnavailable, "%w", errors.Join(context.Cause(ctx), err))
	}
	return f, err
}

func (m *Manager) findFor(ctx context.Context, reg Registry, ref oci.Reference, s subject) (*found, error) {
	if s.digest == "" {
		desc, err := reg.ResolveManifest(ctx, s.repository, ref.Target())
		if err != nil {
			return nil, registryError("resolve "+ref.String(), err)
		}
		f, err := m.findSubject(ctx, reg, s.repository, desc.Digest)
		return f, m.explain(ctx, s, []oci.Digest{desc.Digest}, err)
	}
	// What the reference names may be an index whose artifacts know only it.
	// The question is asked at the same time, so that the common "there is
	// none" takes no longer.
	type resolved struct {
		desc oci.Descriptor
		err  error
	}
	other := make(chan resolved, 1)
	if ref.Target() != s.digest.String() {
		go func() {
			desc, err := reg.ResolveManifest(ctx, s.repository, ref.Target())
			other <- resolved{desc, err}
		}()
	} else {
		other <- resolved{oci.Descriptor{Digest: s.digest}, nil}
	}
	f, err := m.findSubject(ctx, reg, s.repository, s.digest)
	if err == nil || ReasonOf(err) != NoStreamingArtifact {
		return f, err
	}
	o := <-other
	if o.err != nil || !oci.IsIndex(o.desc.MediaType) || o.desc.Digest == s.digest {
		// A tag that moved on names another image.
		return nil, m.explain(ctx, s, []oci.Digest{s.digest}, err)
	}
	if f, ierr := m.findSubject(ctx, reg, s.repository, o.desc.Digest); ierr == nil || ReasonOf(ierr) != NoStreamingArtifact {
		return f, ierr
	}
	return nil, m.explain(ctx, s, []oci.Digest{s.digest, o.desc.Digest}, err)
}

// findSubject looks for the artifact of one manifest or index.
func (m *Manager) findSubject(ctx context.Context, reg Registry, repo string, subject oci.Digest) (*found, error) {
	candidates, others, err := m.candidates(ctx, reg, repo, subject)
	if err != nil {
		return nil, err
	}
	if len(candidates) == 0 && len(others) > 0 {
		return nil, notStreaming(PlatformUnsupported, "%s has streaming artifacts for %q, none for %s", subject, others, platformName(m.opts.Platform))
	}
	if len(candidates) == 0 {
		return nil, notStreaming(NoStreamingArtifact, "%s has no referrer of type %s in repository %s", subject, oci.ArtifactTypeStreaming, repo)
	}
	// One that is broken must not hide another that isn't.
	var errs []error
	for _, desc := range candidates[:min(len(candidates), maxCandidates)] {
		f, err := m.open(ctx, reg, repo, desc, subject)
		if err == nil {
			return f, nil
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	return nil, registryError("streaming artifacts of "+subject.String(), errors.Join(errs...))
}

// candidates lists the referrers that may be for this platform, and the names
// of the platforms of those that aren't.
func (m *Manager) candidates(ctx context.Context, reg Registry, repo string, subject oci.Digest) (mine []oci.Descriptor, others []string, err error) {
	n := 0
	for desc, err := range reg.Referrers(ctx, repo, subject, oci.ArtifactTypeStreaming) {
		if err != nil {
			return nil, nil, registryError("list the referrers of "+subject.String(), err)
		}
		if n++; n > maxReferrers {
			m.log.WarnContext(ctx, "image has too many referrers, the rest is ignored", "repository", repo, "subject", subject, "limit", maxReferrers)
			break
		}
		// Registries may ignore the filter.
		if desc.ArtifactType != "" && desc.ArtifactType != oci.ArtifactTypeStreaming {
			continue
		}
		p := oci.Platform{
			OS:           desc.Annotations[artifact.AnnotationOS],
			Architecture: desc.Annotations[artifact.AnnotationArch],
			Variant:      desc.Annotations[artifact.AnnotationVariant],
		}
		// Without annotations in the listing, the manifest has them.
		if p.OS != "" && !m.runs(p) {
			others = append(others, platformName(p))
			continue
		}
		mine = append(mine, desc)
	}
	return mine, others, nil
}

// open gets one artifact's manifest and checks that it is what was asked for.
func (m *Manager) open(ctx context.Context, reg Registry, repo string, desc oci.Descriptor, subject oci.Digest) (*found, error) {
	if _, err := oci.ParseDigest(desc.Digest.String()); err != nil {
		return nil, registryError("a referrer of "+subject.String(), err)
	}
	doing := "streaming artifact " + desc.Digest.String()
	got, err := reg.GetManifest(ctx, repo, desc.Digest.String())
	if err != nil {
		return nil, registryError(doing, err)
	}
	if len(got.Content) > oci.MaxManifestSize || desc.Digest.Algorithm().FromBytes(got.Content) != desc.Digest {
		return nil, notStreaming(IntegrityFailure, "%s: its content of %d bytes doesn't match", doing, len(got.Content))
	}
	manifest, err := artifact.ParseManifest(got.Content)
	if err != nil {
		return nil, notStreaming(IntegrityFailure, "%s: %w", doing, err)
	}
	if manifest.Subject.Digest != subject {
		return nil, notStreaming(IntegrityFailure, "%s is listed as a referrer of %s, its subject is %s", doing, subject, manifest.Subject.Digest)
	}
	if !m.runs(manifest.Platform) {
		return nil, notStreaming(PlatformUnsupported, "%s is for %s, this node is %s", doing, platformName(manifest.Platform), platformName(m.opts.Platform))
	}
	return &found{desc: got.Descriptor, content: got.Content, manifest: manifest}, nil
}

// runs reports whether images of platform p run on this node. Variants are
// compared only where both say one: an image that names none runs on all.
func (m *Manager) runs(p oci.Platform) bool {
	mine := m.opts.Platform
	return p.OS == mine.OS && p.Architecture == mine.Architecture &&
		(p.Variant == "" || mine.Variant == "" || p.Variant == mine.Variant)
}

func platformName(p oci.Platform) string {
	name := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		name += "/" + p.Variant
	}
	return name
}
