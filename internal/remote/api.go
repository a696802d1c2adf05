package remote

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"strings"

	"sluice/oci"
)

// maxAnswer bounds an answer of Call, in bytes.
const maxAnswer = 16 << 20

// APIRequest is a request to an API that a registry has beside the
// distribution protocol, such as management.
type APIRequest struct {
	// What says in messages what it does: "deleting tag v1 of team/app".
	What string

	// Method is GET if empty.
	Method string

	// Path is absolute; what is in it needs no escaping. Query may be nil.
	Path  string
	Query url.Values

	// Header is sent, besides what all requests have; it may be nil.
	Header http.Header

	// Body is sent as JSON; nil for none.
	Body []byte

	// Scopes are those that a token for the request needs.
	Scopes []string
}

// APIAnswer is a successful answer, one of a status below 300.
type APIAnswer struct {
	Status int
	Header http.Header
	Body   []byte
}

// Call sends a request to an API of the registry's server with the credentials,
// time limits and, if it only reads, repetitions of all others. An answer of
// another status than 2xx is an error: an *oci.Error with the code and message
// that the server sent, whatever the code, where it sent one.
func (r *Registry) Call(ctx context.Context, req APIRequest) (APIAnswer, error) {
	if req.Method == "" {
		req.Method = http.MethodGet
	}
	u := *r.base
	u.Path, u.RawQuery = req.Path, req.Query.Encode()
	c := call{
		what: req.What, method: req.Method, url: &u, scopes: req.Scopes,
		header: http.Header{"Accept": {"application/json"}},
		again:  req.Method == http.MethodGet,
	}
	maps.Copy(c.header, req.Header)
	if req.Body != nil {
		c.header.Set("Content-Type", "application/json")
		c.size = int64(len(req.Body))
		c.body = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(req.Body)), nil }
	}
	resp, err := r.do(ctx, c)
	if err != nil {
		return APIAnswer{}, err
	}
	defer resp.Body.Close()
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return APIAnswer{}, r.apiFailure(c, resp)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return APIAnswer{}, r.errorf(c, "%w", redact(err))
	}
	if len(body) > maxAnswer {
		return APIAnswer{}, r.errorf(c, "the answer has more than %d bytes", maxAnswer)
	}
	return APIAnswer{Status: resp.StatusCode, Header: resp.Header, Body: body}, nil
}

// apiFailure is failure for an API with codes of its own.
func (r *Registry) apiFailure(c call, resp *http.Response) error {
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	if err != nil && len(body) == 0 {
		body = []byte("(the answer broke off)")
	}
	var doc struct {
		Errors []*oci.Error `json:"errors"`
	}
	if json.Unmarshal(body, &doc) == nil && len(doc.Errors) > 0 && doc.Errors[0] != nil {
		code, message := snippet([]byte(doc.Errors[0].Code)), snippet([]byte(doc.Errors[0].Message))
		if message == "" {
			message = fmt.Sprintf("HTTP %d", resp.StatusCode)
		}
		if code != "" {
			return fmt.Errorf("%s at %s: %w", c.what, r.host, &oci.Error{Code: code, Message: message})
		}
	}
	code := codeOfStatus(resp.StatusCode, oci.ErrUnsupported) // without an error of that API, there's none
	answer := strings.TrimSpace(fmt.Sprintf("HTTP %d %s", resp.StatusCode, snippet(body)))
	if code == nil {
		return r.errorf(c, "unexpected answer: %s", answer)
	}
	return r.ociErrorf(code, c, "%s", answer)
}
