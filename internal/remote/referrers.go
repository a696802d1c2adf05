package remote

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"iter"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"sluice/oci"
)

// tagIndexTries is how often an entry of a tag index is made, because another
// client may overwrite it at the same moment.
const tagIndexTries = 3

// Referrers implements oci.Lister. Where the registry has no referrers API, it
// reads the index that clients keep in a tag instead.
func (r *Registry) Referrers(ctx context.Context, repo string, subject oci.Digest, artifactType string) iter.Seq2[oci.Descriptor, error] {
	return func(yield func(oci.Descriptor, error) bool) {
		if err := checkBlob(repo, subject); err != nil {
			yield(oci.Descriptor{}, err)
			return
		}
		all, err := r.referrers(ctx, repo, subject, artifactType)
		switch {
		case !errors.Is(err, errNoReferrersAPI):
		case r.opts.ReferrersAPIOnly:
			err = nil
		default:
			all, err = r.tagIndex(ctx, repo, subject)
		}
		if err != nil {
			yield(oci.Descriptor{}, err)
			return
		}
		slices.SortFunc(all, func(a, b oci.Descriptor) int { return cmp.Compare(a.Digest, b.Digest) })
		all = slices.CompactFunc(all, func(a, b oci.Descriptor) bool { return a.Digest == b.Digest })
		for _, desc := range all {
			if artifactType != "" && desc.ArtifactType != artifactType {
				continue // the server need not filter
			}
			if err := ctx.Err(); err != nil {
				yield(oci.Descriptor{}, err)
				return
			}
			if !yield(desc, nil) {
				return
			}
		}
	}
}

// errNoReferrersAPI is what a 404 of the referrers API means (distribution-spec
// 1.1, "Unavailable Referrers API").
var errNoReferrersAPI = &oci.Error{Code: "NO_REFERRERS_API", Message: "the registry has no referrers API"}

func (r *Registry) referrers(ctx context.Context, repo string, subject oci.Digest, artifactType string) ([]oci.Descriptor, error) {
	c := r.referrersCall(repo, subject)
	if artifactType != "" {
		c.url.RawQuery = url.Values{"artifactType": {artifactType}}.Encode()
	}
	var all []oci.Descriptor
	err := r.pages(ctx, c, errNoReferrersAPI, func(page []byte) error {
		info, err := oci.ParseManifestInfo(page, oci.MediaTypeIndex)
		if err != nil {
			return err
		}
		all = append(append(all, info.Manifests...), info.Blobs...)
		return nil
	})
	if errors.Is(err, oci.ErrNameUnknown) || errors.Is(err, oci.ErrUnsupported) {
		// Some registries know no more of the path than this either.
		return nil, errNoReferrersAPI
	}
	return all, err
}

func (r *Registry) referrersCall(repo string, subject oci.Digest) call {
	return call{
		what:   "listing the referrers of " + subject.String() + " in " + repo,
		method: http.MethodGet,
		url:    r.endpoint(repo+"/referrers/"+subject.String(), nil),
		header: http.Header{"Accept": {oci.MediaTypeIndex}},
		scopes: pull(repo),
		again:  true,
	}
}

// referrersTag is the tag of the index of a subject's referrers (distribution-spec
// 1.1, "Referrers Tag Schema").
func referrersTag(subject oci.Digest) string {
	algorithm, encoded := subject.Algorithm().String(), subject.Encoded()
	tag := algorithm[:min(len(algorithm), 32)] + "-" + encoded[:min(len(encoded), 64)]
	return strings.Map(func(c rune) rune {
		if c == '.' || c == '_' || c == '-' || c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' {
			return c
		}
		return '-'
	}, tag)
}

