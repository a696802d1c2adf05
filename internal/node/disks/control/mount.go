package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"sluice/internal/node/mount"
	"sluice/internal/node/pulled"
	"sluice/oci"
)

// mounting is a Mount under way.
type mounting struct {
	s         *Server
	req       Mount
	reference string
	claim     Claim // with no ID: none is wanted
	tell      func(Line)
	why       string // it isn't teleported
}

// Mount pulls an image, if need be, and mounts it for a process. tell is called by
// one at a time.
func (s *Server) Mount(ctx context.Context, req Mount, tell func(Line)) (Mounted, error) {
	r, err := oci.ParseReference(req.Reference)
	if err != nil {
		return Mounted{}, err
	}
	m := &mounting{s: s, req: req, reference: r.String(), tell: tell}
	if !req.PullOnly {
		if m.claim, err = newClaim(req.PID); err != nil {
			return Mounted{}, err
		}
	}
	tell(Line{Stage: StageManifest})
	kept, isKept := s.find(m.reference)
	if !req.Ordinary {
		done, err := m.teleport(ctx)
		if err == nil || ctx.Err() != nil {
			return done, err
		}
		m.why = whyNot(err)
		if reason := mount.ReasonOf(err); isKept && reason == mount.RegistryUnavailable {
			if done, kerr := m.fromKept(ctx, kept, err); kerr == nil || ctx.Err() != nil {
				return done, kerr
			}
		}
		tell(Line{Stage: StageOrdinary, Why: m.why, Reason: mount.ReasonOf(err)})
	}
	done, err := m.ordinary(ctx)
	if isKept && errors.Is(err, pulled.ErrUnavailable) && ctx.Err() == nil {
		if done, kerr := m.fromKept(ctx, kept, err); kerr == nil {
			return done, nil
		}
	}
	return done, err
}

// whyNot is the text of why an image isn't teleported, without the reason, which is
// said apart.
func whyNot(err error) string {
	var n *mount.NotStreaming
	if errors.As(err, &n) {
		return n.Err.Error()
	}
	return err.Error()
}

// teleport mounts the image by its disks.
func (m *mounting) teleport(ctx context.Context) (Mounted, error) {
	images := m.s.opts.Teleport
	began := time.Now()
	img, err := images.Pull(ctx, m.reference, "")
	if err != nil {
		return Mounted{}, err
	}
	content, platform, err := config(ctx, images, img.ID)
	if err != nil {
		return Mounted{}, err
	}
	k := Kept{
		Reference: m.reference, ID: img.ID, Manifest: img.Manifest, Platform: platform,
		Teleported: true, Layers: len(img.DiffIDs), Pulled: time.Now().UTC(),
	}
	line := Line{Stage: StageTeleporting, Manifest: k.Manifest, Platform: platform, Layers: k.Layers}
	if o, ok := images.LastPull(m.reference); ok && !o.Time.Before(began) {
		line.Requests, line.Bytes = o.Requests, o.Bytes
	}
	m.tell(line)
	done, err := m.mount(ctx, k, content)
	if err != nil {
		return done, err
	}
	if err := m.s.keep(ctx, k); err != nil {
		return done, m.undo(ctx, err)
	}
	m.tell(Line{Stage: StageTeleported})
	return done, nil
}

// ordinary mounts the image with all of its content.
func (m *mounting) ordinary(ctx context.Context) (Mounted, error) {
	images := m.s.opts.Ordinary
	owner := fmt.Sprintf("pull/%p", m) // until it is kept
	defer func() {
		if err := images.Release(context.WithoutCancel(ctx), owner); err != nil {
			m.s.log.WarnContext(ctx, "an image that was pulled can't be given up", "image", m.reference, "error", err)
		}
	}()
	img, err := images.Pull(ctx, m.reference, owner, func(p pulled.Progress) {
		m.tell(Line{Stage: StagePulling, Progress: &p})
	})
	if err != nil {
		return Mounted{}, err
	}
	content, platform, err := config(ctx, images, img.ID)
	if err != nil {
		return Mounted{}, err
	}
	k := Kept{
		Reference: m.reference, ID: img.ID, Manifest: img.ID, Platform: platform,
		Layers: len(img.DiffIDs), Size: img.Size, Pulled: time.Now().UTC(),
	}
	m.tell(Line{Stage: StagePulled, Manifest: k.Manifest, Platform: platform, Layers: k.Layers})
	done, err := m.mount(ctx, k, content)
	if err != nil {
		return done, err
	}
	if err := m.s.keep(ctx, k); err != nil {
		return done, m.undo(ctx, err)
	}
	return done, nil
}

// fromKept mounts an image as it was pulled before, since the registry doesn't
// answer.
func (m *mounting) fromKept(ctx context.Context, k Kept, why error) (Mounted, error) {
	content, _, err := config(ctx, m.s.images(k.Teleported), k.ID)
	if err != nil {
		return Mounted{}, err
	}
	done, err := m.mount(ctx, k, content)
	if err != nil {
		m.s.log.WarnContext(ctx, "an image that was pulled before can't be mounted", "image", k.Reference, "error", err)
		return done, err
	}
	if k.Teleported {
		done.Why = ""
	}
	m.tell(Line{Stage: StageKept, Manifest: k.Manifest, Platform: k.Platform, Layers: k.Layers, Why: whyNot(why), Reason: mount.ReasonOf(why)})
	return done, nil
}

// config returns an image's config and the platform that it says.
func config(ctx context.Context, images Images, id oci.Digest) (content []byte, platform string, err error) {
	if content, err = images.Config(ctx, id); err != nil {
		return nil, "", err
	}
	var c oci.ImageConfig
	if err := json.Unmarshal(content, &c); err != nil {
		return nil, "", fmt.Errorf("config of image %s: %w", id, err)
	}
	platform = c.OS + "/" + c.Architecture
	if c.Variant != "" {
		platform += "/" + c.Variant
	}
	return content, platform, nil
}

// mount mounts an image, if a mount was asked for.
func (m *mounting) mount(ctx context.Context, k Kept, content []byte) (Mounted, error) {
	done := Mounted{Kept: k, Why: m.why, Config: content}
	if m.claim.ID == "" {
		done.Size = m.s.size(ctx, k)
		return done, nil
	}
	c := m.claim
	c.Reference, c.Image, c.Manifest, c.Teleported = k.Reference, k.ID, k.Manifest, k.Teleported
	dirs, err := m.s.claim(ctx, c)
	if err != nil {
		return Mounted{}, err
	}
	done.ID, done.Dirs = c.ID, dirs
	return done, nil
}

// undo ends the claim because of an error.
func (m *mounting) undo(ctx context.Context, err error) error {
	if m.claim.ID == "" {
		return err
	}
	return errors.Join(err, m.s.Unmount(context.WithoutCancel(ctx), m.claim.ID))
}
