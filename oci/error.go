package oci

import (
	"encoding/json"
	"fmt"
)

// Error is a failure as the distribution protocol spells it: a code that
// programs compare, a message for people, an optional detail. Its Is method
// compares codes, so errors.Is(err, ErrBlobUnknown) works for an error that
// came over a wire.
type Error struct {
	Code    string          `json:"code"`
	Message string          `json:"message,omitempty"`
	Detail  json.RawMessage `json:"detail,omitempty"`
}

// The codes of distribution-spec 1.1, section "Error Codes", and RANGE_INVALID,
// which servers use for a 416.
var (
	ErrBlobUnknown         = &Error{Code: "BLOB_UNKNOWN", Message: "blob unknown to registry"}
	ErrBlobUploadInvalid   = &Error{Code: "BLOB_UPLOAD_INVALID", Message: "blob upload invalid"}
	ErrBlobUploadUnknown   = &Error{Code: "BLOB_UPLOAD_UNKNOWN", Message: "blob upload unknown to registry"}
	ErrDigestInvalid       = &Error{Code: "DIGEST_INVALID", Message: "provided digest did not match content"}
	ErrManifestBlobUnknown = &Error{Code: "MANIFEST_BLOB_UNKNOWN", Message: "manifest references a manifest or blob unknown to registry"}
	ErrManifestInvalid     = &Error{Code: "MANIFEST_INVALID", Message: "manifest invalid"}
	ErrManifestUnknown     = &Error{Code: "MANIFEST_UNKNOWN", Message: "manifest unknown to registry"}
	ErrNameInvalid         = &Error{Code: "NAME_INVALID", Message: "invalid repository name"}
	ErrNameUnknown         = &Error{Code: "NAME_UNKNOWN", Message: "repository name not known to registry"}
	ErrSizeInvalid         = &Error{Code: "SIZE_INVALID", Message: "provided length did not match content length"}
	ErrRangeInvalid        = &Error{Code: "RANGE_INVALID", Message: "invalid content range"}
	ErrUnauthorized        = &Error{Code: "UNAUTHORIZED", Message: "authentication required"}
	ErrDenied              = &Error{Code: "DENIED", Message: "requested access to the resource is denied"}
	ErrUnsupported         = &Error{Code: "UNSUPPORTED", Message: "the operation is unsupported"}
	ErrTooManyRequests     = &Error{Code: "TOOMANYREQUESTS", Message: "too many requests"}
)

// Error returns the message, which says what failed and on what.
func (e *Error) Error() string {
	if e.Message == "" {
		return e.Code
	}
	return e.Message
}

// Is reports whether target is an *Error with the same code.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code == e.Code
}

// Withf returns an error of the same code with a message of its own.
func (e *Error) Withf(format string, args ...any) *Error {
	return &Error{Code: e.Code, Message: fmt.Sprintf(format, args...)}
}
