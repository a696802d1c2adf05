// Package apiserver is a kube.Cluster at a real Kubernetes API server.
//
// Of client-go it takes what finds the API server and proves who asks
// (kubeconfig files, a pod's service account, certificates, plug-ins). The few
// requests are made by hand: typed clients know all of Kubernetes' kinds, which
// takes more memory than everything else here.
//
// A pod is looked at by a patch of its status that changes nothing: the answer
// to a patch is the object, and so the reporter needs no right to read pods.
package apiserver

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"sluice/internal/kube"
)

// maxAnswer bounds an answer, in bytes. Objects have at most 3 MiB or so.
const maxAnswer = 8 << 20

// Cluster is the cluster behind an API server.
type Cluster struct {
	base   string // URL before /api
	client *http.Client
}

var _ kube.Cluster = (*Cluster)(nil)

// Open returns the cluster that a kubeconfig file names, or without one that in
// whose pod the process runs. It doesn't connect. userAgent is what the API
// server's log calls the process.
func Open(kubeconfig, userAgent string) (*Cluster, error) {
	config, err := load(kubeconfig)
	if err != nil {
		return nil, err
	}
	config.UserAgent = userAgent
	config.QPS = -1 // the reporter has a limit of its own
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("how to connect to the API server: %w", err)
	}
	base, _, err := rest.DefaultServerUrlFor(config)
	if err != nil {
		return nil, fmt.Errorf("the API server's address: %w", err)
	}
	return &Cluster{base: strings.TrimSuffix(base.String(), "/"), client: client}, nil
}

func load(kubeconfig string) (*rest.Config, error) {
	if kubeconfig != "" {
		config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
		if err != nil {
			return nil, fmt.Errorf("kubeconfig %s: %w", kubeconfig, err)
		}
		return config, nil
	}
	config, err := rest.InClusterConfig()
	if errors.Is(err, rest.ErrNotInCluster) {
		return nil, errors.New("there's no API server to report to: this process isn't in a pod; name a file with --kubeconfig")
	}
	if err != nil {
		return nil, fmt.Errorf("this pod has no service account's token (is automountServiceAccountToken false?): %w; mount one, or name a file with --kubeconfig", err)
	}
	return config, nil
}

// Close ends idle connections.
func (c *Cluster) Close() error {
	c.client.CloseIdleConnections()
	return nil
}

// Kinds of patches.
const (
	strategic = "application/strategic-merge-patch+json" // lists of conditions are merged by type
	merge     = "application/merge-patch+json"
)

// metadataOnly asks for objects without their contents.
const metadataOnly = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"

// open sends a request and returns the answer's body. The path is escaped.
func (c *Cluster) open(ctx context.Context, method, path, query, contentType string, body any) (io.ReadCloser, error) {
	var content io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		content = bytes.NewReader(b)
	}
	if query != "" {
		query = "?" + query
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base+path+query, content)
	if err != nil {
		return nil, err
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	accept := "application/json"
	if strings.HasPrefix(path, "/api/v1/nodes") {
		accept = metadataOnly + ", application/json"
	}
	req.Header.Set("Accept", accept)
	resp, err := c.client.Do(req)
	if err != nil {
		return nil, unavailable(ctx, err)
	}
	if resp.StatusCode/100 == 2 {
		return resp.Body, nil
	}
	defer resp.Body.Close()
	return nil, failure(resp)
}

// unavailable is the error of a request without an answer.
func unavailable(ctx context.Context, err error) error {
	if cause := ctx.Err(); errors.Is(cause, context.Canceled) {
		return cause
	}
	var u *url.Error // names a URL that says nothing to people
	if errors.As(err, &u) {
		err = u.Err
	}
	return &kube.Unavailable{Err: err}
}

