package conformance

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"testing"

	"sluice/test/bed"
)

// balancer is a load balancer over two replicas that sends every request to
// the other one than the last, and that kills them in turns. As load balancers
// do, it asks the other replica when one is gone: when a connection can't be
// made, and when it breaks before there is an answer to a request that may be
// repeated.
type balancer struct {
	replicas  [2]*bed.Registry
	transport http.RoundTripper

	mu       sync.Mutex // guards what follows; held while a replica is killed or started
	requests int
	dead     int // index of the replica that is dead; -1: none
	kills    int
	served   [2]int
	repeated int // requests that were under way on a replica when it was killed
}

// every is after how many requests something happens to a replica: half as many
// after the one was killed, it is started again.
const every = 40

// RoundTrip sends a request to a replica that answers.
func (b *balancer) RoundTrip(req *http.Request) (*http.Response, error) {
	var body []byte
	if req.Body != nil {
		var err error
		if body, err = io.ReadAll(req.Body); err != nil { // the suite's are small
			return nil, err
		}
	}
	first, kill, err := b.next(req.Context())
	if err != nil {
		return nil, err
	}
	// Requests that change something other than by their name must not be done
	// twice; for these, the replica is killed before they reach it.
	repeatable := req.Method == http.MethodGet || req.Method == http.MethodHead ||
		req.Method == http.MethodPut && strings.Contains(req.URL.Path, "/manifests/")
	killed := make(chan struct{})
	switch {
	case kill && repeatable:
		go func() {
			b.replicas[first].Kill()
			close(killed)
		}()
	case kill:
		b.replicas[first].Kill()
		fallthrough
	default:
		close(killed)
	}
	defer func() { <-killed }()
	resp, err := b.send(req, first, body)
	if err != nil && kill {
		if repeatable {
			b.mu.Lock()
			b.repeated++
			b.mu.Unlock()
		}
		return b.send(req, 1-first, body)
	}
	return resp, err
}

// next says whose turn it is, and whether it is to be killed with this request.
func (b *balancer) next(ctx context.Context) (replica int, kill bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.requests++
	replica = b.requests % 2
	switch {
	case b.dead >= 0 && b.requests%every == every/2:
		if err := b.replicas[b.dead].Restart(ctx); err != nil {
			return 0, false, err
		}
		b.dead = -1
	case b.dead < 0 && b.requests%every == 0:
		replica = b.kills % 2
		b.kills++
		b.dead, kill = replica, true
	}
	if b.dead >= 0 && !kill {
		replica = 1 - b.dead
	}
	b.served[replica]++
	return replica, kill, nil
}

// send sends the request and reads the answer, which a kill may break off.
func (b *balancer) send(req *http.Request, replica int, body []byte) (*http.Response, error) {
	req = req.Clone(req.Context())
	req.URL.Host = b.replicas[replica].Addr
	req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	resp, err := b.transport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	resp.Body = io.NopCloser(bytes.NewReader(answer))
	return resp, err
}

// TestReplicas runs the suite on two replicas that share a PostgreSQL and an
// object store, each request on the other one than the last, while they are
// killed in turns. What an upload session or a locked name needs must be
// found by the other replica, also when the first is gone for good.
func TestReplicas(t *testing.T) {
	sluice, tester := programs(t)
	env := append(minio(t), postgres(t)...)
	b := &balancer{dead: -1, transport: &http.Transport{DisableKeepAlives: true, DisableCompression: true}}
	for i := range b.replicas {
		r, err := bed.StartRegistry(t.Context(), sluice, t.TempDir(), env...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Stop() })
		b.replicas[i] = r
	}
	front := httptest.NewServer(&httputil.ReverseProxy{
		Transport: b,
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme = "http"
			r.Out.Host = r.In.Host
		},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			if !errors.Is(err, context.Canceled) {
				t.Errorf("%s %s: %v", r.Method, r.URL, err)
			}
			w.WriteHeader(http.StatusBadGateway)
		},
	})
	t.Cleanup(front.Close)
	to, err := url.Parse(front.URL)
	if err != nil {
		t.Fatal(err)
	}
	conforms(t, tester, to.Host, "OCI_DATA_SPARSE=false")
	b.mu.Lock()
	defer b.mu.Unlock()
	t.Logf("%d requests, %d kills; the replicas served %v; %d requests had to be repeated", b.requests, b.kills, b.served, b.repeated)
	if b.kills < 5 || min(b.served[0], b.served[1]) < b.requests/4 {
		t.Error("that is too little to mean something")
	}
}
