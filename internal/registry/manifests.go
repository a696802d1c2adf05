package registry

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	"sluice/oci"
)

// maxTagParameters bounds how many tags one push sets: the specification wants
// at least ten.
const maxTagParameters = 100

// getManifest is end-3. What the client accepts is not asked: there is one form
// of each manifest, and clients' Accept headers are often too narrow.
func (h *Handler) getManifest(w http.ResponseWriter, r *http.Request, req Request) error {
	m, err := h.registry.GetManifest(r.Context(), req.Repository, req.Reference)
	if err != nil {
		return err
	}
	desc := m.Descriptor
	w.Header().Set("Content-Type", desc.MediaType)
	w.Header().Set("Docker-Content-Digest", desc.Digest.String())
	w.Header().Set("ETag", etag(desc.Digest))
	if isDigest(req.Reference) {
		w.Header().Set("Cache-Control", cacheForever)
	}
	if matches(r.Header.Get("If-None-Match"), desc.Digest) {
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	if r.Method == http.MethodHead {
		w.Header().Set("Content-Length", strconv.FormatInt(desc.Size, 10))
		w.WriteHeader(http.StatusOK)
		return nil
	}
	writeBody(w, r, http.StatusOK, desc.MediaType, m.Content)
	return nil
}

// putManifest is end-7 and, with tag parameters, end-7b.
func (h *Handler) putManifest(w http.ResponseWriter, r *http.Request, req Request) error {
	tags := req.Query["tag"]
	if len(tags) > maxTagParameters {
		return &StatusError{
			Status: http.StatusRequestURITooLong,
			Err:    oci.ErrManifestInvalid.Withf("%d tag parameters: %d are allowed", len(tags), maxTagParameters),
		}
	}
	for _, tag := range tags {
		if err := oci.CheckTag(tag); err != nil {
			return err
		}
	}
	content, err := readManifest(r, h.opts.MaxManifest)
	if err != nil {
		return err
	}
	contentType := manifestType(r.Header, content)
	desc, err := h.registry.PushManifest(r.Context(), req.Repository, req.Reference, contentType, content)
	if err != nil {
		return err
	}
	for _, tag := range tags {
		ok, err := h.tagManifest(r, req.Repository, tag, contentType, desc, content)
		if err != nil {
			return fmt.Errorf("tag %s: %w", tag, err)
		}
		if ok {
			w.Header().Add("OCI-Tag", tag)
		}
	}
	if info, err := oci.ParseManifestInfo(content, desc.MediaType); err == nil && info.Subject != nil {
		w.Header().Set("OCI-Subject", info.Subject.Digest.String())
	}
	w.Header().Set("Location", manifestPath(req.Repository, desc.Digest.String()))
	w.Header().Set("Docker-Content-Digest", desc.Digest.String())
	w.Header().Set("Content-Length", "0")
	w.WriteHeader(http.StatusCreated)
	return nil
}

// tagManifest points a tag at a manifest that has been pushed. It reports false
// if the registry can't, which is allowed: a tag alone stands for the sha256
// digest, and not every oci.Registry knows TAG@DIGEST.
func (h *Handler) tagManifest(r *http.Request, repo, tag, contentType string, desc oci.Descriptor, content []byte) (bool, error) {
	if desc.Digest.Algorithm() == oci.SHA256 {
		_, err := h.registry.PushManifest(r.Context(), repo, tag, contentType, content)
		return err == nil, err
	}
	_, err := h.registry.PushManifest(r.Context(), repo, tag+"@"+desc.Digest.String(), contentType, content)
	if errors.Is(err, oci.ErrManifestInvalid) || errors.Is(err, oci.ErrDigestInvalid) {
		return false, nil
	}
	return err == nil, err
}

// readManifest reads a request's body of at most limit bytes.
func readManifest(r *http.Request, limit int64) ([]byte, error) {
	tooLarge := &StatusError{
		Status: http.StatusRequestEntityTooLarge,
		Err:    oci.ErrSizeInvalid.Withf("a manifest may have %d bytes", limit),
	}
	if r.ContentLength > limit {
		return nil, tooLarge
	}
	content, err := io.ReadAll(io.LimitReader(r.Body, limit+1))
	switch {
	case err != nil:
		return nil, err
	case int64(len(content)) > limit:
		return nil, tooLarge
	}
	return content, nil
}

// manifestType returns the media type that a manifest is pushed with. Clients
// that don't know better send none or a general one; then the manifest's own
// word counts.
func manifestType(header http.Header, content []byte) string {
	sent := mediaType(header)
	if sent != "" && sent != "application/json" && sent != oci.MediaTypeOctetStream && !strings.HasPrefix(sent, "text/") {
		return sent
	}
	var m struct {
		MediaType string `json:"mediaType"`
	}
	if err := json.Unmarshal(content, &m); err != nil {
		return sent // and PushManifest will say what is wrong
	}
	return m.MediaType
}

// deleteManifest is end-9: a manifest with its tags, or a tag alone.
func (h *Handler) deleteManifest(w http.ResponseWriter, r *http.Request, req Request) error {
	var err error
	if isDigest(req.Reference) {
		err = h.registry.DeleteManifest(r.Context(), req.Repository, oci.Digest(req.Reference))
	} else {
		err = h.registry.DeleteTag(r.Context(), req.Repository, req.Reference)
	}
	if err != nil {
		return err
	}
	accepted(w)
	return nil
}
