package mount

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"sluice/oci"
)

// Judges reports whether it's this node's business to say of an image of a
// registry, spelled as in references, that it streams, or why not. It is for the
// registries that Options.From names. Without such, it is for images that stream,
// and for those of registries that have streaming artifacts: this node has been
// given one since it started, or has one still, or was told that one is being
// made. Whoever runs an image from elsewhere doesn't expect streaming, and isn't
// to be bothered with it.
func (m *Manager) Judges(registry string, streams bool) bool {
	if len(m.opts.From) > 0 {
		return slices.Contains(m.opts.From, registry)
	}
	if streams {
		return true
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.streaming[registry] {
		return true
	}
	for _, img := range m.images {
		if slices.ContainsFunc(img.origins, func(o origin) bool { return o.Registry == registry }) {
			return true
		}
	}
	return false
}

// maxStreaming bounds the registries that are known to have artifacts.
const maxStreaming = 1024

// noteRegistry remembers that a registry has streaming artifacts, if the end of a
// look-up says so.
func (m *Manager) noteRegistry(registry string, err error) {
	switch ReasonOf(err) {
	case "": // it streams, or the registry wasn't asked
		if err != nil {
			return
		}
	case ConversionPending, PlatformUnsupported, IntegrityFailure:
	default:
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.streaming) < maxStreaming {
		m.streaming[registry] = true
	}
}

// LastPull returns what became of the last pull of an image by the name ref, as
// far as Status.Pulls goes back.
func (m *Manager) LastPull(ref string) (Outcome, bool) {
	return m.ledger.LastPull(ref)
}

// OptOut has every Pull of an image by the name ref fail with reason Disabled and
// the text why, until end is called: whoever pulls it now doesn't want it
// streamed. containerd doesn't say for which pull it asks about a layer, so
// another pull of the same name at the same time goes the ordinary way, too. An
// image whose layers containerd has already, streamed, isn't asked about, and is
// shared. Pulls that end later are asked anew.
func (m *Manager) OptOut(ref, why string) (end func()) { return m.ledger.OptOut(ref, why) }

// What returns Message without the reason, which is said apart.
func (o Outcome) What() string {
	return strings.TrimPrefix(o.Message, string(o.Reason)+": ")
}

// Arrived is an image with how much of its content is here, about, in bytes. It
// needs no registry.
func (m *Manager) Arrived(ctx context.Context, id oci.Digest) (_ Image, here, size int64, err error) {
	img := m.lookup(id)
	if img == nil {
		return Image{}, 0, 0, fmt.Errorf("image %s: %w", id, ErrUnknownImage)
	}
	table, err := m.openTable(ctx, img)
	if err != nil {
		return Image{}, 0, 0, err
	}
	complete := true
	for _, dev := range table.Devices {
		u, _ := m.opts.Cache.Layer(dev.Key)
		size += dev.ContentSize
		here += min(u.Content, dev.ContentSize)
		complete = complete && u.Complete
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if complete {
		here = size // sparse files have less than their size
	}
	return img.public(), here, size, nil
}
