// Package mountserver serves the API of package mountapi: it asks teleport.Service
// what has become of an image, and samba.Keeper for credentials. Start with Handler.
package mountserver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"path"
	"strings"

	"sluice/internal/auth"
	"sluice/internal/convert"
	"sluice/internal/operation"
	"sluice/internal/registry"
	"sluice/internal/teleport"
	"sluice/internal/teleport/mountapi"
	"sluice/internal/teleport/samba"
	"sluice/oci"
)

// Options says what a Handler serves.
type Options struct {
	// Teleport has the disks.
	Teleport *teleport.Service

	// Credential gives out a credential of a repository.
	Credential func(ctx context.Context, repo string) (samba.Credential, error)

	// Server is the file server, HOST[:PORT].
	Server string

	// Region is where the registry and the file server are, by a name that clients
	// know it by. Empty: wherever the client is.
	Region string

	// Authorizer tells who asks and what they may. Nil: everybody may do
	// everything.
	Authorizer registry.Authorizer

	// Service is the registry's name in challenges. Empty: the host that the client
	// asked for.
	Service string

	// ExternalURL is the registry's, for the URLs of blobs. Empty: by the request.
	ExternalURL string

	// TrustForwarded believes X-Forwarded-Proto.
	TrustForwarded bool
}

// Handler serves the API. It belongs behind registry.Wrap, which logs, limits, and
// tells who asks.
type Handler struct{ opts Options }

// New returns a handler.
func New(opts Options) *Handler { return &Handler{opts} }

// ServeHTTP implements http.Handler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	if err := h.serve(w, r); err != nil {
		registry.WriteError(w, r, err)
	}
}

// parse takes the path of a request apart.
func parse(path string) (repo, reference string, err error) {
	unknown := &registry.StatusError{Status: http.StatusNotFound, Err: &oci.Error{Code: "NOT_FOUND", Message: fmt.Sprintf("no such endpoint: %.200q", path)}}
	rest, ok := strings.CutPrefix(path, mountapi.Prefix)
	if !ok {
		return "", "", unknown
	}
	repo, reference, ok = strings.Cut(rest, "/_manifests/")
	if !ok || strings.Contains(reference, "/") {
		return "", "", unknown
	}
	if err := oci.CheckRepository(repo); err != nil {
		return "", "", err
	}
	if strings.Contains(reference, ":") {
		_, err = oci.ParseDigest(reference)
	} else {
		err = oci.CheckTag(reference)
	}
	return repo, reference, err
}

func (h *Handler) serve(w http.ResponseWriter, r *http.Request) error {
	repo, reference, err := parse(r.URL.Path)
	if err != nil {
		return err
	}
	registry.Report(r, "mount", repo)
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return &registry.StatusError{
			Status: http.StatusMethodNotAllowed, Header: http.Header{"Allow": {"GET, HEAD"}},
			Err: oci.ErrUnsupported.Withf("method %.20q is not one of GET, HEAD", r.Method),
		}
	}
	// Before anything is looked up, so that nobody learns what exists.
	if err := h.authorize(r, repo); err != nil {
		return err
	}
	platform, err := platformOf(r.URL.Query())
	if err != nil {
		return err
	}
	capable, err := h.capable(r)
	if err != nil {
		return err
	}
	state, err := h.opts.Teleport.Find(r.Context(), repo, reference, platform)
	if err != nil {
		return explain(err)
	}
	// An image that nobody has had expanded is expanded for the first who wants to
	// mount it.
	if capable && state.Status == teleport.Absent && state.Operation.Status != operation.StatusCanceled {
		if state.Operation, err = h.opts.Teleport.Start(r.Context(), repo, state.Image.Manifest.Digest.String()); err != nil {
			return err
		}
		state.Status = teleport.Expanding
	}
	m := mountapi.Mount{Repository: repo, Digest: state.Image.Manifest.Digest, Platform: state.Image.Platform, Layers: []mountapi.Layer{}}
	switch {
	case !capable:
		h.blobs(r, &m, state)
	case state.Status != teleport.Ready:
		return notReady(repo, state)
	default:
		if err := h.disks(r.Context(), &m, state); err != nil {
			return err
		}
	}
	registry.WriteJSON(w, r, http.StatusOK, m)
	return nil
}

// authorize offers also Basic authentication, which the first clients of the API
// know only.
func (h *Handler) authorize(r *http.Request, repo string) error {
	err := registry.Authorize(r, h.opts.Authorizer, auth.ToRepository(repo, auth.ActionPull))
	var answer *registry.StatusError
	if errors.As(err, &answer) && answer.Status == http.StatusUnauthorized {
		realm := h.opts.Service
		if realm == "" {
			realm = "registry"
		}
		answer.Header.Add("Www-Authenticate", `Basic realm="`+realm+`"`)
	}
	return err
}

// platformOf returns the platform that a query asks for.
func platformOf(query url.Values) (oci.Platform, error) {
	s := query.Get("platform")
	if s == "" {
		s = "linux/amd64"
	}
	parts := strings.Split(s, "/")
	if len(parts) < 2 || len(parts) > 3 || parts[0] != "linux" || parts[1] == "" {
		return oci.Platform{}, badRequest("platform=%.60q: write linux/ARCHITECTURE[/VARIANT]", s)
	}
	return oci.Platform{OS: parts[0], Architecture: parts[1], Variant: strings.Join(parts[2:], "")}, nil
}

