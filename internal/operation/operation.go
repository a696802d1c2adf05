// Package operation does what takes long: jobs of the index's queues, each on one
// image, that are leased, told of, canceled, tried again, and taken up by another
// process when theirs is killed. Package streaming converts images with it, and
// package teleport expands them; what they do with an image is their own, what
// becomes of an operation is decided here.
//
// Start with Runner (runner.go); work.go is one job from lease to end.
//
// # Queues
//
// Each repository has a queue, named by Options.Queues and the repository, and a
// job's key is the digest of what it is about, so that one image is worked on by
// one worker at a time. Workers take jobs from the queues in turn: a repository
// with a thousand images keeps nobody else's waiting for more than one of them.
//
// A worker has a lease on its job and extends it while it works, with the
// progress. It learns then that the job is to be canceled, or was given to
// somebody else, and stops at once; Work.Hold tells it right before it publishes
// something. What fails for a reason that may pass, such as a full disk, is tried
// again some minutes long.
package operation

import (
	"encoding/json"
	"fmt"
	"time"

	"sluice/internal/index"
	"sluice/oci"
)

// ErrUnknown is the error for operations that don't exist, or ended long ago.
var ErrUnknown = &oci.Error{Code: "OPERATION_UNKNOWN", Message: "the specified operation does not exist"}

// CodeUnknown is Azure Container Registry's code for what went wrong inside.
const CodeUnknown = "UNKNOWN_ERROR"

// The states of an operation, as Azure Container Registry has them. The last
// three are final.
const (
	StatusNotStarted = "NotStarted"
	StatusRunning    = "Running"
	StatusSucceeded  = "Succeeded"
	StatusFailed     = "Failed"
	StatusCanceled   = "Canceled"
)

// Operation is what became of a job.
type Operation struct {
	ID, Repo         string
	Subject          oci.Digest // what it is about; empty: the repository
	Status           string
	Started, Updated time.Time
	Progress         int    // percent
	Details          string // for people
	ErrorCode        string // if it failed
}

// active reports whether a job waits or is being done.
func active(job index.Job) bool { return job.State == index.Queued || job.State == index.Running }

// progress is what a worker tells of a job under way.
type progress struct {
	Percent  int    `json:"percent"`
	Failures int    `json:"failures,omitempty"` // attempts that failed
	Failure  string `json:"failure,omitempty"`  // why the last of them did
}

// outcome is the result of a job that has ended.
type outcome struct {
	Code    string `json:"code,omitempty"`
	Message string `json:"message,omitempty"`
}

// describe describes a job. Progress and result that can't be read are those of
// no worker, and left out.
func (r *Runner) describe(repo string, job index.Job) Operation {
	op := Operation{ID: job.ID, Repo: repo, Subject: oci.Digest(job.Key), Started: job.Created, Updated: job.Updated}
	var p progress
	var end outcome
	_ = json.Unmarshal(job.Progress, &p)
	_ = json.Unmarshal(job.Result, &end)
	op.Progress, op.ErrorCode = p.Percent, end.Code
	resource, verb := repo+"@"+job.Key, "started"
	if job.Key == "" {
		resource = repo
	}
	switch {
	case job.State == index.Succeeded:
		op.Status, op.Progress, verb = StatusSucceeded, 100, "succeeded"
	case job.State == index.Failed:
		op.Status, verb = StatusFailed, "failed"
	case job.State == index.Canceled || job.Canceling:
		op.Status, verb = StatusCanceled, "canceled"
	case job.State == index.Queued && job.Attempts == 0:
		op.Status = StatusNotStarted
	default:
		op.Status = StatusRunning
		if p.Percent > 0 {
			verb = "ongoing"
		}
		if p.Failure != "" {
			end.Message = fmt.Sprintf("attempt %d failed and it is tried again: %s", p.Failures, p.Failure)
		}
	}
	op.Details = fmt.Sprintf("%s %s for resource %s", r.opts.Noun, verb, resource)
	if end.Message != "" {
		op.Details += ": " + end.Message
	}
	if r.opts.Describe != nil {
		r.opts.Describe(&op, job)
	}
	return op
}
