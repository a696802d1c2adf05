package mount

import (
	"context"
	"time"

	"sluice/oci"
)

// askPresent bounds a look-up that nobody waits for.
const askPresent = 5 * time.Second

// WhyPresent is a *NotStreaming that says why an image by the name ref isn't
// streamed that is on the node already, pulled the ordinary way, when no pull of
// it is remembered: as it would be if it were pulled now, or AlreadyPresent if it
// would stream, or the registry doesn't say. It answers within five seconds, and
// the same for ten minutes.
func (m *Manager) WhyPresent(ctx context.Context, ref string) error {
	return m.ledger.Present(ctx, ref, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, askPresent)
		defer cancel()
		err := m.lookUp(ctx, ref)
		switch r := ReasonOf(err); {
		case err == nil:
			return notStreaming(AlreadyPresent, "it was pulled when it didn't stream; it would now")
		case r == NoStreamingArtifact, r == ConversionPending, r == PlatformUnsupported, r == Disabled, r == PlaneUnavailable:
			return err
		}
		return notStreaming(AlreadyPresent, "it was pulled when it didn't stream; whether it would now isn't known: %w", err)
	})
}

// lookUp looks for an artifact of what ref names, as find does, but brings nothing
// home. Nil: there's one.
func (m *Manager) lookUp(ctx context.Context, ref string) error {
	r, err := oci.ParseReference(ref)
	if err != nil {
		return err
	}
	reg, err := m.registry(r.Registry, r.Repository)
	if err != nil {
		return err
	}
	desc, err := reg.ResolveManifest(ctx, r.Repository, r.Target())
	if err != nil {
		return registryError("resolve "+r.String(), err)
	}
	subjects := []oci.Digest{desc.Digest}
	var others []string
	for i := 0; i < len(subjects); i++ {
		mine, of, err := m.candidates(ctx, reg, r.Repository, subjects[i])
		if err != nil || len(mine) > 0 {
			return err
		}
		others = append(others, of...)
		if i == 0 && oci.IsIndex(desc.MediaType) {
			manifest, err := m.platformManifest(ctx, reg, r)
			if err != nil {
				return err
			}
			subjects = append(subjects, manifest.Descriptor.Digest)
		}
	}
	if len(others) > 0 {
		return notStreaming(PlatformUnsupported, "%s has streaming artifacts for %q, none for %s", r, others, platformName(m.opts.Platform))
	}
	err = notStreaming(NoStreamingArtifact, "%s has no referrer of type %s", r, oci.ArtifactTypeStreaming)
	return m.explain(ctx, subject{registry: r.Registry, repository: r.Repository}, subjects, err)
}
