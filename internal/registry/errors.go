package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"syscall"

	"sluice/oci"
)

// StatusError is an error with a status that its code alone doesn't tell.
type StatusError struct {
	Status int
	Header http.Header // further headers of the response, may be nil
	Err    *oci.Error
}

// Error returns the message of Err.
func (e *StatusError) Error() string { return e.Err.Error() }

// Unwrap returns Err.
func (e *StatusError) Unwrap() error { return e.Err }

// Codes that the specification doesn't have, in the form of those it has.
const (
	codeNotFound   = "NOT_FOUND"
	codeBadRequest = "BAD_REQUEST"
	codePagination = "PAGINATION_NUMBER_INVALID" // as in Docker's registry
	codeTimeout    = "TIMEOUT"
	codeInternal   = "INTERNAL_ERROR"
	codeNoSpace    = "INSUFFICIENT_STORAGE"
)

func notFound(path string) error {
	return &StatusError{Status: http.StatusNotFound, Err: &oci.Error{Code: codeNotFound, Message: fmt.Sprintf("no such endpoint: %.200q", path)}}
}

func badRequest(format string, args ...any) error {
	return &StatusError{Status: http.StatusBadRequest, Err: &oci.Error{Code: codeBadRequest, Message: fmt.Sprintf(format, args...)}}
}

func methodNotAllowed(method string, allowed methods) error {
	names := slices.Sorted(maps.Keys(allowed))
	return &StatusError{
		Status: http.StatusMethodNotAllowed,
		Header: http.Header{"Allow": {strings.Join(names, ", ")}},
		Err:    oci.ErrUnsupported.Withf("method %.20q is not one of %s", method, strings.Join(names, ", ")),
	}
}

// statusOf returns the status of the specification's error codes.
func statusOf(code string) int {
	switch code {
	case oci.ErrBlobUnknown.Code, oci.ErrBlobUploadUnknown.Code, oci.ErrManifestUnknown.Code,
		oci.ErrManifestBlobUnknown.Code, oci.ErrNameUnknown.Code:
		return http.StatusNotFound
	case oci.ErrRangeInvalid.Code:
		return http.StatusRequestedRangeNotSatisfiable
	case oci.ErrUnauthorized.Code:
		return http.StatusUnauthorized
	case oci.ErrDenied.Code:
		return http.StatusForbidden
	case oci.ErrUnsupported.Code:
		return http.StatusMethodNotAllowed
	case oci.ErrTooManyRequests.Code:
		return http.StatusTooManyRequests
	}
	return http.StatusBadRequest
}

// statusClientGone is what the access log shows for a request whose client
// didn't wait for the answer. It is never sent.
const statusClientGone = 499

// WriteError answers a request with an error in the protocol's form, and tells
// the front's log of it. A *StatusError or *oci.Error tells the client what to
// do; what else went wrong inside is for the log, not for the client. If the
// response has begun, it is broken off.
func WriteError(w http.ResponseWriter, r *http.Request, err error) {
	if c := conversationOf(r.Context()); c != nil {
		c.fail(err)
		return
	}
	writeError(w, r, err)
}

func writeError(w http.ResponseWriter, r *http.Request, err error) {
	var status int
	var answer *oci.Error
	var he *StatusError
	var be *bodyError
	switch {
	case errors.As(err, &he):
		status, answer = he.Status, he.Err
		maps.Copy(w.Header(), he.Header)
	case errors.As(err, &answer):
		status = statusOf(answer.Code)
		if answer.Message != err.Error() {
			// With what was wrapped around it: which repository, which blob.
			answer = &oci.Error{Code: answer.Code, Message: err.Error(), Detail: answer.Detail}
		}
	case errors.Is(err, os.ErrDeadlineExceeded):
		status = http.StatusRequestTimeout
		answer = &oci.Error{Code: codeTimeout, Message: "the request's body stopped coming: send it again"}
		if r.ProtoMajor < 2 { // there, only the stream has to end
			w.Header().Set("Connection", "close")
		}
	case errors.As(err, &be), r.Context().Err() != nil, errors.Is(err, context.Canceled):
		status = statusClientGone
		answer = &oci.Error{Code: codeTimeout, Message: "the request's body ended early"}
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		status = http.StatusInsufficientStorage
		answer = &oci.Error{Code: codeNoSpace, Message: "the registry's disk is full"}
	default:
		status = http.StatusInternalServerError
		answer = &oci.Error{Code: codeInternal, Message: "internal error: the registry's log has it"}
	}
	body, merr := json.Marshal(struct {
		Errors []*oci.Error `json:"errors"`
	}{[]*oci.Error{answer}})
	if merr != nil { // a Detail that isn't JSON
		body = []byte(`{"errors":[{"code":"` + codeInternal + `"}]}`)
	}
	// Of a response that was being prepared.
	for _, h := range []string{"ETag", "Content-Range", "Cache-Control", "Accept-Ranges"} {
		if he == nil || he.Header.Get(h) == "" {
			w.Header().Del(h)
		}
	}
	writeBody(w, r, status, "application/json", body)
}

// writeBody answers with a small body.
func writeBody(w http.ResponseWriter, r *http.Request, status int, contentType string, body []byte) {
	h := w.Header()
	h.Set("Content-Type", contentType)
	h.Set("Content-Length", fmt.Sprint(len(body)))
	w.WriteHeader(status)
	if r.Method != http.MethodHead {
		_, _ = w.Write(body) // a client that has gone needs nothing more
	}
}

// WriteJSON answers with a document. Its Content-Type is application/json
// unless the header says otherwise already.
func WriteJSON(w http.ResponseWriter, r *http.Request, status int, doc any) {
	body, err := json.Marshal(doc)
	if err != nil {
		WriteError(w, r, err)
		return
	}
	contentType := w.Header().Get("Content-Type")
	if contentType == "" {
		contentType = "application/json"
	}
	writeBody(w, r, status, contentType, body)
}
