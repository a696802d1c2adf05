package disks

import (
	"context"
	"slices"
	"sync"
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
	m.background(func(ctx context.Context) {
		defer func() { <-m.expecting }()
		if _, err := m.Pull(ctx, ref, ""); err != nil {
			m.log.DebugContext(ctx, "an image can't be looked up ahead of its pull", "image", ref, "error", err)
		}
	})
}

// optOut is who wants an image pulled the ordinary way, now.
type optOut struct {
	pulls int    // of this kind under way
	why   string // of the last
	noted bool   // among the outcomes
}

// OptOut has every Pull of an image by the name ref fail with reason Disabled and the
// text why, until end is called. As with mount.Manager.OptOut, others who pull the
// same name meanwhile go the ordinary way, too.
func (m *Manager) OptOut(ref, why string) (end func()) {
	r, err := oci.ParseReference(ref)
	if err != nil {
		return func() {} // such an image isn't mounted
	}
	key := r.String()
	m.mu.Lock()
	defer m.mu.Unlock()
	o := m.optOuts[key]
	if o == nil {
		o = &optOut{}
		m.optOuts[key] = o
	}
	o.pulls++
	o.why, o.noted = why, false
	return sync.OnceFunc(func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if o.pulls--; o.pulls == 0 {
			delete(m.optOuts, key)
		}
	})
}

// optedOut is the error of a pull by a name that somebody pulls the ordinary way now,
// nil if nobody does.
func (m *Manager) optedOut(r oci.Reference, manifest oci.Digest) error {
	m.mu.Lock()
	o := m.optOuts[r.String()]
	if o == nil {
		m.mu.Unlock()
		return nil
	}
	err := notStreaming(mount.Disabled, "%s", o.why)
	first := !o.noted
	o.noted = true
	m.mu.Unlock()
	if first {
		m.note(mount.Outcome{Time: time.Now(), Reference: r.String(), Manifest: manifest, Reason: mount.Disabled, Message: err.Error()})
	}
	return err
}

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
func (m *Manager) LastPull(ref string) (mount.Outcome, bool) {
	r, err := oci.ParseReference(ref)
	if err != nil {
		return mount.Outcome{}, false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, o := range slices.Backward(m.recent) {
		if o.Reference == r.String() {
			return o, true
		}
	}
	return mount.Outcome{}, false
}

const (
	// askPresent bounds a look-up that nobody waits for.
	askPresent = 5 * time.Second

	// presentLife is how long its answer is given again, maxPresent how many are kept.
	presentLife = 10 * time.Minute
	maxPresent  = 1024
)

// presence is why an image that is here isn't mounted from a share, and until when that
// is the answer.
type presence struct {
	err   error
	until time.Time
}

// WhyPresent is a *mount.NotStreaming that says why an image by the name ref isn't
// mounted from a share that is on the node already, pulled the ordinary way, when no
// pull of it is remembered: as it would be if it were pulled now, or AlreadyPresent if
// it would be mounted, or the registry doesn't say. It answers within five seconds, and
// the same for ten minutes.
func (m *Manager) WhyPresent(ctx context.Context, ref string) error {
	m.mu.Lock()
	p, ok := m.present[ref]
	m.mu.Unlock()
	if ok && time.Now().Before(p.until) {
		return p.err
	}
	ctx, cancel := context.WithTimeout(ctx, askPresent)
	defer cancel()
	err := m.lookUp(ctx, ref)
	switch r := mount.ReasonOf(err); r {
	case "":
		err = notStreaming(mount.AlreadyPresent, "it was pulled when its layers couldn't be mounted; they could be now")
	case mount.NoStreamingArtifact, mount.ConversionPending, mount.PlatformUnsupported, mount.Disabled, mount.PlaneUnavailable:
	default:
		err = notStreaming(mount.AlreadyPresent, "it was pulled when its layers couldn't be mounted; whether they could be now isn't known: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.present) >= maxPresent {
		clear(m.present)
	}
	m.present[ref] = presence{err, time.Now().Add(presentLife)}
	return err
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
