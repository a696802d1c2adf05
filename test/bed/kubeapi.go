package bed

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"go.yaml.in/yaml/v3"
)

// KubeAPI talks to an API server as one of its users.
type KubeAPI struct {
	server string
	token  string
	client *http.Client

	mu    sync.Mutex
	kinds map[string]kubeKind // guarded by mu: by "group/version Kind"
}

// kubeKind is how a kind is called in paths.
type kubeKind struct {
	Name       string
	Kind       string
	Namespaced bool
}

// KubeError is an answer of the API server that isn't the one asked for.
type KubeError struct {
	Code    int
	Message string
}

func (e *KubeError) Error() string {
	return fmt.Sprintf("the API server answered %d: %s", e.Code, e.Message)
}

// IsKubeCode reports whether err is the API server's, with the HTTP status.
func IsKubeCode(err error, code int) bool {
	var e *KubeError
	return errors.As(err, &e) && e.Code == code
}

// newKubeAPI returns a client for the API server on a host. Its certificate
// isn't checked: nobody else can listen there.
func newKubeAPI(h *Host, server, token string) *KubeAPI {
	return &KubeAPI{server: server, token: token, kinds: map[string]kubeKind{}, client: &http.Client{
		Timeout: 30 * time.Second,
		Transport: &http.Transport{
			DialContext:     h.Dial,
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
			IdleConnTimeout: 5 * time.Second,
		},
	}}
}

// As is the same API server with another user's token.
func (k *KubeAPI) As(token string) *KubeAPI {
	return &KubeAPI{server: k.server, token: token, kinds: map[string]kubeKind{}, client: k.client}
}

// Do sends a request. body is nil, JSON or YAML as bytes, or else something to
// be encoded as JSON; into is nil, a *string for the body as it is, or else
// something to decode JSON into.
func (k *KubeAPI) Do(ctx context.Context, method, path string, body, into any) error {
	return k.do(ctx, method, path, "application/json", body, into)
}

// Patch is Do with a JSON merge patch.
func (k *KubeAPI) Patch(ctx context.Context, path string, patch any) error {
	return k.do(ctx, http.MethodPatch, path, "application/merge-patch+json", patch, nil)
}

func (k *KubeAPI) do(ctx context.Context, method, path, contentType string, body, into any) error {
	sent, ok := body.([]byte)
	if !ok && body != nil {
		var err error
		if sent, err = json.Marshal(body); err != nil {
			return err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, k.server+path, bytes.NewReader(sent))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", contentType)
	req.Header.Set("Authorization", "Bearer "+k.token)
	resp, err := k.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if resp.StatusCode >= 300 {
		status := struct{ Message string }{string(got)}
		_ = json.Unmarshal(got, &status) // or else it is the text
		return fmt.Errorf("%s %s: %w", method, path, &KubeError{resp.StatusCode, status.Message})
	}
	switch into := into.(type) {
	case nil:
		return nil
	case *string:
		*into = string(got)
		return nil
	}
	if err := json.Unmarshal(got, into); err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	return nil
}

// kubeObject is what there is of an object in its path.
type kubeObject struct {
	APIVersion string `yaml:"apiVersion"`
	Kind       string
	Metadata   struct{ Name, Namespace string }
}

// Apply creates or updates the objects of a YAML text, as `kubectl apply
// --server-side` does, in order. Those without a namespace go to namespace.
func (k *KubeAPI) Apply(ctx context.Context, namespace, text string) error {
	return k.each(ctx, namespace, text, func(path string, doc []byte) error {
		return k.do(ctx, http.MethodPatch, path+"?fieldManager=test&force=true", "application/apply-patch+yaml", doc, nil)
	})
}

// Check is Apply that changes nothing: the API server says whether it would,
// and about fields that it doesn't know.
func (k *KubeAPI) Check(ctx context.Context, namespace, text string) error {
	return k.each(ctx, namespace, text, func(path string, doc []byte) error {
		return k.do(ctx, http.MethodPatch, path+"?fieldManager=test&force=true&dryRun=All&fieldValidation=Strict", "application/apply-patch+yaml", doc, nil)
	})
}

// Delete removes the objects of a YAML text; those that aren't there are fine.
// What belongs to them goes later.
func (k *KubeAPI) Delete(ctx context.Context, namespace, text string) error {
	return k.each(ctx, namespace, text, func(path string, _ []byte) error {
		err := k.Do(ctx, http.MethodDelete, path+"?propagationPolicy=Background", nil, nil)
		if IsKubeCode(err, http.StatusNotFound) {
			return nil
		}
		return err
	})
}

// each calls f with the path and text of each object of a YAML text.
func (k *KubeAPI) each(ctx context.Context, namespace, text string, f func(path string, doc []byte) error) error {
	for doc := range strings.SplitSeq("\n"+text, "\n---") {
		var o kubeObject
		if err := yaml.Unmarshal([]byte(doc), &o); err != nil {
			return fmt.Errorf("%w in:\n%s", err, doc)
		}
		if o.Kind == "" {
			continue // only comments
		}
		path, err := k.pathOf(ctx, namespace, o)
		if err != nil {
			return err
		}
		if err := f(path, []byte(doc)); err != nil {
			return err
		}
	}
	return nil
}

// pathOf asks the API server how a kind is called in paths.
func (k *KubeAPI) pathOf(ctx context.Context, namespace string, o kubeObject) (string, error) {
	base := "/apis/" + o.APIVersion
	if !strings.Contains(o.APIVersion, "/") {
		base = "/api/" + o.APIVersion
	}
	key := o.APIVersion + " " + o.Kind
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, ok := k.kinds[key]; !ok {
		var list struct{ Resources []kubeKind }
		if err := k.Do(ctx, http.MethodGet, base, nil, &list); err != nil {
			return "", err
		}
		for _, r := range list.Resources {
			if !strings.Contains(r.Name, "/") {
				k.kinds[o.APIVersion+" "+r.Kind] = r
			}
		}
	}
	kind, ok := k.kinds[key]
	if !ok {
		return "", fmt.Errorf("the API server knows no %s of %s", o.Kind, o.APIVersion)
	}
	if kind.Namespaced {
		if o.Metadata.Namespace != "" {
			namespace = o.Metadata.Namespace
		}
		base += "/namespaces/" + namespace
	}
	return base + "/" + kind.Name + "/" + o.Metadata.Name, nil
}
