package acr

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"sluice/internal/auth"
	"sluice/internal/operation"
	"sluice/internal/registry"
	"sluice/internal/remote"
	"sluice/oci"
)

// The names of operations on images.
const (
	ConversionName = "ArtifactStreamingConversion" // Azure Container Registry's
	ExpansionName  = "TeleportExpansion"           // ours: it has none
)

// imageService does what takes long with images: streaming.Service and
// teleport.Service.
type imageService interface {
	Latest(ctx context.Context, repo string, subject oci.Digest) (operation.Operation, error)
	Operation(ctx context.Context, repo, id string) (operation.Operation, error)
	Operations(ctx context.Context, repo string, n int) ([]operation.Operation, error)
	Cancel(ctx context.Context, repo, id string) (operation.Operation, error)
}

// namedService is a service and what its operations are called.
type namedService struct {
	name string
	imageService
}

// services returns those that this registry has.
func (h *Handler) services() (all []namedService, err error) {
	if h.opts.Streaming != nil {
		all = append(all, namedService{ConversionName, h.opts.Streaming})
	}
	if h.opts.Teleport != nil {
		all = append(all, namedService{ExpansionName, h.opts.Teleport})
	}
	if len(all) == 0 {
		err = oci.ErrUnsupported.Withf("this registry does nothing with images: set streaming.enabled or teleport.enabled in its configuration")
	}
	return all, err
}

// parseImageOperations recognises the operations on a repository's images.
func (r *Request) parseImageOperations(rest []string) {
	switch len(rest) {
	case 1:
		r.kind = "acr_operations"
		r.endpoints = endpoints{"GET": {(*Handler).listImageOperations, pulls}}
	case 2:
		r.parseOperation(rest[1], endpoints{"POST": {(*Handler).cancelImageOperation, pushes}}, endpoints{"GET": {(*Handler).getImageOperation, pulls}})
	}
}

// listImageOperations answers with the last n operations, the newest first.
func (h *Handler) listImageOperations(w http.ResponseWriter, r *http.Request, req Request) error {
	_, n, err := page(req)
	if err != nil {
		return err
	}
	if _, err := h.repository(r, req); err != nil {
		return err
	}
	services, err := h.services()
	if err != nil {
		return err
	}
	doc := operationsDocument{Operations: []Operation{}}
	for _, s := range services {
		list, err := s.Operations(r.Context(), req.Repository, n)
		if err != nil {
			return err
		}
		for _, op := range list {
			doc.Operations = append(doc.Operations, describeOperation(op, s.name))
		}
	}
	slices.SortStableFunc(doc.Operations, func(a, b Operation) int { return b.StartTime.Compare(a.StartTime) })
	doc.Operations = doc.Operations[:min(n, len(doc.Operations))]
	registry.WriteJSON(w, r, http.StatusOK, doc)
	return nil
}

func (h *Handler) getImageOperation(w http.ResponseWriter, r *http.Request, req Request) error {
	return h.answerOperation(w, r, req, "", imageService.Operation)
}

func (h *Handler) cancelImageOperation(w http.ResponseWriter, r *http.Request, req Request) error {
	return h.answerOperation(w, r, req, "Cancel: ", imageService.Cancel)
}

// answerOperation asks the services in turn for an operation: its ID is of one of
// them only.
func (h *Handler) answerOperation(w http.ResponseWriter, r *http.Request, req Request, prefix string,
	ask func(imageService, context.Context, string, string) (operation.Operation, error)) error {
	services, err := h.services()
	if err != nil {
		return err
	}
	for _, s := range services {
		var op operation.Operation
		op, err = ask(s.imageService, r.Context(), req.Repository, req.Name)
		if err == nil {
			registry.WriteJSON(w, r, http.StatusOK, describeOperation(op, prefix+s.name))
			return nil
		}
		if !errors.Is(err, operation.ErrUnknown) {
			break
		}
	}
	return err
}

func describeOperation(op operation.Operation, name string) Operation {
	answer := Operation{
		ID: op.ID, Name: name, Resource: op.Repo, Status: Status(op.Status),
		StartTime: op.Started.Truncate(time.Second), Updated: op.Updated.Truncate(time.Second),
		Progress: fmt.Sprintf("%d%%", op.Progress), Details: op.Details, ErrorCode: op.ErrorCode,
	}
	if op.Subject != "" {
		answer.Resource += "@" + op.Subject.String()
	}
	return answer
}

// answerLatest answers with the last operation on an image.
func answerLatest(service imageService, w http.ResponseWriter, r *http.Request, req Request) error {
	op, err := service.Latest(r.Context(), req.Repository, req.Digest)
	if err != nil {
		return err
	}
	locate(w, op)
	registry.WriteJSON(w, r, http.StatusOK, operationAnswer{op.ID, Status(op.Status)})
	return nil
}

// locate says where to ask for an operation.
func locate(w http.ResponseWriter, op operation.Operation) {
	location := prefix + op.Repo + "/_operations/" + op.ID
	w.Header().Set("Location", location)
	w.Header().Set("Operation-Location", location)
	w.Header().Set("Operation-Id", op.ID)
}

// imageOperation asks for an image's operation, or begins it: with ID and Status.
func (c *Client) imageOperation(ctx context.Context, req remote.APIRequest, repo, part string, digest oci.Digest, body any) (Operation, error) {
	var answer operationAnswer
	req.Path = repo + "/" + part + "/" + digest.String()
	_, err := c.call(ctx, req, body, &answer)
	return Operation{ID: answer.ID, Status: answer.Status, Resource: repo + "@" + digest.String()}, err
}

// ImageOperations returns the last operations on images of a repository whose name is
// ConversionName or ExpansionName, the newest first; of all names, at most a thousand
// are looked at. Errors: oci.ErrNameUnknown.
func (c *Client) ImageOperations(ctx context.Context, repo, name string) ([]Operation, error) {
	var doc operationsDocument
	_, err := c.call(ctx, remote.APIRequest{
		What: "listing operations of " + repo, Path: repo + "/_operations", Query: map[string][]string{"n": {fmt.Sprint(maxPage)}},
		Scopes: scope(repo, auth.ActionPull),
	}, nil, &doc)
	return slices.DeleteFunc(doc.Operations, func(op Operation) bool { return op.Name != name }), err
}

// ImageOperation returns what became of a conversion or an expansion. Errors:
// ErrOperationUnknown.
func (c *Client) ImageOperation(ctx context.Context, repo, id string) (op Operation, err error) {
	_, err = c.call(ctx, remote.APIRequest{What: "operation " + id + " of " + repo, Path: repo + "/_operations/" + id, Scopes: scope(repo, auth.ActionPull)}, nil, &op)
	return op, err
}

// CancelImageOperation ends a conversion or an expansion that hasn't ended yet.
// Errors: ErrOperationUnknown.
func (c *Client) CancelImageOperation(ctx context.Context, repo, id string) (op Operation, err error) {
	_, err = c.call(ctx, remote.APIRequest{
		What: "canceling operation " + id + " of " + repo, Method: http.MethodPost, Path: repo + "/_operations/" + id + ":cancel",
		Scopes: scope(repo, auth.ActionPull, auth.ActionPush),
	}, nil, &op)
	return op, err
}
