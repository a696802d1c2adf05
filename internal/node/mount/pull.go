package mount

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"sluice/internal/artifact"
	"sluice/internal/blob"
	"sluice/internal/node/plane"
	"sluice/oci"
)

// subject is what an artifact is looked up for.
type subject struct {
	registry, repository string
	digest               oci.Digest // empty: whatever tag points to
	tag                  string     // only without a digest
}

// call is a pull under way, or one that failed not long ago.
type call struct {
	done     chan struct{} // closed when what follows is set
	image    oci.Digest
	err      error
	until    time.Time // until when err is the answer
	identity string    // of Options.Identity, when it began
}

// Outcome is what became of a pull.
type Outcome struct {
	Time      time.Time     `json:"time"`
	Reference string        `json:"reference"`
	Manifest  oci.Digest    `json:"manifest,omitempty"`
	Artifact  oci.Digest    `json:"artifact,omitempty"` // empty: it didn't stream
	Reason    Reason        `json:"reason,omitempty"`
	Message   string        `json:"message,omitempty"`
	Duration  time.Duration `json:"duration"`
	Requests  int64         `json:"requests"` // for content, as far as they were made by then
	Bytes     int64         `json:"bytes"`    // that had arrived by then
}

// PullCount counts pulls that ended in the same way since the start.
type PullCount struct {
	Reason Reason        `json:"reason,omitempty"` // empty: they stream
	Pulls  int64         `json:"pulls"`
	Time   time.Duration `json:"time"` // that all of them took
}

// Pull makes the image that ref names ready to be mounted. manifest is the
// digest of its manifest for this platform where the caller knows it; without
// it the registry is asked what ref points to.
//
// The error of an image that doesn't stream is a *NotStreaming. Either answer
// comes within Options.Decide plus Options.Fetch, is shared by concurrent
// callers and holds for a while: an image that is here needs no registry. That the
// registry refused this node holds only as long as the node has no other
// credentials.
func (m *Manager) Pull(ctx context.Context, ref string, manifest oci.Digest) (Image, error) {
	r, err := oci.ParseReference(ref)
	if err != nil {
		return Image{}, notStreaming(NoStreamingArtifact, "%w", err)
	}
	if err := m.ledger.OptedOut(r, manifest); err != nil {
		return Image{}, err
	}
	return m.obtain(ctx, r, manifest)
}

// obtain is Pull whoever opts out.
func (m *Manager) obtain(ctx context.Context, r oci.Reference, manifest oci.Digest) (Image, error) {
	s := subject{registry: r.Registry, repository: r.Repository, digest: manifest}
	if s.digest == "" {
		s.digest = r.Digest
	}
	if s.digest == "" {
		s.tag = r.Tag
	}
	img, c, err := m.pullOnce(ctx, r, s)
	if c == nil || reasonOf(err) != Unauthorized || c.identity == m.opts.Identity(s.registry, s.repository) {
		return img, err
	}
	m.mu.Lock()
	m.forgetCall(s, c)
	m.mu.Unlock()
	img, _, err = m.pullOnce(ctx, r, s)
	return img, err
}

// pullOnce is Pull with whatever answer there is. It returns the call whose answer
// that is, if the image wasn't here.
func (m *Manager) pullOnce(ctx context.Context, r oci.Reference, s subject) (Image, *call, error) {
	m.mu.Lock()
	if id, ok := m.known[s]; ok && !m.switched().Off {
		img := m.images[id]
		img.revive()
		m.mu.Unlock()
		public, err := m.ready(ctx, img, r.String())
		return public, nil, err
	}
	c, ok := m.calls[s]
	if !ok || c.over(time.Now()) {
		c = &call{done: make(chan struct{})}
		m.calls[s] = c
		m.mu.Unlock()
		// Not the caller's context: others may wait for the same answer, and
		// one who gave up will ask again.
		m.background.Go(func(background context.Context) { m.run(follow(background, ctx), c, r, s) })
	} else {
		m.mu.Unlock()
	}
	public, err := m.wait(ctx, c)
	return public, c, err
}