// tagIndex returns the referrers that a tag tells. Without the tag there are none.
func (r *Registry) tagIndex(ctx context.Context, repo string, subject oci.Digest) ([]oci.Descriptor, error) {
	m, err := r.GetManifest(ctx, repo, referrersTag(subject))
	if isUnknown(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	info, err := oci.ParseManifestInfo(m.Content, m.Descriptor.MediaType)
	if err != nil {
		return nil, r.errorf(r.referrersCall(repo, subject), "the index of tag %s: %w", referrersTag(subject), err)
	}
	return append(info.Manifests, info.Blobs...), nil
}

// addToTagIndex enters a referrer in the tag of its subject.
func (r *Registry) addToTagIndex(ctx context.Context, repo string, subject oci.Digest, referrer oci.Descriptor) error {
	return r.editTagIndex(ctx, repo, subject, func(all []oci.Descriptor) ([]oci.Descriptor, bool) {
		if slices.ContainsFunc(all, func(d oci.Descriptor) bool { return d.Digest == referrer.Digest }) {
			return all, false
		}
		return append(all, referrer), true
	})
}

// removeFromTagIndex removes a deleted referrer from the tag of its subject.
// Registries with a referrers API have no such tag, so nothing happens there.
func (r *Registry) removeFromTagIndex(ctx context.Context, repo string, subject, referrer oci.Digest) error {
	return r.editTagIndex(ctx, repo, subject, func(all []oci.Descriptor) ([]oci.Descriptor, bool) {
		left := slices.DeleteFunc(slices.Clone(all), func(d oci.Descriptor) bool { return d.Digest == referrer })
		return left, len(left) < len(all)
	})
}

// stale returns those of a tag index's entries whose manifests are gone.
func (r *Registry) stale(ctx context.Context, repo string, entries []oci.Descriptor) map[oci.Digest]bool {
	gone := map[oci.Digest]bool{}
	for _, desc := range entries {
		if _, err := r.ResolveManifest(ctx, repo, desc.Digest.String()); isUnknown(err) {
			gone[desc.Digest] = true
		}
	}
	return gone
}

// editTagIndex changes the index of a subject's referrers until it is as edit
// wants it. The protocol has no way to do so atomically: of clients that write at
// once the last wins, so each looks again after it has written.
func (r *Registry) editTagIndex(ctx context.Context, repo string, subject oci.Digest, edit func([]oci.Descriptor) ([]oci.Descriptor, bool)) error {
	c := r.referrersCall(repo, subject)
	c.what = "updating the referrers of " + subject.String() + " in " + repo
	select {
	case r.tagIndexes <- struct{}{}:
		defer func() { <-r.tagIndexes }()
	case <-ctx.Done():
		return r.errorf(c, "%w", ctx.Err())
	}
	for range tagIndexTries {
		all, err := r.tagIndex(ctx, repo, subject)
		if err != nil {
			return err
		}
		edited, changed := edit(all)
		if !changed {
			return nil
		}
		content, err := json.Marshal(oci.Index{
			Versioned: oci.Versioned{SchemaVersion: 2},
			MediaType: oci.MediaTypeIndex,
			Manifests: append([]oci.Descriptor{}, edited...),
		})
		if err != nil {
			return r.errorf(c, "%w", err)
		}
		if len(content) > oci.MaxManifestSize {
			return r.ociErrorf(oci.ErrManifestInvalid, c, "the index of its %d referrers is larger than a manifest may be", len(edited))
		}
		desc := oci.Descriptor{MediaType: oci.MediaTypeIndex, Digest: oci.DigestOf(content), Size: int64(len(content))}
		_, err = r.putManifest(ctx, repo, referrersTag(subject), desc, content)
		if errors.Is(err, oci.ErrManifestBlobUnknown) {
			// Somebody deleted a referrer and left its entry.
			stale := r.stale(ctx, repo, edited)
			if len(stale) == 0 {
				return err
			}
			editFurther := edit
			edit = func(all []oci.Descriptor) ([]oci.Descriptor, bool) {
				all, changed := editFurther(all)
				left := slices.DeleteFunc(slices.Clone(all), func(d oci.Descriptor) bool { return stale[d.Digest] })
				return left, changed || len(left) < len(all)
			}
		} else if err != nil {
			return err
		}
	}
	all, err := r.tagIndex(ctx, repo, subject)
	if err != nil {
		return err
	}
	if _, changed := edit(all); changed {
		return r.errorf(c, "other clients overwrite tag %s all the time; try again", referrersTag(subject))
	}
	return nil
}
