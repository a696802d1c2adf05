package remote

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"unicode"

	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/errcode"

	"sluice/oci"
)

const (
	maxErrorBody    = 64 << 10 // of an answer that isn't what was asked for
	maxErrorMessage = 300      // of it that is shown
)

// errorf returns an error that names what was done and where.
func (r *Registry) errorf(c call, format string, args ...any) error {
	return fmt.Errorf("%s at %s: %w", c.what, r.host, fmt.Errorf(format, args...))
}

// ociErrorf is errorf for an error with a code.
func (r *Registry) ociErrorf(code *oci.Error, c call, format string, args ...any) error {
	return code.Withf("%s at %s: %s", c.what, r.host, fmt.Sprintf(format, args...))
}

// transportError is for a request that got no answer.
func (r *Registry) transportError(c call, err error) error {
	var token *errcode.ErrorResponse
	switch {
	case errors.Is(err, auth.ErrBasicCredentialNotFound):
		return r.ociErrorf(oci.ErrUnauthorized, c, "the registry wants a user name and a password, and there are none for it")
	case errors.As(err, &token) && token.StatusCode == http.StatusUnauthorized:
		return r.ociErrorf(oci.ErrUnauthorized, c, "no token: %s", tokenAnswer(token))
	case errors.As(err, &token) && token.StatusCode == http.StatusForbidden:
		return r.ociErrorf(oci.ErrDenied, c, "no token: %s", tokenAnswer(token))
	case errors.As(err, &token) && token.StatusCode == http.StatusTooManyRequests:
		return r.ociErrorf(oci.ErrTooManyRequests, c, "no token: %s", tokenAnswer(token))
	}
	return r.errorf(c, "%w", redact(err))
}

// tokenAnswer says what a token server answered.
func tokenAnswer(e *errcode.ErrorResponse) string {
	answer := fmt.Sprintf("HTTP %d", e.StatusCode)
	if e.URL != nil {
		answer += " of " + e.URL.Host
	}
	if len(e.Errors) > 0 {
		answer += ": " + snippet([]byte(e.Errors.Error()))
	}
	return answer
}

// redact hides the queries of URLs in an error's text: those of redirects to
// object stores and of token servers carry signatures and secrets.
func redact(err error) error {
	var located *url.Error
	if errors.As(err, &located) && err == error(located) {
		err = located.Err // what and where is said already
	}
	return &redacted{err}
}

type redacted struct{ err error }

var urlSecrets = regexp.MustCompile(`(https?://)([^/\s"@]*@)?([^\s"?]*)(\?[^\s"]*)?`)

func (e *redacted) Error() string { return urlSecrets.ReplaceAllString(e.err.Error(), "$1$3") }
func (e *redacted) Unwrap() error { return e.err }

// knownCode returns the error of that code, or nil: a code that nobody knows
// says less than the status.
func knownCode(code string) *oci.Error {
	for _, e := range []*oci.Error{
		oci.ErrBlobUnknown, oci.ErrBlobUploadInvalid, oci.ErrBlobUploadUnknown, oci.ErrDigestInvalid,
		oci.ErrManifestBlobUnknown, oci.ErrManifestInvalid, oci.ErrManifestUnknown, oci.ErrNameInvalid,
		oci.ErrNameUnknown, oci.ErrSizeInvalid, oci.ErrRangeInvalid, oci.ErrUnauthorized, oci.ErrDenied,
		oci.ErrUnsupported, oci.ErrTooManyRequests,
	} {
		if e.Code == code {
			return e
		}
	}
	return nil
}

// failure returns the error for an answer of an unwanted status, and closes it.
// unknown is what a 404 means here.
func (r *Registry) failure(c call, resp *http.Response, unknown *oci.Error) error {
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	if err != nil && len(body) == 0 {
		body = []byte("(the answer broke off)")
	}
	code, message := parseErrors(body)
	if code == nil || !plausible(code, resp.StatusCode) {
		code = codeOfStatus(resp.StatusCode, unknown)
	}
	if resp.StatusCode == http.StatusNotFound && unknown != nil && code.Code != oci.ErrNameUnknown.Code {
		code = unknown // a 404 of another thing can't be meant
	}
	answer := fmt.Sprintf("HTTP %d", resp.StatusCode)
	if elsewhere(c, resp) {
		answer += " of " + resp.Request.URL.Host + ", where the registry sends its clients"
	}
	if message == "" {
		message = snippet(body)
	}
	if message != "" {
		answer += ": " + message
	}
	if code == nil {
		return r.errorf(c, "unexpected answer: %s", answer)
	}
	return r.ociErrorf(code, c, "%s", answer)
}

// plausible reports whether a code fits the status it came with. Rate limits,
// ranges and authentication by the status outweigh what a body says.
func plausible(code *oci.Error, status int) bool {
	switch status {
	case http.StatusTooManyRequests:
		return code == oci.ErrTooManyRequests
	case http.StatusRequestedRangeNotSatisfiable:
		return code == oci.ErrRangeInvalid
	case http.StatusUnauthorized, http.StatusForbidden:
		return code == oci.ErrUnauthorized || code == oci.ErrDenied
	}
	return status >= 400 && status < 500
}

// codeOfStatus returns what a status without a usable body means, or nil.
func codeOfStatus(status int, unknown *oci.Error) *oci.Error {
	switch status {
	case http.StatusNotFound:
		return unknown
	case http.StatusUnauthorized:
		return oci.ErrUnauthorized
	case http.StatusForbidden:
		return oci.ErrDenied
	case http.StatusMethodNotAllowed, http.StatusNotImplemented:
		return oci.ErrUnsupported
	case http.StatusRequestEntityTooLarge:
		return oci.ErrSizeInvalid
	case http.StatusRequestedRangeNotSatisfiable:
		return oci.ErrRangeInvalid
	case http.StatusTooManyRequests:
		return oci.ErrTooManyRequests
	}
	return nil
}

// parseErrors reads a body as distribution-spec 1.1, "Error Codes", has it. The
// first known code counts.
func parseErrors(body []byte) (code *oci.Error, message string) {
	var doc struct {
		Errors []struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
	}
	if json.Unmarshal(body, &doc) != nil {
		return nil, ""
	}
	for _, e := range doc.Errors {
		if message == "" {
			message = snippet([]byte(e.Message))
		}
		if code = knownCode(e.Code); code != nil {
			if m := snippet([]byte(e.Message)); m != "" {
				message = m
			}
			break
		}
	}
	return code, message
}

// snippet returns the beginning of foreign text, fit for a message.
func snippet(body []byte) string {
	text := strings.Map(func(c rune) rune {
		if unicode.IsSpace(c) {
			return ' '
		}
		if !unicode.IsPrint(c) {
			return '.'
		}
		return c
	}, string(bytes.ToValidUTF8(body[:min(len(body), 4*maxErrorMessage)], []byte("."))))
	text = strings.Join(strings.Fields(urlSecrets.ReplaceAllString(text, "$1$3")), " ")
	if runes := []rune(text); len(runes) > maxErrorMessage {
		text = string(runes[:maxErrorMessage]) + "…"
	}
	return text
}
