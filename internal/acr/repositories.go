package acr

import (
	"net/http"

	"sluice/internal/index"
	"sluice/internal/registry"
	"sluice/oci"
)

const (
	memberLocks      = "deleteEnabled, writeEnabled, readEnabled, listEnabled"
	memberRepository = memberLocks + ", teleportEnabled, streamingEnabled, anonymousPullEnabled"
)

func (h *Handler) listRepositories(w http.ResponseWriter, r *http.Request, req Request) error {
	last, n, err := page(req)
	if err != nil {
		return err
	}
	list, err := h.registry.RepositoriesPage(r.Context(), index.RepositoryQuery{Last: last, N: n + 1})
	if err != nil {
		return err
	}
	names := make([]string, len(list))
	for i, repo := range list {
		names[i] = repo.Name
	}
	names = next(w, r, req, names, n, func(s string) string { return s })
	registry.WriteJSON(w, r, http.StatusOK, catalogDocument{names})
	return nil
}

func (h *Handler) getRepository(w http.ResponseWriter, r *http.Request, req Request) error {
	repo, err := h.repository(r, req)
	if err != nil {
		return err
	}
	registry.WriteJSON(w, r, http.StatusOK, repo)
	return nil
}

// repository returns the attributes of a request's repository.
func (h *Handler) repository(r *http.Request, req Request) (Repository, error) {
	repo, err := h.registry.Repository(r.Context(), req.Repository)
	if err != nil {
		return Repository{}, unknown(err, oci.ErrNameUnknown, "repository %s is not known to the registry", req.Repository)
	}
	a := repo.Attributes
	return Repository{
		Registry: h.image(r, "").Registry, Name: repo.Name,
		Created: repo.Created, Updated: repo.Updated, ManifestCount: repo.Manifests, TagCount: repo.Tags,
		Attributes: RepositoryAttributes{
			Attributes: locks(a), TeleportEnabled: a.TeleportEnabled,
			StreamingEnabled: a.StreamingEnabled, AnonymousPullEnabled: a.AnonymousPullEnabled,
		},
	}, nil
}

func (h *Handler) updateRepository(w http.ResponseWriter, r *http.Request, req Request) error {
	var c AttributeChanges
	if err := decode(r, &c, memberRepository); err != nil {
		return err
	}
	return h.changeRepository(w, r, req, c)
}

// updateTeleport is updateRepository for who may push: the script by which
// Teleport's users change teleportEnabled asks for no other access.
func (h *Handler) updateTeleport(w http.ResponseWriter, r *http.Request, req Request) error {
	var c AttributeChanges
	if err := decode(r, &c, memberRepository); err != nil {
		return err
	}
	if c.TeleportEnabled == nil || c != (AttributeChanges{TeleportEnabled: c.TeleportEnabled}) {
		return oci.ErrDenied.Withf("who may push to %s may change its teleportEnabled; other attributes take metadata/write", req.Repository)
	}
	return h.changeRepository(w, r, req, c)
}

func (h *Handler) changeRepository(w http.ResponseWriter, r *http.Request, req Request, c AttributeChanges) error {
	change := h.registry.SetRepositoryAttributes
	switch {
	case h.opts.Teleport != nil:
		change = h.opts.Teleport.Change // which heeds how many may have teleportEnabled
	case c.TeleportEnabled != nil && *c.TeleportEnabled:
		_, err := h.expander()
		return err
	}
	_, err := change(r.Context(), req.Repository, func(a *index.Attributes) error {
		c.apply(a)
		return nil
	})
	if err != nil {
		return unknown(err, oci.ErrNameUnknown, "repository %s is not known to the registry", req.Repository)
	}
	return h.getRepository(w, r, req)
}

// deleteRepository answers with what was deleted. What is pushed between the
// listing and the deletion is deleted as well, but not in the answer.
func (h *Handler) deleteRepository(w http.ResponseWriter, r *http.Request, req Request) error {
	ctx := r.Context()
	answer := DeletedContent{Manifests: []oci.Digest{}, Tags: []string{}}
	for last := ""; ; {
		list, err := h.index.Manifests(ctx, index.ManifestQuery{Repo: req.Repository, Last: last, N: maxPage})
		if err != nil {
			return err
		}
		for _, m := range list {
			answer.Manifests = append(answer.Manifests, m.Digest)
			last = m.Digest.String()
		}
		if len(list) < maxPage {
			break
		}
	}
	for last := ""; ; {
		list, err := h.index.Tags(ctx, index.TagQuery{Repo: req.Repository, Last: last, N: maxPage})
		if err != nil {
			return err
		}
		for _, t := range list {
			answer.Tags = append(answer.Tags, t.Name)
			last = t.Name
		}
		if len(list) < maxPage {
			break
		}
	}
	if err := h.registry.DeleteRepository(ctx, req.Repository); err != nil {
		return unknown(err, oci.ErrNameUnknown, "repository %s is not known to the registry", req.Repository)
	}
	registry.WriteJSON(w, r, http.StatusAccepted, answer)
	return nil
}

func (h *Handler) repositoryUsage(w http.ResponseWriter, r *http.Request, req Request) error {
	if _, err := h.repository(r, req); err != nil {
		return err
	}
	u, err := h.registry.Usage(r.Context(), req.Repository)
	if err != nil {
		return err
	}
	registry.WriteJSON(w, r, http.StatusOK, usage(req.Repository, u))
	return nil
}

func (h *Handler) totalUsage(w http.ResponseWriter, r *http.Request, _ Request) error {
	u, err := h.registry.TotalUsage(r.Context())
	if err != nil {
		return err
	}
	registry.WriteJSON(w, r, http.StatusOK, usage("", u))
	return nil
}

func usage(repo string, u index.Usage) Usage {
	return Usage{Repository: repo, Manifests: u.Manifests, Blobs: u.Blobs, Size: u.Size, Shared: u.Shared}
}

// collect removes what nothing needs, as the registry does by itself from time
// to time.
func (h *Handler) collect(w http.ResponseWriter, r *http.Request, _ Request) error {
	purged, err := h.registry.Purge(r.Context())
	if err != nil {
		return err
	}
	c, err := h.registry.Collect(r.Context(), h.opts.CollectGrace)
	if err != nil {
		return err
	}
	registry.WriteJSON(w, r, http.StatusOK, Collected{Blobs: c.Blobs, Bytes: c.Bytes, Purged: purged})
	return nil
}
