package registry

import (
	"encoding/json"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"strconv"

	"sluice/oci"
)

// maxReferrersSize bounds one answer of referrers, in bytes of JSON, since
// clients bound what they read; four MiB is what they read of any manifest.
const maxReferrersSize = 3 << 20

// listTags is end-8.
func (h *Handler) listTags(w http.ResponseWriter, r *http.Request, req Request) error {
	tags, err := h.page(w, r, req, h.registry.Tags(r.Context(), req.Repository, req.Query.Get("last")))
	if err != nil {
		return err
	}
	WriteJSON(w, r, http.StatusOK, struct {
		Name string   `json:"name"`
		Tags []string `json:"tags"`
	}{req.Repository, tags})
	return nil
}

// listRepositories is the catalog of Docker's registry.
func (h *Handler) listRepositories(w http.ResponseWriter, r *http.Request, req Request) error {
	repos, err := h.page(w, r, req, h.registry.Repositories(r.Context(), req.Query.Get("last")))
	if err != nil {
		return err
	}
	WriteJSON(w, r, http.StatusOK, struct {
		Repositories []string `json:"repositories"`
	}{repos})
	return nil
}

// page takes the first names of a list, as many as the request's n says, and
// links to the next page if there are more.
func (h *Handler) page(w http.ResponseWriter, r *http.Request, req Request, list iter.Seq2[string, error]) ([]string, error) {
	n, err := h.pageSize(req)
	if err != nil {
		return nil, err
	}
	names := []string{} // an empty list in JSON, not null
	for name, err := range list {
		if err != nil {
			return nil, err
		}
		if len(names) == n {
			if n > 0 {
				linkNext(w, r, url.Values{"n": {strconv.Itoa(n)}, "last": {names[n-1]}})
			}
			break
		}
		names = append(names, name)
	}
	return names, nil
}

// pageSize returns the n of a request within the handler's limit.
func (h *Handler) pageSize(req Request) (int, error) {
	s := req.Query.Get("n")
	if s == "" {
		return h.opts.PageSize, nil
	}
	n, ok := parseCount(s)
	if !ok {
		return 0, &StatusError{
			Status: http.StatusBadRequest,
			Err:    &oci.Error{Code: codePagination, Message: fmt.Sprintf("n=%.40q is not a number of entries", s)},
		}
	}
	return int(min(n, int64(h.opts.PageSize))), nil
}

// linkNext links to the next page (RFC 8288), relative to the host.
func linkNext(w http.ResponseWriter, r *http.Request, query url.Values) {
	next := url.URL{Path: r.URL.Path, RawQuery: query.Encode()}
	w.Header().Set("Link", "<"+next.String()+`>; rel="next"`)
}

// listReferrers is end-12. Pages are continued by last, a digest, as the
// specification leaves it to registries how their links look.
func (h *Handler) listReferrers(w http.ResponseWriter, r *http.Request, req Request) error {
	n, err := h.pageSize(req)
	if err != nil {
		return err
	}
	artifactType, last := req.Query.Get("artifactType"), oci.Digest(req.Query.Get("last"))
	index := oci.Index{
		Versioned: oci.Versioned{SchemaVersion: 2},
		MediaType: oci.MediaTypeIndex,
		Manifests: []oci.Descriptor{},
	}
	size := 0
	for desc, err := range h.registry.Referrers(r.Context(), req.Repository, req.Digest, artifactType) {
		if err != nil {
			return err
		}
		if desc.Digest <= last {
			continue
		}
		encoded, err := json.Marshal(desc)
		if err != nil {
			return err
		}
		size += len(encoded)
		if got := len(index.Manifests); got >= n || got > 0 && size > maxReferrersSize {
			if got > 0 {
				query := url.Values{"last": {index.Manifests[got-1].Digest.String()}}
				for _, k := range []string{"artifactType", "n"} {
					if v := req.Query.Get(k); v != "" {
						query.Set(k, v)
					}
				}
				linkNext(w, r, query)
			}
			break
		}
		index.Manifests = append(index.Manifests, desc)
	}
	if artifactType != "" {
		w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	w.Header().Set("Content-Type", oci.MediaTypeIndex)
	WriteJSON(w, r, http.StatusOK, index)
	return nil
}