// failure is the error that an answer means.
func failure(resp *http.Response) error {
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10)) // what came is told
	var s metav1.Status
	if json.Unmarshal(b, &s) != nil || s.Message == "" {
		s.Message = fmt.Sprintf("%s: %.200s", resp.Status, b)
	}
	switch resp.StatusCode {
	case http.StatusForbidden:
		// Its admission says this when it has just begun, and means 503.
		if !strings.Contains(s.Message, "not yet ready to handle request") {
			return fmt.Errorf("%w: %s", kube.ErrForbidden, s.Message)
		}
	case http.StatusNotFound:
		return fmt.Errorf("%w: %s", kube.ErrNotFound, s.Message)
	case http.StatusConflict:
		if s.Reason == metav1.StatusReasonAlreadyExists {
			return fmt.Errorf("%w: %s", kube.ErrExists, s.Message)
		}
		// Somebody else wrote at the same time, more often than the API server
		// tries again by itself.
	case http.StatusUnauthorized, http.StatusRequestTimeout, http.StatusTooManyRequests:
		// A token is renewed, a time-out and a limit pass.
	default:
		if s.Details != nil && slices.ContainsFunc(s.Details.Causes, func(c metav1.StatusCause) bool { return c.Field == "metadata.uid" }) {
			return fmt.Errorf("%w: %s", kube.ErrConflict, s.Message) // a UID can't be changed
		}
		if resp.StatusCode/100 == 4 {
			return fmt.Errorf("%w: %s", kube.ErrRefused, s.Message)
		}
	}
	u := &kube.Unavailable{Answered: true, Err: errors.New(s.Message)}
	if n, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && n > 0 {
		u.After = time.Duration(n) * time.Second
	}
	return u
}

// do sends a request and decodes the answer, which may be nil.
func (c *Cluster) do(ctx context.Context, method, path, contentType string, body, answer any) error {
	r, err := c.open(ctx, method, path, "", contentType, body)
	if err != nil {
		return err
	}
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, maxAnswer)) // to its end, so that the connection can be used again
	if err != nil {
		return unavailable(ctx, err)
	}
	if answer == nil {
		return nil
	}
	if err := json.Unmarshal(b, answer); err != nil {
		return &kube.Unavailable{Answered: true, Err: fmt.Errorf("answer to %s %s: %w", method, path, err)}
	}
	return nil
}

// Works implements kube.Cluster.
func (c *Cluster) Works(ctx context.Context, node string) error {
	return c.do(ctx, http.MethodGet, nodePath(node), "", nil, nil)
}

func nodePath(node string) string { return "/api/v1/nodes/" + url.PathEscape(node) }

// SetNodeLabel implements kube.Cluster.
func (c *Cluster) SetNodeLabel(ctx context.Context, node, key string, value *string) error {
	patch := map[string]any{"metadata": map[string]any{"labels": map[string]any{key: value}}}
	return c.do(ctx, http.MethodPatch, nodePath(node), merge, patch, nil)
}

// watchTime is how long a watch may take: then it is begun anew, in case the
// connection is dead and nobody noticed.
const watchTime = 30 * time.Minute

// WatchNode implements kube.Cluster.
func (c *Cluster) WatchNode(ctx context.Context, node string, labels func(map[string]string)) error {
	ctx, cancel := context.WithTimeout(ctx, watchTime+time.Minute)
	defer cancel()
	// Without a resource version it begins with the node as it is.
	query := url.Values{
		"watch": {"true"}, "fieldSelector": {"metadata.name=" + node},
		"timeoutSeconds": {strconv.Itoa(int(watchTime / time.Second))},
	}
	r, err := c.open(ctx, http.MethodGet, "/api/v1/nodes", query.Encode(), "", nil)
	if err != nil {
		return err
	}
	defer r.Close()
	d := json.NewDecoder(r)
	for {
		var e struct {
			Type   string
			Object struct {
				metav1.ObjectMeta `json:"metadata"`
				Message           string // of an error
			}
		}
		err := d.Decode(&e)
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return unavailable(ctx, err)
		case e.Type == "ADDED", e.Type == "MODIFIED":
			labels(e.Object.Labels)
		case e.Type == "ERROR":
			return &kube.Unavailable{Answered: true, Err: errors.New(e.Object.Message)}
		}
	}
}
