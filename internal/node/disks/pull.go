package disks

import (
	"context"
	"errors"
	"fmt"
	"time"

	"sluice/internal/erofs"
	"sluice/internal/node/cache"
	"sluice/internal/node/mount"
	"sluice/internal/node/plane"
	"sluice/internal/node/smb"
	"sluice/internal/teleport/mountapi"
	"sluice/internal/vhd"
	"sluice/oci"
)

// subject is what disks are looked up for.
type subject struct {
	registry, repository string
	digest               oci.Digest // empty: whatever tag points to
	tag                  string     // only without a digest
}

func (s subject) repo() repoName { return repoName{s.registry, s.repository} }

// reference is what the registry is asked for.
func (s subject) reference() string {
	if s.digest != "" {
		return s.digest.String()
	}
	return s.tag
}

// call is a pull under way, or one that ended not long ago.
type call struct {
	done  chan struct{} // closed when what follows is set
	image oci.Digest
	err   error
	until time.Time // until when that is the answer
	who   string    // Options.Identity, when it began

	// Guarded by Manager.mu.
	waiters int    // who haven't used the answer yet
	kept    *image // for them
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

// over reports whether a call's answer is too old to be given again.
func (c *call) over(now time.Time) bool { return c.ended() && now.After(c.until) }

// Pull makes the image that ref names ready: its layers are mounted. manifest is the
// digest of its manifest for this platform where the caller knows it; without it the
// registry says what ref points to.
//
// The error of an image whose layers can't be mounted is a *mount.NotStreaming:
// ConversionPending while they are being expanded, RegistryUnavailable also where
// the share can't be reached. Either answer comes within Options.Decide plus
// Options.Fetch, is shared by concurrent callers and holds for a while: an image that
// is here needs no registry.
func (m *Manager) Pull(ctx context.Context, ref string, manifest oci.Digest) (mount.Image, error) {
	r, err := oci.ParseReference(ref)
	if err != nil {
		return mount.Image{}, notStreaming(mount.NoStreamingArtifact, "%w", err)
	}
	if err := m.ledger.OptedOut(r, manifest); err != nil {
		return mount.Image{}, err
	}
	s := subject{registry: r.Registry, repository: r.Repository, digest: manifest}
	if s.digest == "" {
		s.digest = r.Digest
	}
	if s.digest == "" {
		s.tag = r.Tag
	}
	var public mount.Image
	for range 2 {
		var c *call
		public, c, err = m.pullOnce(ctx, r, s)
		switch {
		case errors.Is(err, mount.ErrUnknownImage): // what was here of it isn't what it was
		case c != nil && mount.ReasonOf(err) == mount.Unauthorized && c.who != m.opts.Identity(s.registry, s.repository):
		default:
			return public, err
		}
		m.mu.Lock()
		if m.calls[s] == c {
			delete(m.calls, s)
		}
		m.mu.Unlock()
	}
	if errors.Is(err, mount.ErrUnknownImage) {
		err = notStreaming(mount.PlaneUnavailable, "what is stored of %s isn't what it was: look at the disk of %s", r, m.opts.Root)
	}
	return public, err
}

// pullOnce is Pull with what is here, or with whatever answer there is. It returns the
// call whose answer that is, if there was none here.
func (m *Manager) pullOnce(ctx context.Context, r oci.Reference, s subject) (mount.Image, *call, error) {
	m.mu.Lock()
	if img := m.images[m.known[s]]; img != nil {
		img.used, img.removed = time.Now(), false
		img.kept++
		m.mu.Unlock()
		defer m.unkeep(img)
		public, err := m.ready(ctx, img.id)
		return public, nil, err
	}
	c, ok := m.calls[s]
	if !ok || c.over(time.Now()) {
		c = &call{done: make(chan struct{}), waiters: 1}
		m.calls[s] = c
		m.mu.Unlock()
		// Not the caller's context: others may wait for the same answer, and one
		// who gave up will ask again.
		m.background.Go(func(ctx context.Context) { m.run(ctx, c, r, s) })
	} else {
		c.waiters++
		m.mu.Unlock()
	}
	defer m.left(c)
	bound := time.NewTimer(m.opts.Decide + m.opts.Fetch + time.Second)
	defer bound.Stop()
	select {
	case <-c.done:
	case <-ctx.Done():
		return mount.Image{}, nil, context.Cause(ctx)
	case <-bound.C:
		return mount.Image{}, nil, notStreaming(mount.RegistryUnavailable, "no answer within %v", m.opts.Decide+m.opts.Fetch)
	}
	if c.err != nil {
		return mount.Image{}, c, c.err
	}
	img, err := m.ready(ctx, c.image)
	return img, c, err
}

// unkeep tells that somebody who was about to use an image has it, or not.
func (m *Manager) unkeep(img *image) {
	m.mu.Lock()
	defer m.mu.Unlock()
	img.kept--
}

// left tells that one less waits for a call's answer.
func (m *Manager) left(c *call) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c.waiters--; c.waiters == 0 && c.kept != nil {
		c.kept.kept--
		c.kept = nil
	}
}

