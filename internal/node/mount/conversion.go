package mount

import (
	"context"
	"errors"
	"time"

	"sluice/oci"
)

// Conversion is what a registry says of converting an image; the zero value, that
// it wasn't asked to.
type Conversion struct {
	Pending bool   // it's going on, or will
	State   string // in the registry's words
}

const (
	// askConversion bounds how long the ordinary pull of an image without an
	// artifact is held up to learn whether it's being converted.
	askConversion = time.Second

	// muteLife is how long a registry that can't say so isn't asked again.
	muteLife = time.Hour
)

// explain adds to the error of an image that has no artifact what the registry
// says of making one, for any of several digests. Images that stream don't wait
// for it.
func (m *Manager) explain(ctx context.Context, s subject, subjects []oci.Digest, err error) error {
	if m.opts.Conversion == nil || ReasonOf(err) != NoStreamingArtifact || ctx.Err() != nil {
		return err
	}
	m.mu.Lock()
	mute := time.Now().Before(m.mute[s.registry])
	m.mu.Unlock()
	if mute {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, askConversion)
	defer cancel()
	for _, digest := range subjects {
		c, cerr := m.opts.Conversion(ctx, s.registry, s.repository, digest)
		switch {
		case errors.Is(cerr, oci.ErrUnsupported):
			m.mu.Lock()
			if len(m.mute) < maxStreaming {
				m.mute[s.registry] = time.Now().Add(muteLife)
			}
			m.mu.Unlock()
			return err
		case cerr != nil:
			m.log.DebugContext(ctx, "it isn't known whether an image is being converted", "registry", s.registry, "repository", s.repository, "manifest", digest, "error", cerr)
		case c.Pending:
			return notStreaming(ConversionPending, "the registry is converting %s: %s", digest, c.State)
		case c.State != "":
			var n *NotStreaming
			errors.As(err, &n)
			err = notStreaming(NoStreamingArtifact, "%w; its last conversion: %s", n.Err, c.State)
		}
	}
	return err
}
