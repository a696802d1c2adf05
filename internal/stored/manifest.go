package stored

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strings"
	"unicode"

	"sluice/internal/index"
	"sluice/internal/storage"
	"sluice/oci"
)

// PushManifest implements oci.Writer. A reference of the form TAG@DIGEST is
// understood too; it is the only way to give a tag to a manifest under a digest
// that isn't sha256.
//
// Errors besides: ErrDenied for what is locked, for a repository that is full,
// and for the reserved type oci.ArtifactTypeStreaming, see Options.
func (r *Registry) PushManifest(ctx context.Context, repo, reference, mediaType string, content []byte) (oci.Descriptor, error) {
	return r.pushManifest(ctx, repo, reference, mediaType, content, pushRights{streaming: r.opts.AllowStreamingPush})
}

// manifestPush is one push of a manifest.
type manifestPush struct {
	repo, tag string // the tag may be empty
	content   []byte
	info      *oci.ManifestInfo
	manifest  index.Manifest
	tagRow    index.Tag
	pushRights
}

// pushRights are those that not every push has.
type pushRights struct {
	streaming bool // to push streaming artifacts
	generated bool // it is the registry's own, and so its subject must be there
}

func (r *Registry) pushManifest(ctx context.Context, repo, reference, mediaType string, content []byte, rights pushRights) (oci.Descriptor, error) {
	if err := check(ctx, repo); err != nil {
		return oci.Descriptor{}, err
	}
	tag, digest, err := splitReference(reference)
	if err != nil {
		return oci.Descriptor{}, err
	}
	if digest == "" {
		digest = oci.DigestOf(content)
	} else if actual := digest.Algorithm().FromBytes(content); actual != digest {
		return oci.Descriptor{}, oci.ErrDigestInvalid.Withf("manifest pushed to %s as %s has the digest %s", repo, digest, actual)
	}
	p := manifestPush{repo: repo, tag: tag, content: content, pushRights: rights}
	p.manifest, p.info, err = describeManifest(repo, digest, mediaType, content)
	if err != nil {
		return oci.Descriptor{}, err
	}
	if !p.streaming && (p.manifest.ArtifactType == oci.ArtifactTypeStreaming || p.manifest.ConfigMediaType == oci.ArtifactTypeStreaming) {
		return oci.Descriptor{}, oci.ErrDenied.Withf("manifest %s pushed to %s is of the type %s, which the registry makes by itself: push the image and have it converted, or allow such pushes in the registry's configuration", digest, repo, oci.ArtifactTypeStreaming)
	}
	if err := r.pushShared(ctx, &p); err != nil {
		return oci.Descriptor{}, fmt.Errorf("push manifest %s to %s: %w", digest, repo, err)
	}
	if err := r.settlePush(ctx, &p); err != nil {
		return oci.Descriptor{}, fmt.Errorf("push manifest %s to %s: %w", digest, repo, err)
	}
	return manifestDescriptor(p.manifest), nil
}

// pushShared does a push while sharing the repository: nothing that the manifest
// needs may be deleted between the check and the moment from which on it is
// visible that something needs it.
func (r *Registry) pushShared(ctx context.Context, p *manifestPush) error {
	unlock, err := r.write(ctx, p.repo)
	if err != nil {
		return err
	}
	defer unlock()
	if !r.opts.AllowSparse {
		if err := r.checkReferences(ctx, p.repo, p.info); err != nil {
			return err
		}
	}
	if err := r.checkSubject(ctx, p); err != nil {
		return err
	}
	if err := r.complete(ctx, p); err != nil {
		return err
	}
	follow, err := r.followUps(ctx, p.manifest)
	if err != nil {
		return err
	}
	events := []Event{newEvent(pushAction(p.manifest), p.repo, p.tag, manifestDescriptor(p.manifest), p.manifest.Updated, oci.ActorOf(ctx))}
	return r.change(ctx, p.repo,
		func(ctx context.Context) error { return r.putManifest(ctx, p) },
		func(tx *index.Tx) error {
			tx.PutManifest(p.manifest)
			tx.RemoveDeleted(p.repo, p.manifest.Digest)
			if p.tag != "" {
				tx.PutTag(p.tagRow)
			}
			return follow(tx)
		}, events...)
}