// ready returns an image that is here, with its layers mounted. If it isn't what it
// was, or was removed meanwhile, the error is mount.ErrUnknownImage.
func (m *Manager) ready(ctx context.Context, id oci.Digest) (mount.Image, error) {
	img, err := m.lookup(id)
	if err == nil {
		err = m.attachAll(ctx, img, "")
	}
	if err != nil {
		return mount.Image{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	img.used, img.removed = time.Now(), false
	return img.public(), nil
}

// run makes a call's answer.
func (m *Manager) run(ctx context.Context, c *call, ref oci.Reference, s subject) {
	began := time.Now()
	c.who = m.opts.Identity(s.registry, s.repository)
	requests, bytes := m.counter.Requests.Load(), m.counter.Bytes.Load()
	img, err := m.pull(ctx, ref, s)
	o := mount.Outcome{Time: began, Reference: ref.String(), Manifest: s.digest, Duration: time.Since(began)}
	if err != nil {
		c.err = err
		o.Reason, o.Message = mount.ReasonOf(err), err.Error()
	} else {
		c.image, o.Artifact, o.Manifest = img.id, img.id, img.record.Manifest
		o.Requests, o.Bytes = m.counter.Requests.Load()-requests, m.counter.Bytes.Load()-bytes
	}
	if ctx.Err() == nil { // it's not the daemon that ends
		m.ledger.Note(o)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case err != nil:
	case c.waiters > 0:
		c.kept = img
	default:
		img.kept--
	}
	c.until = time.Now().Add(m.opts.Remember)
	if err == nil && s.digest != "" {
		delete(m.calls, s) // m.known has it; where a tag points to, only this call
	}
	close(c.done)
}

// logOutcome writes the line that each pull has in the log. That the layers can't be
// mounted is nothing to warn of.
func (m *Manager) logOutcome(o mount.Outcome) {
	log := m.log.With("image", o.Reference, "manifest", o.Manifest, "duration", o.Duration)
	switch o.Reason {
	case "":
		log.Info("image is mounted from the share", "requests", o.Requests, "bytes", o.Bytes)
	case mount.NoStreamingArtifact, mount.ConversionPending, mount.Disabled, mount.RegistryUnsupported:
		log.Info("image is pulled the ordinary way", "reason", o.Reason, "error", o.Message)
	default:
		log.Warn("image is pulled the ordinary way", "reason", o.Reason, "error", o.Message)
	}
}

// pull asks where an image's disks are and brings home what mounting them needs. The
// image is kept.
func (m *Manager) pull(ctx context.Context, ref oci.Reference, s subject) (*image, error) {
	answer, err := m.find(ctx, s)
	m.noteRegistry(s.registry, err)
	if err != nil {
		return nil, err
	}
	rec, o, err := recordOf(answer)
	if err != nil {
		return nil, &mount.NotStreaming{Reason: mount.IntegrityFailure, Err: err}
	}
	o.Reference, o.Registry, o.Repository = ref.String(), s.registry, s.repository
	fctx, cancel := context.WithTimeoutCause(ctx, m.opts.Fetch, fmt.Errorf("what mounting %s needs didn't arrive from the share within %v", ref, m.opts.Fetch))
	defer cancel()
	img, err := m.fetch(fctx, rec, o, answer)
	if err != nil {
		if cause := context.Cause(fctx); cause != nil {
			err = errors.Join(cause, err)
		}
		return nil, &mount.NotStreaming{Reason: reasonFor(err), Err: fmt.Errorf("disks of %s: %w", ref, err)}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if s.digest != "" && m.images[img.id] == img {
		m.known[s] = img.id
	}
	return img, nil
}

// errElsewhere is why an image isn't mounted whose disks are in another region.
var errElsewhere = errors.New("its disks are in another region than this machine")

// find asks where an image's disks are.
func (m *Manager) find(ctx context.Context, s subject) (mountapi.Mount, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, m.opts.Decide, fmt.Errorf("the registry didn't say within %v where the layers are", m.opts.Decide))
	defer cancel()
	answer, err := m.ask(ctx, s.repo(), s.reference())
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return answer, notStreaming(mount.RegistryUnavailable, "%w", errors.Join(cause, err))
		}
		return answer, &mount.NotStreaming{Reason: reasonFor(err), Err: err}
	}
	if answer.Format != mountapi.FormatVHD {
		return answer, &mount.NotStreaming{Reason: mount.NoStreamingArtifact, Err: errElsewhere}
	}
	if p := m.opts.Platform; answer.Platform.OS != p.OS || answer.Platform.Architecture != p.Architecture {
		return answer, notStreaming(mount.PlatformUnsupported, "the image is for %s/%s, this machine is %s/%s", answer.Platform.OS, answer.Platform.Architecture, p.OS, p.Architecture)
	}
	return answer, nil
}

