package acr

import (
	"context"
	"net/http"

	"sluice/internal/auth"
	"sluice/internal/registry"
	"sluice/internal/remote"
	"sluice/internal/teleport"
	"sluice/oci"
)

// parseTeleport recognises the expansion of an image.
func (r *Request) parseTeleport(rest []string) {
	if len(rest) == 2 {
		r.kind, r.Digest = "acr_teleport_image", oci.Digest(rest[1])
		r.endpoints = endpoints{"GET": {(*Handler).latestExpansion, pulls}, "POST": {(*Handler).startExpansion, pushes}}
	}
}

// expander returns what expands images.
func (h *Handler) expander() (*teleport.Service, error) {
	if h.opts.Teleport == nil {
		return nil, oci.ErrUnsupported.Withf("this registry doesn't expand layers for Teleport: set teleport.enabled in its configuration")
	}
	return h.opts.Teleport, nil
}

func (h *Handler) startExpansion(w http.ResponseWriter, r *http.Request, req Request) error {
	var body struct{}
	if err := decode(r, &body, "nothing: {}"); err != nil {
		return err
	}
	service, err := h.expander()
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

func (h *Handler) latestExpansion(w http.ResponseWriter, r *http.Request, req Request) error {
	service, err := h.expander()
	if err != nil {
		return err
	}
	return answerLatest(service, w, r, req)
}

// StartExpansion has an image or index expanded for Teleport, also one whose
// expansion has failed or was canceled; if that is going on, it's the operation that
// does it. Its ID and Status are set. Errors: those of package convert;
// oci.ErrUnsupported where the registry doesn't expand; teleport.ErrNotEnabled where
// the repository doesn't take part.
func (c *Client) StartExpansion(ctx context.Context, repo string, digest oci.Digest) (Operation, error) {
	return c.imageOperation(ctx, remote.APIRequest{
		What: "expanding " + digest.String() + " of " + repo, Method: http.MethodPost, Scopes: scope(repo, auth.ActionPull, auth.ActionPush),
	}, repo, "_teleport", digest, struct{}{})
}

// LatestExpansion returns the last operation that expanded an image or index, with ID
// and Status. Errors: ErrOperationUnknown.
func (c *Client) LatestExpansion(ctx context.Context, repo string, digest oci.Digest) (Operation, error) {
	return c.imageOperation(ctx, remote.APIRequest{
		What: "expansion of " + digest.String() + " of " + repo, Scopes: scope(repo, auth.ActionPull),
	}, repo, "_teleport", digest, nil)
}
