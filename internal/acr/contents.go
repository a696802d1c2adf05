package acr

import (
	"net/http"

	"sluice/internal/index"
	"sluice/internal/registry"
	"sluice/oci"
)

// maxReferences bounds the manifests of one index that an answer describes.
const maxReferences = 1000

func (h *Handler) listTags(w http.ResponseWriter, r *http.Request, req Request) error {
	last, n, err := page(req)
	if err != nil {
		return err
	}
	q := index.TagQuery{Repo: req.Repository, Last: last, N: n + 1}
	if q.Order, err = order(req); err != nil {
		return err
	}
	if s := req.Query.Get("digest"); s != "" {
		if q.Digest, err = oci.ParseDigest(s); err != nil {
			return err
		}
	}
	if _, err := h.repository(r, req); err != nil {
		return err
	}
	list, err := h.registry.TagsPage(r.Context(), q)
	if err != nil {
		return err
	}
	tags := make([]Tag, len(list))
	for i, t := range list {
		tags[i] = wireTag(t)
	}
	tags = next(w, r, req, tags, n, func(t Tag) string { return t.Name })
	registry.WriteJSON(w, r, http.StatusOK, tagsDocument{h.image(r, req.Repository), tags})
	return nil
}

func wireTag(t index.Tag) Tag {
	return Tag{Name: t.Name, Digest: t.Digest, Created: t.Created, Updated: t.Updated, Attributes: locks(t.Attributes)}
}

func (h *Handler) getTag(w http.ResponseWriter, r *http.Request, req Request) error {
	t, err := h.registry.Tag(r.Context(), req.Repository, req.Tag)
	if err != nil {
		return h.tagError(r, req, err)
	}
	registry.WriteJSON(w, r, http.StatusOK, tagDocument{h.image(r, req.Repository), wireTag(t)})
	return nil
}

func (h *Handler) updateTag(w http.ResponseWriter, r *http.Request, req Request) error {
	change, err := lockChanges(r)
	if err != nil {
		return err
	}
	if _, err := h.registry.SetTagAttributes(r.Context(), req.Repository, req.Tag, change); err != nil {
		return h.tagError(r, req, err)
	}
	return h.getTag(w, r, req)
}

// lockChanges reads the body of a PATCH of a manifest or a tag.
func lockChanges(r *http.Request) (func(*index.Attributes) error, error) {
	var c AttributeChanges
	if err := decode(r, &c, memberLocks); err != nil {
		return nil, err
	}
	if c.repositoryOnly() {
		return nil, badRequest("the body: only repositories have teleportEnabled, streamingEnabled and anonymousPullEnabled: the members here are of %s", memberLocks)
	}
	return func(a *index.Attributes) error {
		c.apply(a)
		return nil
	}, nil
}

func (h *Handler) deleteTag(w http.ResponseWriter, r *http.Request, req Request) error {
	if err := h.registry.DeleteTag(r.Context(), req.Repository, req.Tag); err != nil {
		return h.tagError(r, req, err)
	}
	w.WriteHeader(http.StatusAccepted)
	return nil
}

// tagError says of what isn't there whether it is the repository or the tag.
func (h *Handler) tagError(r *http.Request, req Request, err error) error {
	if !isUnknown(err) {
		return err
	}
	if _, err := h.repository(r, req); err != nil {
		return err
	}
	return ErrTagUnknown.Withf("repository %s has no tag %s", req.Repository, req.Tag)
}

func (h *Handler) listManifests(w http.ResponseWriter, r *http.Request, req Request) error {
	last, n, err := page(req)
	if err != nil {
		return err
	}
	q := index.ManifestQuery{Repo: req.Repository, Last: last, N: n + 1}
	if q.Order, err = order(req); err != nil {
		return err
	}
	if _, err := h.repository(r, req); err != nil {
		return err
	}
	list, err := h.registry.ManifestsPage(r.Context(), q)
	if err != nil {
		return err
	}
	manifests := make([]Manifest, len(list))
	for i, m := range list {
		manifests[i] = wireManifest(m)
	}
	manifests = next(w, r, req, manifests, n, func(m Manifest) string { return m.Digest.String() })
	registry.WriteJSON(w, r, http.StatusOK, manifestsDocument{h.image(r, req.Repository), manifests})
	return nil
}

func wireManifest(m index.Manifest) Manifest {
	if m.ArtifactType == m.ConfigMediaType {
		m.ArtifactType = "" // what referrers are filtered by where a manifest has none
	}
	return Manifest{
		Digest: m.Digest, ImageSize: m.ImageSize, Created: m.Pushed, Updated: m.Updated, CreatedBy: m.By,
		Architecture: m.Architecture, OS: m.OS, MediaType: m.MediaType, ConfigMediaType: m.ConfigMediaType,
		ArtifactType: m.ArtifactType, Subject: m.Subject, Tags: m.Tags, Attributes: locks(m.Attributes),
	}
}

func (h *Handler) getManifest(w http.ResponseWriter, r *http.Request, req Request) error {
	m, err := h.registry.Manifest(r.Context(), req.Repository, req.Digest)
	if err != nil {
		return h.manifestError(r, req, err)
	}
	doc := manifestDocument{h.image(r, req.Repository), wireManifest(m)}
	for _, digest := range m.Children[:min(len(m.Children), maxReferences)] {
		ref := Reference{Digest: digest}
		child, err := h.registry.Manifest(r.Context(), req.Repository, digest)
		if err != nil && !isUnknown(err) { // an index may lack some platforms
			return err
		}
		ref.Architecture, ref.OS = child.Architecture, child.OS
		doc.Manifest.References = append(doc.Manifest.References, ref)
	}
	registry.WriteJSON(w, r, http.StatusOK, doc)
	return nil
}

func (h *Handler) updateManifest(w http.ResponseWriter, r *http.Request, req Request) error {
	change, err := lockChanges(r)
	if err != nil {
		return err
	}
	if _, err := h.registry.SetManifestAttributes(r.Context(), req.Repository, req.Digest, change); err != nil {
		return h.manifestError(r, req, err)
	}
	return h.getManifest(w, r, req)
}

func (h *Handler) deleteManifest(w http.ResponseWriter, r *http.Request, req Request) error {
	if err := h.registry.DeleteManifest(r.Context(), req.Repository, req.Digest); err != nil {
		return h.manifestError(r, req, err)
	}
	w.WriteHeader(http.StatusAccepted)
	return nil
}

// manifestError is tagError for a manifest.
func (h *Handler) manifestError(r *http.Request, req Request, err error) error {
	if !isUnknown(err) {
		return err
	}
	if _, err := h.repository(r, req); err != nil {
		return err
	}
	return oci.ErrManifestUnknown.Withf("repository %s has no manifest %s", req.Repository, req.Digest)
}