// capable reports whether a client can mount the registry's disks.
func (h *Handler) capable(r *http.Request) (bool, error) {
	switch s := strings.ToLower(r.Header.Get(mountapi.HeaderCapable)); s {
	case "false":
		return false, nil
	case "", "true":
	default:
		return false, badRequest("%s: %.40q is neither true nor false", mountapi.HeaderCapable, s)
	}
	region := r.Header.Get(mountapi.HeaderRegion)
	return region == "" || h.opts.Region == "" || strings.EqualFold(region, h.opts.Region), nil
}

// blobs answers with the layers as they were pushed.
func (h *Handler) blobs(r *http.Request, m *mountapi.Mount, state teleport.State) {
	m.Format = mountapi.FormatBlob
	for _, l := range state.Image.Layers {
		m.Layers = append(m.Layers, mountapi.Layer{
			Digest: l.Blob.Digest, DiffID: l.DiffID, Size: l.Blob.Size, MediaType: l.Blob.MediaType,
			URL: h.origin(r) + "/v2/" + m.Repository + "/blobs/" + l.Blob.Digest.String(),
		})
	}
}

// origin returns the URL by which the client reaches the registry.
func (h *Handler) origin(r *http.Request) string {
	if h.opts.ExternalURL != "" {
		return strings.TrimSuffix(h.opts.ExternalURL, "/")
	}
	u := url.URL{Scheme: "http", Host: r.Host}
	if r.TLS != nil || h.opts.TrustForwarded && r.Header.Get("X-Forwarded-Proto") == "https" {
		u.Scheme = "https"
	}
	return u.String()
}

// disks answers with the layers as they are on the share.
func (h *Handler) disks(ctx context.Context, m *mountapi.Mount, state teleport.State) error {
	c, err := h.opts.Credential(ctx, m.Repository)
	if err != nil {
		return fmt.Errorf("credential for the disks of %s: %w", m.Repository, err)
	}
	m.Format = mountapi.FormatVHD
	m.SMB = &mountapi.SMB{Server: h.opts.Server, Share: c.Share, Username: c.Username, Password: c.Password, Expires: c.Expires}
	share := url.URL{Scheme: "smb", Host: h.opts.Server, Path: "/" + c.Share}
	for _, d := range state.Disks {
		disk, sums := d.Paths()
		disk, sums = path.Join(c.Dir, disk), path.Join(c.Dir, sums)
		m.Layers = append(m.Layers, mountapi.Layer{
			Digest: d.Layer, DiffID: d.DiffID, Size: d.Size, URL: share.JoinPath(disk).String(), Path: disk, VHDDigest: d.Digest,
			Sums: &mountapi.Sums{Path: sums, Digest: d.SumsDigest, BlockSize: d.BlockSize},
		})
	}
	return nil
}

// notReady is the answer for an image whose layers can't be mounted.
func notReady(repo string, state teleport.State) error {
	op, digest := state.Operation, state.Image.Manifest.Digest
	progress := mountapi.Progress{Status: op.Status, ErrorCode: op.ErrorCode, Details: op.Details}
	if state.Status == teleport.Expanding {
		progress.Progress = fmt.Sprintf("%d%%", op.Progress)
	}
	detail, err := json.Marshal(progress)
	if err != nil {
		return err
	}
	switch state.Status {
	case teleport.Expanding:
		return &registry.StatusError{
			Status: http.StatusConflict, Header: http.Header{"Retry-After": {"2"}},
			Err: &oci.Error{Code: mountapi.CodeExpanding, Detail: detail, Message: fmt.Sprintf("the layers of %s@%s are being expanded, %d%%: ask again", repo, digest, op.Progress)},
		}
	case teleport.Failed:
		return &registry.StatusError{
			Status: http.StatusUnprocessableEntity,
			Err:    &oci.Error{Code: mountapi.CodeFailed, Detail: detail, Message: op.ErrorCode + ": " + op.Details},
		}
	}
	return &registry.StatusError{
		Status: http.StatusNotFound,
		Err: &oci.Error{Code: mountapi.CodeNotExpanded, Message: fmt.Sprintf(
			"the layers of %s@%s aren't expanded: the expansion was canceled: push the image again, or have it expanded with POST /acr/v1/%s/_teleport/%s", repo, digest, repo, digest)},
	}
}

// explain gives an error of Find its status.
func explain(err error) error {
	var answer *oci.Error
	if !errors.As(err, &answer) {
		return err
	}
	status := http.StatusNotFound
	switch {
	case errors.Is(err, teleport.ErrNotEnabled), errors.Is(err, convert.ErrResourceNotFound):
	case convert.Ineligible(err):
		status = http.StatusUnprocessableEntity
	default:
		return err
	}
	return &registry.StatusError{Status: status, Err: answer}
}

func badRequest(format string, args ...any) error {
	return &registry.StatusError{Status: http.StatusBadRequest, Err: &oci.Error{Code: "BAD_REQUEST", Message: fmt.Sprintf(format, args...)}}
}