// forgetCall forgets a call, unless there's another one by now. The caller has
// m.mu.
func (m *Manager) forgetCall(s subject, c *call) {
	if m.calls[s] == c {
		delete(m.calls, s)
	}
}

// ended reports whether a call has its answer.
func (c *call) ended() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

// over reports whether a finished call's answer is too old to be given again.
func (c *call) over(now time.Time) bool { return c.ended() && now.After(c.until) }

// wait returns a call's answer.
func (m *Manager) wait(ctx context.Context, c *call) (Image, error) {
	bound := time.NewTimer(m.opts.Decide + m.opts.Fetch + time.Second)
	defer bound.Stop()
	select {
	case <-c.done:
	case <-ctx.Done():
		return Image{}, context.Cause(ctx)
	case <-bound.C:
		return Image{}, notStreaming(RegistryUnavailable, "no answer after %v", m.opts.Decide+m.opts.Fetch)
	}
	if c.err != nil {
		return Image{}, c.err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	img, ok := m.images[c.image]
	if !ok {
		return Image{}, fmt.Errorf("image %s: %w", c.image, ErrUnknownImage)
	}
	return img.public(), nil
}

// ready makes sure that an image which is here, by the name ref, can be mounted.
func (m *Manager) ready(ctx context.Context, img *image, ref string) (Image, error) {
	m.watchReads(ctx, img, ref)
	if _, err := m.Attach(ctx, img.id, Merged, ""); err != nil {
		return Image{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return img.public(), nil
}

// run makes a call's answer.
func (m *Manager) run(ctx context.Context, c *call, ref oci.Reference, s subject) {
	began, caller := time.Now(), ctx
	ctx, span := m.opts.Tracer.Start(ctx, "pull", imageAttribute(ref.String()))
	if !sampled(caller) {
		caller = ctx
	}
	c.identity = m.opts.Identity(s.registry, s.repository)
	img, err := m.pull(ctx, ref, s)
	if err == nil {
		m.watchReads(caller, img, ref.String())
		_, err = m.Attach(ctx, img.id, Merged, "")
	}
	end(span, err)
	o := Outcome{Time: began, Reference: ref.String(), Manifest: s.digest, Duration: time.Since(began)}
	if err != nil {
		c.err = err
		o.Reason, o.Message = reasonOf(err), err.Error()
	} else {
		c.image, o.Artifact = img.id, img.id
		o.Requests, o.Bytes = img.counter.Requests.Load(), img.counter.Bytes.Load()
	}
	if ctx.Err() == nil { // it's not the daemon that ends
		m.ledger.Note(o)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	c.until = time.Now().Add(m.opts.Remember)
	if err == nil && s.digest != "" {
		m.forgetCall(s, c) // m.known has it; where a tag points to, only this call
	}
	close(c.done)
}

// logOutcome writes the line that each pull has in the log. That an image has no
// artifact is nothing to warn of.
func (m *Manager) logOutcome(o Outcome) {
	log := m.log.With("image", o.Reference, "manifest", o.Manifest, "duration", o.Duration)
	switch o.Reason {
	case "":
		log.Info("image streams", "artifact", o.Artifact, "requests", o.Requests, "bytes", o.Bytes)
	case NoStreamingArtifact, ConversionPending, Disabled:
		log.Info("image is pulled the ordinary way", "reason", o.Reason, "error", o.Message, "remedy", o.Reason.Remedy())
	default:
		log.Warn("image is pulled the ordinary way", "reason", o.Reason, "error", o.Message, "remedy", o.Reason.Remedy())
	}
}

// refused returns why nothing of a registry is streamed here, nil if it may be.
func (m *Manager) refused(registry string) error {
	if err := m.switchedOff(); err != nil {
		return err
	}
	if len(m.opts.From) > 0 && !slices.Contains(m.opts.From, registry) {
		return notStreaming(Disabled, "this node doesn't stream from %s, only from %q", registry, m.opts.From)
	}
	if err := unusable(m.opts.Plane); err != nil {
		return &NotStreaming{Reason: PlaneUnavailable, Err: err}
	}
	return nil
}

// registry returns the registry that images of a repository are streamed from, or
// a *NotStreaming.
func (m *Manager) registry(host, repository string) (Registry, error) {
	if err := m.refused(host); err != nil {
		return nil, err
	}
	reg, err := m.opts.Registry(host, repository)
	if err != nil {
		return nil, notStreaming(RegistryUnavailable, "registry %s: %w", host, err)
	}
	return reg, nil
}

// pull finds an image's artifact and brings home what a mount needs.
func (m *Manager) pull(ctx context.Context, ref oci.Reference, s subject) (*image, error) {
	reg, err := m.registry(s.registry, s.repository)
	if err != nil {
		return nil, err
	}
	found, err := m.find(ctx, reg, ref, s)
	m.noteRegistry(s.registry, err)
	if err != nil {
		return nil, err
	}
	o := origin{Reference: ref.String(), Registry: s.registry, Repository: s.repository, Subject: found.manifest.Subject.Digest}
	ctx, cancel := context.WithTimeoutCause(ctx, m.opts.Fetch, fmt.Errorf("metadata and chunk table didn't arrive within %v", m.opts.Fetch))
	defer cancel()
	img, err := m.fetch(ctx, found, o)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.known[o.subject()] = img.id
	if s.digest != "" {
		m.known[s] = img.id // an index was found for a platform's manifest
	}
	return img, nil
}

// found is an artifact's manifest, checked as far as it goes by itself.
type found struct {
	desc     oci.Descriptor
	content  []byte
	manifest *artifact.Manifest
}

// againAfter is the pause before what failed is tried once more.
const againAfter = 100 * time.Millisecond

// again calls get, and once more if it failed in a way that may pass. The
// client of a registry repeats requests that weren't answered; this is for
// answers that were cut or damaged, or came from something else in between. One
// of those must not make an image of gigabytes come the ordinary way, nor a
// mirror that sends something else.
func again[T any](ctx context.Context, get func(context.Context) (T, error)) (T, error) {
	v, err := get(ctx)
	if err == nil || !mayPass(err) {
		return v, err
	}
	pause := time.NewTimer(againAfter)
	defer pause.Stop()
	select {
	case <-pause.C:
		if reasonOf(err) == IntegrityFailure {
			ctx = blob.Doubt(ctx)
		}
		return get(ctx)
	case <-ctx.Done():
		return v, err
	}
}

// mayPass reports whether an error of a registry may not be the answer next time.
func mayPass(err error) bool {
	r := reasonOf(err)
	return (r == RegistryUnavailable || r == IntegrityFailure) && !errors.Is(err, oci.ErrTooManyRequests)
}

// reasonOf is the reason that err carries, or that an error of a registry means.
func reasonOf(err error) Reason {
	if r := ReasonOf(err); r != "" {
		return r
	}
	return reasonFor(err)
}

// reasonFor classifies an error of a registry.
func reasonFor(err error) Reason {
	var unsupported *plane.UnsupportedError
	switch {
	case errors.As(err, &unsupported):
		return PlaneUnavailable
	case errors.Is(err, oci.ErrUnauthorized), errors.Is(err, oci.ErrDenied):
		return Unauthorized
	case errors.Is(err, oci.ErrUnsupported):
		return RegistryUnsupported
	case errors.Is(err, oci.ErrDigestInvalid), errors.Is(err, oci.ErrSizeInvalid), errors.Is(err, oci.ErrManifestInvalid):
		return IntegrityFailure
	case errors.Is(err, oci.ErrNameUnknown), errors.Is(err, oci.ErrManifestUnknown):
		return NoStreamingArtifact
	}
	return RegistryUnavailable
}

// registryError makes the error of a registry's answer.
func registryError(doing string, err error) error {
	var n *NotStreaming
	if errors.As(err, &n) {
		return err
	}
	return &NotStreaming{Reason: reasonFor(err), Err: fmt.Errorf("%s: %w", doing, err)}
}
