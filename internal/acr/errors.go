package acr

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"net/http"
	"slices"
	"strings"

	"sluice/internal/convert"
	"sluice/internal/index"
	"sluice/internal/registry"
	"sluice/internal/teleport"
	"sluice/oci"
)

// The codes that only this API has, in the form of the distribution
// specification's. TAG_UNKNOWN and OPERATION_UNKNOWN are ACR's.
var (
	ErrTagUnknown       = &oci.Error{Code: "TAG_UNKNOWN", Message: "tag unknown to registry"}
	ErrOperationUnknown = &oci.Error{Code: "OPERATION_UNKNOWN", Message: "the specified operation does not exist"}
	ErrTokenUnknown     = &oci.Error{Code: "TOKEN_UNKNOWN", Message: "no such token"}
	ErrScopeMapUnknown  = &oci.Error{Code: "SCOPE_MAP_UNKNOWN", Message: "no such scope map"}
	ErrConflict         = &oci.Error{Code: "CONFLICT", Message: "it is in another state"}

	errPage       = &oci.Error{Code: "PAGINATION_NUMBER_INVALID"}
	errBadRequest = &oci.Error{Code: "BAD_REQUEST"}
	errNotFound   = &oci.Error{Code: "NOT_FOUND"}
)

// statusOf returns the status of a code that package registry doesn't know, or
// 0.
func statusOf(code string) int {
	switch code {
	case ErrTagUnknown.Code, ErrOperationUnknown.Code, convert.ErrResourceNotFound.Code, teleport.ErrNotEnabled.Code, ErrTokenUnknown.Code, ErrScopeMapUnknown.Code, errNotFound.Code:
		return http.StatusNotFound
	case ErrConflict.Code:
		return http.StatusConflict
	}
	return 0
}

// writeError answers with an error.
func writeError(w http.ResponseWriter, r *http.Request, err error) {
	var answer *oci.Error
	var known *registry.StatusError
	if errors.As(err, &answer) && !errors.As(err, &known) {
		if status := statusOf(answer.Code); status != 0 {
			err = &registry.StatusError{Status: status, Err: &oci.Error{Code: answer.Code, Message: err.Error(), Detail: answer.Detail}}
		}
	}
	registry.WriteError(w, r, err)
}

func badRequest(format string, args ...any) error { return errBadRequest.Withf(format, args...) }

func notFound(path string) error { return errNotFound.Withf("no such endpoint: %.200q", path) }

func methodNotAllowed(method string, allowed endpoints) error {
	names := strings.Join(slices.Sorted(maps.Keys(allowed)), ", ")
	return &registry.StatusError{
		Status: http.StatusMethodNotAllowed, Header: http.Header{"Allow": {names}},
		Err: oci.ErrUnsupported.Withf("method %.20q is not one of %s", method, names),
	}
}

// isUnknown reports whether something wasn't there.
func isUnknown(err error) bool {
	return errors.Is(err, index.ErrNotFound) || errors.Is(err, oci.ErrNameUnknown) || errors.Is(err, oci.ErrManifestUnknown)
}

// unknown turns "not found" into the code of what was looked for.
func unknown(err error, code *oci.Error, format string, args ...any) error {
	if errors.Is(err, index.ErrNotFound) {
		return code.Withf(format, args...)
	}
	return err
}

// maxBody bounds a request's body, in bytes.
const maxBody = 64 << 10

// decode reads a request's body, one JSON object with the members of v and no
// others. members tells in messages which there are.
func decode(r *http.Request, v any, members string) error {
	body, err := io.ReadAll(io.LimitReader(r.Body, maxBody+1))
	if err != nil {
		return err
	}
	if len(body) > maxBody {
		return oci.ErrSizeInvalid.Withf("the body has more than %d bytes", maxBody)
	}
	if r.Method == http.MethodPost && len(body) > 0 {
		// A form on a web page could send anything else with its visitor's
		// credentials.
		if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != "application/json" {
			return badRequest("Content-Type is %.60q: send application/json", r.Header.Get("Content-Type"))
		}
	}
	d := json.NewDecoder(strings.NewReader(string(body)))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return badRequest("the body: %s: it is a JSON object with members of %s", describe(err), members)
	}
	if d.More() {
		return badRequest("the body goes on after its JSON object")
	}
	return nil
}

// describe says without Go's words what was wrong with JSON.
func describe(err error) string {
	var kind *json.UnmarshalTypeError
	switch {
	case errors.Is(err, io.EOF):
		return "it is empty"
	case errors.As(err, &kind):
		return fmt.Sprintf("member %q can't be a %s", kind.Field, kind.Value)
	}
	return strings.TrimPrefix(err.Error(), "json: ")
}