// complete fills in what the index knows, and checks locks and quota.
func (r *Registry) complete(ctx context.Context, p *manifestPush) error {
	at := now()
	m := &p.manifest
	m.Pushed, m.Updated, m.By, m.Attributes = at, at, actorName(ctx), index.DefaultAttributes()
	old, err := r.db.Manifest(ctx, p.repo, m.Digest)
	switch {
	case err == nil:
		if err := writable(old.Attributes, "manifest", manifestTarget(p.repo, m.Digest)); err != nil {
			return err
		}
		m.Pushed, m.By, m.Attributes, m.OS, m.Architecture = old.Pushed, old.By, old.Attributes, old.OS, old.Architecture
	case errors.Is(err, index.ErrNotFound):
		if err := r.checkQuota(ctx, p.repo, m.Size); err != nil {
			return err
		}
		if m.OS, m.Architecture, err = r.platform(ctx, *m); err != nil {
			return err
		}
	default:
		return err
	}
	if p.tag == "" {
		return nil
	}
	p.tagRow, err = r.db.Tag(ctx, p.repo, p.tag)
	if errors.Is(err, index.ErrNotFound) {
		p.tagRow, err = index.Tag{Repo: p.repo, Name: p.tag, Created: at, Attributes: index.DefaultAttributes()}, nil
	}
	if err != nil {
		return err
	}
	p.tagRow.Digest, p.tagRow.Updated = m.Digest, at
	return writable(p.tagRow.Attributes, "tag", tagTarget(p.repo, p.tag))
}

// putManifest writes the objects of a manifest in the order that the package's
// documentation explains.
func (r *Registry) putManifest(ctx context.Context, p *manifestPush) error {
	if err := r.putManifestObjects(ctx, p.manifest, p.content); err != nil {
		return err
	}
	// From here on a deletion of earlier is over.
	if err := r.remove(ctx, deletedKey(p.repo, p.manifest.Digest)); err != nil {
		return err
	}
	if p.tag == "" {
		return nil
	}
	return r.put(ctx, tagKey(p.repo, p.tag), recordOfTag(p.tagRow))
}

func (r *Registry) putManifestObjects(ctx context.Context, m index.Manifest, content []byte) error {
	if m.Subject != "" {
		link := manifestDescriptor(m)
		link.ArtifactType, link.Annotations = m.ArtifactType, m.Annotations
		if err := r.put(ctx, referrerKey(m.Repo, m.Subject, m.Digest), link); err != nil {
			return err
		}
	}
	if err := r.put(ctx, attributesKey(m.Repo, m.Digest), recordOfManifest(m)); err != nil {
		return err
	}
	return r.store.Put(ctx, manifestKey(m.Repo, m.Digest), content)
}

// settlePush looks whether the tree still has what a push wrote. If somebody
// else pushed the same tag or manifest meanwhile, the rows may have been
// committed in another order than the objects were written, and are set right.
func (r *Registry) settlePush(ctx context.Context, p *manifestPush) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), changeTimeout)
	defer cancel()
	same, err := r.holds(ctx, attributesKey(p.repo, p.manifest.Digest), recordOfManifest(p.manifest))
	if err == nil && same && p.tag != "" {
		same, err = r.holds(ctx, tagKey(p.repo, p.tag), recordOfTag(p.tagRow))
	}
	if err != nil || same {
		return err
	}
	unlock, err := r.exclude(ctx, p.repo)
	if err != nil {
		return err
	}
	defer unlock()
	manifest, merr := r.indexManifest(ctx, p.repo, p.manifest.Digest)
	tag, terr := index.Tag{}, storage.ErrNotFound
	if p.tag != "" {
		tag, terr = r.readTag(ctx, p.repo, p.tag)
	}
	for _, err := range []error{merr, terr} {
		if err != nil && !errors.Is(err, storage.ErrNotFound) {
			return err
		}
	}
	return r.db.Update(ctx, func(tx *index.Tx) error {
		if merr == nil {
			tx.PutManifest(manifest)
		}
		if terr == nil {
			tx.PutTag(tag)
		}
		return nil
	})
}

