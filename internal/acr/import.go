package acr

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	"sluice/internal/auth"
	"sluice/internal/index"
	"sluice/internal/registry"
	"sluice/internal/remote"
	"sluice/oci"
)

// importQueue is the queue of imports in the index.
const importQueue = "import"

const memberImport = "source, target, username, password, platform, referrers, force, plainHTTP"

// importJob is what the queue keeps of an import. Its credentials are sealed.
type importJob struct {
	ImportRequest
	Credential []byte    `json:"credential,omitempty"`
	Actor      oci.Actor `json:"actor"`
}

// importTarget is where an import goes.
type importTarget struct {
	repo string
	tag  string // "": none
}

func (t importTarget) String() string {
	if t.tag == "" {
		return t.repo
	}
	return t.repo + ":" + t.tag
}

// parse checks a request and returns what it names.
func (r ImportRequest) parse() (source oci.Reference, target importTarget, err error) {
	if source, err = oci.ParseReference(r.Source); err != nil {
		return source, target, badRequest("source: %v", err)
	}
	target.repo = r.Target
	if target.repo == "" {
		target.repo = source.Repository
	}
	if repo, tag, ok := strings.Cut(target.repo, ":"); ok {
		target.repo, target.tag = repo, tag
	} else if source.Digest == "" {
		target.tag = source.Tag
	}
	if err := oci.CheckRepository(target.repo); err != nil {
		return source, target, fmt.Errorf("target %q is REPOSITORY:TAG, without this registry's host: %w", r.Target, err)
	}
	if target.tag != "" {
		if err := oci.CheckTag(target.tag); err != nil {
			return source, target, fmt.Errorf("target %q: %w", r.Target, err)
		}
	}
	if _, err := r.platforms(); err != nil {
		return source, target, err
	}
	if r.Password != "" && r.Username == "" {
		return source, target, badRequest("there is a password, but no username")
	}
	return source, target, nil
}

// platforms returns the platform that is wanted; none is all.
func (r ImportRequest) platforms() ([]oci.Platform, error) {
	if r.Platform == "" {
		return nil, nil
	}
	p := strings.Split(r.Platform, "/")
	if len(p) < 2 || len(p) > 3 || p[0] == "" || p[1] == "" {
		return nil, badRequest("platform %.60q: write OS/ARCHITECTURE, or OS/ARCHITECTURE/VARIANT", r.Platform)
	}
	platform := oci.Platform{OS: p[0], Architecture: p[1]}
	if len(p) == 3 {
		platform.Variant = p[2]
	}
	return []oci.Platform{platform}, nil
}

func (h *Handler) startImport(w http.ResponseWriter, r *http.Request, _ Request) error {
	var body ImportRequest
	if err := decode(r, &body, memberImport); err != nil {
		return err
	}
	_, target, err := body.parse()
	if err != nil {
		return err
	}
	if err := registry.Authorize(r, h.opts.Authorizer, access(target.repo, auth.ActionPush)...); err != nil {
		return err
	}
	ctx := r.Context()
	if target.tag != "" && !body.Force {
		_, err := h.registry.Tag(ctx, target.repo, target.tag)
		if err == nil {
			return ErrConflict.Withf("%s exists: choose another tag, or force the tag to move", target)
		}
		if !isUnknown(err) {
			return err
		}
	}
	key := target.String() // imports to one place happen one after the other
	job := importJob{ImportRequest: body, Actor: oci.ActorOf(ctx)}
	job.Username, job.Password = "", ""
	if job.Credential, err = h.seal(ctx, remote.Credential{Username: body.Username, Password: body.Password}, key); err != nil {
		return err
	}
	payload, err := json.Marshal(job)
	if err != nil {
		return err
	}
	var id string
	err = h.index.Update(ctx, func(tx *index.Tx) error {
		id = tx.Enqueue(importQueue, key, payload)
		return nil
	})
	if err != nil {
		return err
	}
	queued, err := h.index.Job(ctx, id)
	if err != nil {
		return err
	}
	select {
	case h.wake <- struct{}{}:
	default:
	}
	location := prefix + "_operations/" + queued.ID
	w.Header().Set("Location", location)
	w.Header().Set("Operation-Location", location)
	w.Header().Set("Operation-Id", queued.ID)
	registry.WriteJSON(w, r, http.StatusAccepted, h.operation(queued))
	return nil
}

func (h *Handler) getOperation(w http.ResponseWriter, r *http.Request, req Request) error {
	job, err := h.importJob(r, req)
	if err != nil {
		return err
	}
	registry.WriteJSON(w, r, http.StatusOK, h.operation(job))
	return nil
}

// importJob returns the import that a request names.
func (h *Handler) importJob(r *http.Request, req Request) (index.Job, error) {
	job, err := h.index.Job(r.Context(), req.Name)
	if err == nil && job.Queue != importQueue {
		err = index.ErrNotFound
	}
	if err != nil {
		return job, unknown(err, ErrOperationUnknown, "operation %.60s does not exist, or ended long ago", req.Name)
	}
	return job, nil
}

func (h *Handler) cancelOperation(w http.ResponseWriter, r *http.Request, req Request) error {
	job, err := h.importJob(r, req)
	if err != nil {
		return err
	}
	if !statusOfJob(job.State).Final() {
		if job, err = h.index.CancelJob(r.Context(), job.ID); err != nil {
			return unknown(err, ErrOperationUnknown, "operation %.60s does not exist", req.Name)
		}
	}
	op := h.operation(job)
	op.Name = "Cancel: " + op.Name
	registry.WriteJSON(w, r, http.StatusOK, op)
	return nil
}

// importProgress is the progress of a running import, as the queue keeps it.
type importProgress struct {
	Done int64 `json:"done"` // bytes that the registry has
	Size int64 `json:"size"` // of all blobs; 0 while it isn't known

	Failed string `json:"failed,omitempty"` // why the last attempt failed
}

// importResult is the result of an import that has ended.
type importResult struct {
	Digest  oci.Digest `json:"digest,omitempty"`
	Details string     `json:"details"`
}

// operation describes a job of the queue.
func (h *Handler) operation(job index.Job) Operation {
	op := Operation{ID: job.ID, Name: "Import", Status: statusOfJob(job.State), StartTime: job.Created, Updated: job.Updated}
	var payload importJob
	if json.Unmarshal(job.Payload, &payload) == nil {
		if _, target, err := payload.parse(); err == nil {
			op.Resource = target.String()
		}
	}
	var p importProgress
	var result importResult
	switch {
	case op.Status.Final():
		if json.Unmarshal(job.Result, &result) == nil {
			op.Digest, op.Details = result.Digest, result.Details
		}
		if op.Status == StatusSucceeded {
			op.Progress = "100%"
		}
	case json.Unmarshal(job.Progress, &p) == nil:
		if p.Size > 0 {
			op.Progress = fmt.Sprintf("%d%%", min(p.Done*100/p.Size, 99))
		}
		if p.Failed != "" {
			op.Details = "it will be tried again: " + p.Failed
		}
	}
	return op
}

// statusOfJob returns the status of a job's state.
func statusOfJob(state string) Status {
	switch state {
	case index.Running:
		return StatusRunning
	case index.Succeeded:
		return StatusSucceeded
	case index.Failed:
		return StatusFailed
	case index.Canceled:
		return StatusCanceled
	}
	return StatusNotStarted
}
