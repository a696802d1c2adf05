package acr

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"sluice/internal/index"
	"sluice/internal/registry"
	"sluice/oci"
)

// maxDeleted bounds the soft-deleted manifests of one repository that one
// answer has. ACR's clients don't page here, and need them in the order of
// their deletion.
const maxDeleted = 10_000

// deleted returns the soft-deleted manifests of a repository in the order of
// their deletion.
func (h *Handler) deleted(r *http.Request, repo string) ([]index.Deleted, error) {
	list, err := h.registry.DeletedManifests(r.Context(), repo, time.Time{}, "", maxDeleted)
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(list, func(a, b index.Deleted) int { return a.Deleted.Compare(b.Deleted) })
	return list, nil
}

// purged returns when what was deleted then is lost for good.
func (h *Handler) purged(deleted time.Time) time.Time {
	if h.opts.SoftDelete == 0 {
		return time.Time{}
	}
	return deleted.Add(h.opts.SoftDelete)
}

// listDeletedRepositories lists repositories that are gone and have something
// that can be restored, in the order of their names.
func (h *Handler) listDeletedRepositories(w http.ResponseWriter, r *http.Request, req Request) error {
	last, n, err := page(req)
	if err != nil {
		return err
	}
	list := []DeletedRepository{}
	for len(list) <= n {
		// Of each repository the first, since no digest sorts after a tilde.
		first, err := h.registry.DeletedManifests(r.Context(), "", time.Time{}, last+"@~", 1)
		if err != nil {
			return err
		}
		if len(first) == 0 {
			break
		}
		last = first[0].Repo
		if _, err := h.registry.Repository(r.Context(), last); err == nil {
			continue // it is there itself
		} else if !isUnknown(err) {
			return err
		}
		manifests, err := h.deleted(r, last)
		if err != nil {
			return err
		}
		if len(manifests) > 0 { // nobody restored it meanwhile
			list = append(list, DeletedRepository{Name: last, Deleted: manifests[len(manifests)-1].Deleted})
		}
	}
	list = next(w, r, req, list, n, func(d DeletedRepository) string { return d.Name })
	registry.WriteJSON(w, r, http.StatusOK, deletedRepositoriesDocument{list})
	return nil
}

func (h *Handler) listDeletedManifests(w http.ResponseWriter, r *http.Request, req Request) error {
	list, err := h.deleted(r, req.Repository)
	if err != nil {
		return err
	}
	doc := deletedManifestsDocument{h.image(r, req.Repository), []DeletedManifest{}}
	for _, d := range list {
		doc.Manifests = append(doc.Manifests, DeletedManifest{
			Digest: d.Digest, Deleted: d.Deleted, DeletedBy: d.By, Purged: h.purged(d.Deleted),
			MediaType: d.MediaType, ImageSize: d.ImageSize, Tags: d.Tags,
		})
	}
	registry.WriteJSON(w, r, http.StatusOK, doc)
	return nil
}

func (h *Handler) listDeletedTags(w http.ResponseWriter, r *http.Request, req Request) error {
	list, err := h.deleted(r, req.Repository)
	if err != nil {
		return err
	}
	doc := deletedTagsDocument{h.image(r, req.Repository), []DeletedTag{}}
	for _, d := range list {
		for _, tag := range d.Tags {
			doc.Tags = append(doc.Tags, DeletedTag{Tag: tag, Digest: d.Digest, Deleted: d.Deleted, Purged: h.purged(d.Deleted)})
		}
	}
	registry.WriteJSON(w, r, http.StatusOK, doc)
	return nil
}

// restoreManifest brings a soft-deleted manifest back. Its tag must not name
// another manifest meanwhile, unless the query says force=true.
func (h *Handler) restoreManifest(w http.ResponseWriter, r *http.Request, req Request) error {
	var body restoreRequest
	if r.ContentLength != 0 {
		if err := decode(r, &body, "tag"); err != nil {
			return err
		}
	} else if _, err := io.Copy(io.Discard, r.Body); err != nil {
		return err
	}
	if body.Tag != "" {
		if err := oci.CheckTag(body.Tag); err != nil {
			return err
		}
	}
	ctx := r.Context()
	force := strings.EqualFold(req.Query.Get("force"), "true") // ACR's clients send True
	move := false
	if body.Tag != "" {
		now, err := h.registry.Tag(ctx, req.Repository, body.Tag)
		if err != nil && !isUnknown(err) {
			return err
		}
		if move = err == nil && now.Digest != req.Digest; move && !force {
			return ErrConflict.Withf("tag %s of %s names %s now: choose another tag, or force the tag to move", body.Tag, req.Repository, now.Digest)
		}
	}
	desc, err := h.restore(ctx, req, body.Tag, move)
	if err != nil {
		return err
	}
	registry.WriteJSON(w, r, http.StatusOK, Restored{Digest: desc.Digest, Tag: body.Tag})
	return nil
}

// restore restores a manifest. If its tag is to be moved, that is done as by a
// push, after all else.
func (h *Handler) restore(ctx context.Context, req Request, tag string, move bool) (oci.Descriptor, error) {
	first := tag
	if move {
		first = ""
	}
	desc, err := h.registry.Restore(ctx, req.Repository, req.Digest, first)
	if err != nil || !move {
		return desc, err
	}
	m, err := h.registry.GetManifest(ctx, req.Repository, desc.Digest.String())
	if err != nil {
		return desc, err
	}
	if _, err := h.registry.PushManifest(ctx, req.Repository, tag, m.Descriptor.MediaType, m.Content); err != nil {
		return desc, fmt.Errorf("manifest %s is restored, but tag %s can't be moved to it: %w", desc.Digest, tag, err)
	}
	return desc, nil
}