// holds reports whether an object is a record as put has written it.
func (r *Registry) holds(ctx context.Context, key string, record any) (bool, error) {
	want, err := json.Marshal(record)
	if err != nil {
		return false, err
	}
	got, err := storage.ReadAll(ctx, r.store, key, maxRecord)
	if errors.Is(err, storage.ErrNotFound) {
		return false, nil
	}
	return bytes.Equal(got, want), err
}

func (r *Registry) checkReferences(ctx context.Context, repo string, info *oci.ManifestInfo) error {
	return info.CheckReferences(func(d oci.Digest) (int64, error) {
		size, err := r.store.Stat(ctx, layerKey(repo, d))
		if errors.Is(err, storage.ErrNotFound) {
			err = oci.ErrBlobUnknown
		}
		return size, err
	}, func(d oci.Digest) (int64, error) {
		row, err := r.db.Manifest(ctx, repo, d)
		if errors.Is(err, index.ErrNotFound) {
			err = oci.ErrManifestUnknown
		}
		return row.Size, err
	})
}

// maxType bounds media types, in bytes; RFC 6838 has 255.
const maxType = 1024

// describeManifest returns what the index keeps of a manifest, as far as the
// manifest says it. Errors: ErrManifestInvalid.
func describeManifest(repo string, digest oci.Digest, mediaType string, content []byte) (index.Manifest, *oci.ManifestInfo, error) {
	info, err := oci.ParseManifestInfo(content, mediaType)
	if err != nil {
		return index.Manifest{}, nil, err
	}
	m := index.Manifest{
		Repo: repo, Digest: digest, MediaType: mediaType, ArtifactType: info.ArtifactType,
		Size: int64(len(content)), ImageSize: int64(len(content)), Annotations: info.Annotations,
	}
	if oci.IsManifest(mediaType) {
		m.ConfigMediaType = info.Blobs[0].MediaType
	}
	for _, t := range []string{m.ArtifactType, m.ConfigMediaType} {
		if len(t) > maxType || strings.ContainsFunc(t, unicode.IsControl) {
			return m, nil, oci.ErrManifestInvalid.Withf("manifest pushed to %s: %.100q is not a media type", repo, t)
		}
	}
	if info.Subject != nil {
		m.Subject = info.Subject.Digest
	}
	seen := map[oci.Digest]bool{}
	for _, b := range info.Blobs {
		if seen[b.Digest] {
			continue
		}
		seen[b.Digest] = true
		m.Blobs = append(m.Blobs, oci.Descriptor{MediaType: b.MediaType, Digest: b.Digest, Size: b.Size})
		m.ImageSize += min(b.Size, math.MaxInt64-m.ImageSize) // descriptors that nobody checked may say anything
	}
	for _, c := range info.Manifests {
		if !seen[c.Digest] {
			seen[c.Digest] = true
			m.Children = append(m.Children, c.Digest)
		}
	}
	return m, info, nil
}

// maxConfig bounds the image configs that are looked at, in bytes.
const maxConfig = 4 << 20

// platform returns what an image's config says it runs on; nothing if it is no
// image, or the config isn't there or isn't readable.
func (r *Registry) platform(ctx context.Context, m index.Manifest) (os, architecture string, err error) {
	if m.ConfigMediaType != oci.MediaTypeImageConfig && m.ConfigMediaType != oci.MediaTypeDockerConfig || m.Blobs[0].Size > maxConfig {
		return "", "", nil
	}
	content, err := storage.ReadAll(ctx, r.store, layerKey(m.Repo, m.Blobs[0].Digest), maxConfig)
	if errors.Is(err, storage.ErrNotFound) {
		return "", "", nil
	}
	if err != nil {
		return "", "", err
	}
	var config struct {
		OS           string `json:"os"`
		Architecture string `json:"architecture"`
	}
	if json.Unmarshal(content, &config) != nil {
		return "", "", nil
	}
	return platformName(config.OS), platformName(config.Architecture), nil
}

// platformName drops what can't be a name.
func platformName(s string) string {
	if len(s) > 64 || strings.ContainsFunc(s, unicode.IsControl) {
		return ""
	}
	return s
}

// actorName is who calls, as text that every database takes.
func actorName(ctx context.Context) string {
	return strings.ReplaceAll(strings.ToValidUTF8(oci.ActorOf(ctx).Name, "?"), "\x00", "?")
}
