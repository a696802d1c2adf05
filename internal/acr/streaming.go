package acr

import (
	"context"
	"net/http"

	"sluice/internal/artifact"
	"sluice/internal/auth"
	"sluice/internal/registry"
	"sluice/internal/remote"
	"sluice/internal/streaming"
	"sluice/oci"
)

const (
	memberStreaming  = "convertPushedImages, conversionFormat, conversionVersion, backfill"
	memberConversion = "conversionFormat, conversionVersion"

	// formatOverlaybd is what clients of Azure Container Registry ask for. They
	// get ours, and the answer says so.
	formatOverlaybd = "overlaybd"
)

func pulls(req Request) []auth.Access { return access(req.Repository, auth.ActionPull) }

// pushes is the access of whoever has something converted: it adds to the
// repository.
func pushes(req Request) []auth.Access { return access(req.Repository, auth.ActionPush) }

// parseStreaming recognises what of a repository has to do with conversion.
func (r *Request) parseStreaming(rest []string) {
	switch len(rest) {
	case 1:
		r.kind = "acr_streaming"
		r.endpoints = endpoints{"GET": {(*Handler).getStreaming, pulls}, "POST": {(*Handler).updateStreaming, pushes}}
	case 2:
		r.kind, r.Digest = "acr_streaming_image", oci.Digest(rest[1])
		r.endpoints = endpoints{"GET": {(*Handler).latestConversion, pulls}, "POST": {(*Handler).startConversion, pushes}}
	}
}

// check returns an error for a conversion that isn't done here.
func (r conversionRequest) check() error {
	switch r.Format {
	case "", formatOverlaybd, artifact.Format:
	default:
		return badRequest("conversionFormat %.60q: it is %s here; %s is taken for it", r.Format, artifact.Format, formatOverlaybd)
	}
	if r.Version != "" && r.Version != artifact.Version {
		return badRequest("conversionVersion %.60q: it is %s", r.Version, artifact.Version)
	}
	return nil
}

// converter returns what converts images.
func (h *Handler) converter() (*streaming.Service, error) {
	if h.opts.Streaming == nil {
		return nil, oci.ErrUnsupported.Withf("this registry doesn't convert images: set streaming.enabled in its configuration")
	}
	return h.opts.Streaming, nil
}

func (h *Handler) getStreaming(w http.ResponseWriter, r *http.Request, req Request) error {
	repo, err := h.repository(r, req)
	if err != nil {
		return err
	}
	registry.WriteJSON(w, r, http.StatusOK, Streaming{repo.Attributes.StreamingEnabled})
	return nil
}

func (h *Handler) updateStreaming(w http.ResponseWriter, r *http.Request, req Request) error {
	var body streamingRequest
	if err := decode(r, &body, memberStreaming); err != nil {
		return err
	}
	if err := body.check(); err != nil {
		return err
	}
	if body.ConvertPushedImages == nil {
		return badRequest("convertPushedImages is missing: say true or false")
	}
	service, err := h.converter()
	if err != nil {
		return err
	}
	op, err := service.SetEnabled(r.Context(), req.Repository, *body.ConvertPushedImages, body.Backfill)
	if err != nil {
		return unknown(err, oci.ErrNameUnknown, "repository %s is not known to the registry", req.Repository)
	}
	locate(w, op)
	registry.WriteJSON(w, r, http.StatusAccepted, streamingAnswer{
		Streaming: Streaming{*body.ConvertPushedImages}, Format: artifact.Format, Version: artifact.Version,
		operationAnswer: operationAnswer{op.ID, Status(op.Status)},
	})
	return nil
}

func (h *Handler) startConversion(w http.ResponseWriter, r *http.Request, req Request) error {
	var body conversionRequest
	if err := decode(r, &body, memberConversion); err != nil {
		return err
	}
	if err := body.check(); err != nil {
		return err
	}
	service, err := h.converter()
	if err != nil {
		return err
	}
	op, err := service.Start(r.Context(), req.Repository, req.Digest.String())
	if err != nil {
		return err
	}
	locate(w, op)
	registry.WriteJSON(w, r, http.StatusAccepted, operationAnswer{op.ID, Status(op.Status)})
	return nil
}

func (h *Handler) latestConversion(w http.ResponseWriter, r *http.Request, req Request) error {
	service, err := h.converter()
	if err != nil {
		return err
	}
	return answerLatest(service, w, r, req)
}

// Streaming returns whether a repository's images are converted when they are
// pushed. Errors: oci.ErrNameUnknown.
func (c *Client) Streaming(ctx context.Context, repo string) (s Streaming, err error) {
	_, err = c.call(ctx, remote.APIRequest{What: "streaming of " + repo, Path: repo + "/_streaming", Scopes: scope(repo, auth.ActionPull)}, nil, &s)
	return s, err
}

// SetStreaming switches that on or off. Errors: oci.ErrNameUnknown.
func (c *Client) SetStreaming(ctx context.Context, repo string, enabled bool) (Operation, error) {
	return c.setStreaming(ctx, repo, enabled, false)
}

// BackfillStreaming switches it on, and has the images converted that are there.
func (c *Client) BackfillStreaming(ctx context.Context, repo string) (Operation, error) {
	return c.setStreaming(ctx, repo, true, true)
}

func (c *Client) setStreaming(ctx context.Context, repo string, enabled, backfill bool) (Operation, error) {
	var answer streamingAnswer
	_, err := c.call(ctx, remote.APIRequest{
		What: "setting streaming of " + repo, Method: http.MethodPost, Path: repo + "/_streaming",
		Scopes: scope(repo, auth.ActionPull, auth.ActionPush),
	}, streamingRequest{conversionRequest{artifact.Format, artifact.Version}, &enabled, backfill}, &answer)
	return Operation{ID: answer.ID, Status: answer.Status, Resource: repo}, err
}

// StartStreaming has an image or index converted; if that is going on, it's the
// operation that does it. Its ID and Status are set. Errors: those of package
// convert; oci.ErrUnsupported where the registry doesn't convert.
func (c *Client) StartStreaming(ctx context.Context, repo string, digest oci.Digest) (Operation, error) {
	return c.conversion(ctx, remote.APIRequest{
		What: "converting " + digest.String() + " of " + repo, Method: http.MethodPost, Scopes: scope(repo, auth.ActionPull, auth.ActionPush),
	}, repo, digest, conversionRequest{artifact.Format, artifact.Version})
}

// LatestStreaming returns the last operation that converted an image or index,
// with ID and Status. Errors: ErrOperationUnknown.
func (c *Client) LatestStreaming(ctx context.Context, repo string, digest oci.Digest) (Operation, error) {
	return c.conversion(ctx, remote.APIRequest{
		What: "conversion of " + digest.String() + " of " + repo, Scopes: scope(repo, auth.ActionPull),
	}, repo, digest, nil)
}

func (c *Client) conversion(ctx context.Context, req remote.APIRequest, repo string, digest oci.Digest, body any) (Operation, error) {
	return c.imageOperation(ctx, req, repo, "_streaming", digest, body)
}