// ask asks a registry for an image of a repository.
func (m *Manager) ask(ctx context.Context, name repoName, reference string) (mountapi.Mount, error) {
	reg, err := m.opts.Registry(name.registry, name.repository)
	if err != nil {
		return mountapi.Mount{}, fmt.Errorf("registry %s: %w", name.registry, err)
	}
	p := m.opts.Platform
	platform := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		platform += "/" + p.Variant
	}
	return mountapi.Get(ctx, reg, mountapi.Query{Repository: name.repository, Reference: reference, Platform: platform, Region: m.opts.Region})
}

// recordOf returns what an answer says of an image, and where in the share its disks
// are.
func recordOf(answer mountapi.Mount) (record, origin, error) {
	rec, o := record{Manifest: answer.Digest}, origin{}
	if _, err := oci.ParseDigest(answer.Digest.String()); err != nil {
		return rec, o, fmt.Errorf("the answer's digest: %w", err)
	}
	for i, l := range answer.Layers {
		if l.Sums == nil || l.Path == "" || l.Sums.Path == "" {
			return rec, o, fmt.Errorf("layer %d of the answer has no path, or no sums", i)
		}
		c := content{Digest: l.VHDDigest, Size: l.Size, Sums: l.Sums.Digest, BlockSize: l.Sums.BlockSize}
		if err := c.check(); err != nil {
			return rec, o, fmt.Errorf("layer %d of the answer: %w", i, err)
		}
		rec.Layers = append(rec.Layers, layerRecord{Digest: l.Digest, DiffID: l.DiffID, Disk: c})
		o.Paths = append(o.Paths, l.Path)
	}
	return rec, o, nil
}

// reasonFor classifies an error of a registry or a share.
func reasonFor(err error) mount.Reason {
	if r := mount.ReasonOf(err); r != "" {
		return r
	}
	var unsupported *plane.UnsupportedError
	var integrity *cache.IntegrityError
	var coded *oci.Error
	errors.As(err, &coded)
	switch {
	case errors.As(err, &integrity):
		return mount.IntegrityFailure
	case errors.As(err, &unsupported):
		return mount.PlaneUnavailable
	case errors.Is(err, smb.ErrUnreachable):
		return mount.RegistryUnavailable
	case errors.Is(err, vhd.ErrInvalid), errors.Is(err, erofs.ErrCorrupt), errors.Is(err, erofs.ErrTooLarge):
		return mount.IntegrityFailure
	case coded == nil:
		return mount.RegistryUnavailable
	}
	switch coded.Code {
	case mountapi.CodeExpanding:
		return mount.ConversionPending
	case mountapi.CodeNotEnabled, mountapi.CodeNotExpanded, mountapi.CodeFailed, oci.ErrNameUnknown.Code, oci.ErrManifestUnknown.Code:
		return mount.NoStreamingArtifact
	case oci.ErrUnauthorized.Code, oci.ErrDenied.Code:
		return mount.Unauthorized
	case oci.ErrUnsupported.Code, "NOT_FOUND":
		return mount.RegistryUnsupported
	case oci.ErrDigestInvalid.Code, oci.ErrSizeInvalid.Code:
		return mount.IntegrityFailure
	}
	return mount.RegistryUnavailable
}

// notStreaming makes the error of a reason.
func notStreaming(r mount.Reason, format string, args ...any) error {
	return &mount.NotStreaming{Reason: r, Err: fmt.Errorf(format, args...)}
}
