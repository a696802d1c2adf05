package remote

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"sluice/oci"
)

// maxRefusals bounds how often one request is repeated because of what it said
// of itself: once for a token that ran out, and once for each credential.
const maxRefusals = 8

// Refusal is that a registry didn't accept a credential.
type Refusal struct {
	Credential Credential

	// Reason is the registry's answer: "HTTP 401: the password has expired".
	Reason string
}

// refusalKey is the context key of a Refusal.
type refusalKey struct{}

// RefusalOf tells a CredentialFunc, by its context, that it is asked for another
// credential because this one was refused. ok is false when it is asked for the
// first time.
func RefusalOf(ctx context.Context) (r Refusal, ok bool) {
	r, ok = ctx.Value(refusalKey{}).(Refusal)
	return r, ok
}

// refused returns what a registry or its token server said when it didn't accept
// who we are, with the code for it; or nil. The answer can still be read. That of
// an object store, where the registry sent us, is not about who we are.
func (r *Registry) refused(c call, resp *http.Response, err error) (code *oci.Error, reason string) {
	if err != nil {
		if errors.As(err, &code) && (errors.Is(err, oci.ErrUnauthorized) || errors.Is(err, oci.ErrDenied)) {
			return code, strings.TrimPrefix(code.Message, fmt.Sprintf("%s at %s: ", c.what, r.host))
		}
		return nil, ""
	}
	if s := resp.StatusCode; s != http.StatusUnauthorized && s != http.StatusForbidden || elsewhere(c, resp) {
		return nil, ""
	}
	return codeOfStatus(resp.StatusCode, nil), answerOf(resp)
}

// answerOf returns the status and message of an answer, which can still be read.
func answerOf(resp *http.Response) string {
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	if err != nil && len(body) == 0 {
		return fmt.Sprintf("HTTP %d", resp.StatusCode)
	}
	resp.Body = struct {
		io.Reader
		io.Closer
	}{bytes.NewReader(body), resp.Body}
	_, message := parseErrors(body)
	if message == "" {
		message = snippet(body)
	}
	if message == "" {
		return fmt.Sprintf("HTTP %d", resp.StatusCode)
	}
	return fmt.Sprintf("HTTP %d: %s", resp.StatusCode, message)
}

// another reports whether a request that was refused should be tried again: with
// a new token, since its own may have run out (not every registry says 401
// then), or with another credential. An error tells why there's none.
func (r *Registry) another(ctx context.Context, l *login, reason string) (bool, error) {
	t, fresh := l.last()
	if t == nil {
		return false, nil // it said nothing of itself
	}
	r.tokens.forget(t)
	if !fresh {
		return true, nil
	}
	if !t.got {
		return false, nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, r.opts.ReadTimeout, &slowError{r.opts.ReadTimeout})
	defer cancel()
	next, err := r.opts.Credentials(context.WithValue(ctx, refusalKey{}, Refusal{t.from, reason}), credentialHost(r.base.Host))
	return err == nil && next != t.from, err
}
