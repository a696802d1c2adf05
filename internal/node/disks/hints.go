package disks

import (
	"context"
	"slices"
	"time"

	"sluice/internal/node/mount"
	"sluice/oci"
)

// maxExpected bounds the images that are looked up ahead of their pull at a time.
const maxExpected = 8

// Expect tells that an image is about to be pulled, by the name ref: Pull then has its
// answer sooner. It returns at once, and is a hint: what fails is left to Pull.
func (m *Manager) Expect(ref string) {
	select {
	case m.expecting <- struct{}{}:
	default:
		return
	}
	m.background.Go(func(ctx context.Context) {
		defer func() { <-m.expecting }()
		if _, err := m.Pull(ctx, ref, ""); err != nil {
			m.log.DebugContext(ctx, "an image can't be looked up ahead of its pull", "image", ref, "error", err)
		}
	})
}

// OptOut has every Pull of an image by the name ref fail with reason Disabled and the
// text why, until end is called. As with mount.Manager.OptOut, others who pull the
// same name meanwhile go the ordinary way, too.
func (m *Manager) OptOut(ref, why string) (end func()) { return m.ledger.OptOut(ref, why) }

// Judges reports whether it's this node's business to say of an image of a registry,
// spelled as in references, that it is mounted, or why not: where it is, or where the
// registry has offered disks since the start, or an image that is here came from it.
func (m *Manager) Judges(registry string, streams bool) bool {
	if streams {
		return true
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.offers[registry] {
		return true
	}
	for _, img := range m.images {
		if slices.ContainsFunc(img.origins, func(o origin) bool { return o.Registry == registry }) {
			return true
		}
	}
	return false
}

// maxOffers bounds the registries that are known to have disks.
const maxOffers = 1024

// noteRegistry remembers that a registry has disks, if its answer says so.
func (m *Manager) noteRegistry(registry string, err error) {
	if r := mount.ReasonOf(err); err != nil && r != mount.ConversionPending && r != mount.PlatformUnsupported {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.offers) < maxOffers {
		m.offers[registry] = true
	}
}

// LastPull returns what became of the last pull of an image by the name ref, as far as
// Status.Pulls goes back.
func (m *Manager) LastPull(ref string) (mount.Outcome, bool) { return m.ledger.LastPull(ref) }

// askPresent bounds a look-up that nobody waits for.
const askPresent = 5 * time.Second

// WhyPresent is a *mount.NotStreaming that says why an image by the name ref isn't
// mounted from a share that is on the node already, pulled the ordinary way, when no
// pull of it is remembered: as it would be if it were pulled now, or AlreadyPresent if
// it would be mounted, or the registry doesn't say. It answers within five seconds, and
// the same for ten minutes.
func (m *Manager) WhyPresent(ctx context.Context, ref string) error {
	return m.ledger.Present(ctx, ref, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, askPresent)
		defer cancel()
		err := m.lookUp(ctx, ref)
		switch mount.ReasonOf(err) {
		case "":
			return notStreaming(mount.AlreadyPresent, "it was pulled when its layers couldn't be mounted; they could be now")
		case mount.NoStreamingArtifact, mount.ConversionPending, mount.PlatformUnsupported, mount.Disabled, mount.PlaneUnavailable:
			return err
		}
		return notStreaming(mount.AlreadyPresent, "it was pulled when its layers couldn't be mounted; whether they could be now isn't known: %w", err)
	})
}

// lookUp asks where the disks of what ref names are, but brings nothing home. Nil: they
// can be mounted.
func (m *Manager) lookUp(ctx context.Context, ref string) error {
	r, err := oci.ParseReference(ref)
	if err != nil {
		return notStreaming(mount.NoStreamingArtifact, "%w", err)
	}
	_, err = m.find(ctx, subject{registry: r.Registry, repository: r.Repository, digest: r.Digest, tag: r.Tag})
	return err
}
