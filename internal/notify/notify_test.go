package notify

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sluice/internal/index"
	"sluice/oci"
)

// receiver is an endpoint's other side.
type receiver struct {
	*httptest.Server
	answer func(http.ResponseWriter, *http.Request) // nil: 200

	mu  sync.Mutex
	got []received
}

type received struct {
	header http.Header
	body   []byte
	event  message
}

func newReceiver(t *testing.T, answer func(http.ResponseWriter, *http.Request)) *receiver {
	t.Helper()
	r := &receiver{answer: answer}
	r.Server = httptest.NewServer(r)
	t.Cleanup(r.Close)
	return r
}

// ServeHTTP records what it acknowledges.
func (r *receiver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return
	}
	answered := &recorder{ResponseWriter: w, status: http.StatusOK}
	if r.answer != nil {
		r.answer(answered, req)
	}
	var e envelope
	if answered.status != http.StatusOK || json.Unmarshal(body, &e) != nil || len(e.Events) != 1 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.got = append(r.got, received{req.Header, body, e.Events[0]})
}

type recorder struct {
	http.ResponseWriter
	status int
}

func (r *recorder) WriteHeader(status int) {
	r.status = status
	r.ResponseWriter.WriteHeader(status)
}

func (r *receiver) all() []received {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.got)
}

// await waits until the receiver has got n events, and returns their ids.
func (r *receiver) await(t *testing.T, n int) []string {
	t.Helper()
	until(t, fmt.Sprint(n, " events"), func() bool { return len(r.all()) >= n })
	var ids []string
	for _, g := range r.all() {
		ids = append(ids, g.event.ID)
	}
	if len(ids) != n {
		t.Fatalf("it got %v, want %d events", ids, n)
	}
	return ids
}

// until waits until something is so.
func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited too long for %s", what)
		}
	}
}

func openIndex(t *testing.T) *index.DB {
	t.Helper()
	db, err := index.Open(t.Context(), index.Options{URL: "sqlite:" + filepath.Join(t.TempDir(), "index.db")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func happen(t *testing.T, db *index.DB, events ...Event) {
	t.Helper()
	err := db.Update(t.Context(), func(tx *index.Tx) error {
		for _, e := range events {
			payload, err := json.Marshal(e)
			if err != nil {
				return err
			}
			tx.Enqueue(Queue, e.Repository, payload)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func push(id, repo string) Event {
	return Event{
		ID: id, Time: time.Now().UTC(), Action: "push", Repository: repo, Tag: "1",
		Digest: oci.Digest("sha256:" + strings.Repeat("ab", 32)), MediaType: "application/vnd.oci.image.manifest.v1+json", Size: 1234,
		Actor: "robot", Remote: "192.0.2.1:4711", Agent: "crane", RequestID: "r1",
	}
}

// running starts a Notifier that ends with the test, or before by stop.
func running(t *testing.T, db *index.DB, opts Options) (stop func()) {
	t.Helper()
	opts.Poll = 5 * time.Millisecond
	if opts.RetryMin == 0 {
		opts.RetryMin, opts.RetryMax = 10*time.Millisecond, 50*time.Millisecond
	}
	n, err := New(db, opts)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		n.Run(ctx)
		close(done)
	}()
	stop = func() {
		cancel()
		<-done
	}
	t.Cleanup(stop)
	return stop
}

// What arrives is what distribution's consumers expect, and signed.
func TestDelivers(t *testing.T) {
	db, r := openIndex(t), newReceiver(t, nil)
	var attempts atomic.Int64
	running(t, db, Options{
		Endpoints: []Endpoint{{Name: "ci", URL: r.URL, Secret: "s3cret", Headers: map[string]string{"Authorization": "Bearer x"}}},
		URL:       "https://registry.example:5000", Instance: "replica-1",
		Observe: func(a Attempt) {
			if a.Endpoint == "ci" && a.Outcome == Delivered && a.Took > 0 {
				attempts.Add(1)
			}
		},
	})
	event := push("e1", "library/debian")
	event.Time = time.Date(2026, 11, 24, 2, 0, 0, 0, time.UTC)
	happen(t, db, event)
	r.await(t, 1)
	got := r.all()[0]
	digest := "sha256:" + strings.Repeat("ab", 32)
	want := `{"events":[{"id":"e1","timestamp":"2026-11-24T02:00:00Z","action":"push",` +
		`"target":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"` + digest + `","size":1234,"length":1234,` +
		`"repository":"library/debian","url":"https://registry.example:5000/v2/library/debian/manifests/` + digest + `","tag":"1"},` +
		`"request":{"id":"r1","addr":"192.0.2.1:4711","host":"registry.example:5000","method":"PUT","useragent":"crane"},` +
		`"actor":{"name":"robot"},"source":{"addr":"registry.example:5000","instanceID":"replica-1"}}]}`
	if string(got.body) != want {
		t.Errorf("it got\n%s, want\n%s", got.body, want)
	}
	if h := got.header; h.Get("Content-Type") != MediaType || h.Get("Authorization") != "Bearer x" {
		t.Errorf("its header: %v", h)
	}
	if err := Verify("s3cret", got.header.Get(SignatureHeader), got.body, time.Now(), time.Minute); err != nil {
		t.Error(err)
	}
	until(t, "the observation of it", func() bool { return attempts.Load() == 1 })
}

func TestChoosesEvents(t *testing.T) {
	db := openIndex(t)
	all, some := newReceiver(t, nil), newReceiver(t, nil)
	running(t, db, Options{Endpoints: []Endpoint{
		{Name: "all", URL: all.URL},
		{Name: "some", URL: some.URL, Actions: []string{"delete"}, Repositories: []string{"team/*", "exact"}},
	}})
	gone := func(id, repo string) Event { e := push(id, repo); e.Action = "delete"; return e }
	happen(t, db, push("1", "team/a"), gone("2", "team/a"), gone("3", "other"), gone("4", "exact"), gone("5", "exactly"))
	all.await(t, 5)
	ids := some.await(t, 2)
	if slices.Sort(ids); !slices.Equal(ids, []string{"2", "4"}) {
		t.Errorf("the one that chose got %v", ids)
	}
}

// An endpoint that is down gets, once it is up, everything in order; one that
// is up doesn't wait for it.
func TestDownThenUp(t *testing.T) {
	db, up := openIndex(t), newReceiver(t, nil)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	ln.Close()
	endpoints := []Endpoint{{Name: "down", URL: "http://" + addr}, {Name: "up", URL: up.URL}}
	var delivered sync.WaitGroup
	delivered.Add(50)
	stop := running(t, db, Options{Endpoints: endpoints, Observe: func(a Attempt) {
		if a.Outcome == Delivered {
			delivered.Done()
		}
	}})
	var want []string
	for i := range 50 {
		want = append(want, fmt.Sprint(i))
		happen(t, db, push(want[i], "repo"))
	}
	if got := up.await(t, 50); !slices.Equal(got, want) {
		t.Errorf("the one that is up got %v", got)
	}
	delivered.Wait()
	stop() // and another process goes on
	running(t, db, Options{Endpoints: endpoints})
	down := &receiver{}
	if ln, err = net.Listen("tcp", addr); err != nil {
		t.Skip("somebody took the port: ", err)
	}
	down.Server = &httptest.Server{Listener: ln, Config: &http.Server{Handler: down}}
	down.Start()
	t.Cleanup(down.Close)
	got := down.await(t, 50)
	if slices.Sort(got); !slices.Equal(got, slices.Sorted(slices.Values(want))) {
		t.Errorf("the one that was down got %v", got)
	}
	up.await(t, 50)
}

// After a failure, the events of the same batch follow in order.
func TestOrderAfterFailure(t *testing.T) {
	db := openIndex(t)
	var n atomic.Int64
	r := newReceiver(t, func(w http.ResponseWriter, _ *http.Request) {
		if n.Add(1) <= 3 {
			w.WriteHeader(http.StatusInternalServerError)
		}
	})
	var events []Event
	var want []string
	for i := range 20 {
		want = append(want, fmt.Sprint(i))
		events = append(events, push(want[i], "repo"))
	}
	happen(t, db, events...)
	running(t, db, Options{Endpoints: []Endpoint{{Name: "e", URL: r.URL}}, RetryMin: 100 * time.Millisecond, RetryMax: 100 * time.Millisecond})
	if got := r.await(t, 20); !slices.Equal(got, want) {
		t.Errorf("it got %v", got)
	}
	if n.Load() != 23 {
		t.Errorf("%d requests for 20 events and 3 failures", n.Load())
	}
}

// An event that an endpoint never takes steps aside after a while.
func TestPoison(t *testing.T) {
	db := openIndex(t)
	r := &receiver{}
	var refused atomic.Int64
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		body, err := io.ReadAll(req.Body)
		if err != nil {
			return
		}
		if bytes.Contains(body, []byte("poison")) {
			refused.Add(1)
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		req.Body = io.NopCloser(bytes.NewReader(body))
		r.ServeHTTP(w, req)
	}))
	t.Cleanup(r.Close)
	happen(t, db, push("poison", "repo"), push("a", "repo"), push("b", "repo"))
	running(t, db, Options{Endpoints: []Endpoint{{Name: "e", URL: r.URL}}})
	if got := r.await(t, 2); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("it got %v", got)
	}
	until(t, "the event that stepped aside, again", func() bool { return refused.Load() > patience })
}

// One that steps aside while the Notifier is stopped is there for the next.
func TestStopWhileSteppingAside(t *testing.T) {
	db := openIndex(t)
	r := newReceiver(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) })
	ctx, stop := context.WithCancel(t.Context())
	var refused atomic.Int64
	n, err := New(db, Options{
		Endpoints: []Endpoint{{Name: "e", URL: r.URL}}, Poll: time.Millisecond, RetryMin: time.Millisecond, RetryMax: time.Millisecond,
		Observe: func(Attempt) {
			if refused.Add(1) == patience {
				stop()
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	happen(t, db, push("poison", "repo"))
	n.Run(ctx)
	if queued, running, err := db.CountJobs(t.Context(), Queue); err != nil || queued != 1 || running != 0 {
		t.Errorf("%d jobs wait and %d are with a Notifier that has stopped, %v", queued, running, err)
	}
}

// A slow endpoint times out, and is asked again; another repository's events
// and another endpoint's don't wait for it.
func TestSlow(t *testing.T) {
	db, quick := openIndex(t), newReceiver(t, nil)
	release := make(chan struct{})
	slow := newReceiver(t, func(w http.ResponseWriter, req *http.Request) {
		select {
		case <-release:
		case <-req.Context().Done():
			w.WriteHeader(http.StatusGatewayTimeout)
		}
	})
	running(t, db, Options{Endpoints: []Endpoint{{Name: "slow", URL: slow.URL, Timeout: 50 * time.Millisecond}, {Name: "quick", URL: quick.URL}}})
	happen(t, db, push("a", "one"), push("b", "two"))
	quick.await(t, 2)
	close(release)
	until(t, "what the slow one was sent again", func() bool {
		seen := map[string]bool{}
		for _, g := range slow.all() {
			seen[g.event.ID] = true // one that was released as it timed out arrives twice
		}
		return seen["a"] && seen["b"]
	})
}

// A Notifier that is stopped in the middle of a delivery gives it back.
func TestStopGivesBack(t *testing.T) {
	db := openIndex(t)
	begun := make(chan struct{}, 1)
	var requests atomic.Int64
	r := newReceiver(t, func(w http.ResponseWriter, req *http.Request) {
		if requests.Add(1) > 1 {
			return
		}
		begun <- struct{}{}
		<-req.Context().Done() // the Notifier has gone
		w.WriteHeader(http.StatusGatewayTimeout)
	})
	endpoints := []Endpoint{{Name: "e", URL: r.URL}}
	stop := running(t, db, Options{Endpoints: endpoints})
	happen(t, db, push("a", "one"), push("b", "one"))
	<-begun
	stop()
	if _, leased, err := db.CountJobs(t.Context(), Queue); err != nil || leased != 0 {
		t.Errorf("%d jobs are with a Notifier that has stopped, %v", leased, err)
	}
	running(t, db, Options{Endpoints: endpoints})
	if got := r.await(t, 2); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("it got %v", got)
	}
}

// Two replicas on one index deliver everything once while nothing fails.
func TestReplicas(t *testing.T) {
	db, r := openIndex(t), newReceiver(t, nil)
	for range 2 {
		running(t, db, Options{Endpoints: []Endpoint{{Name: "e", URL: r.URL}}})
	}
	for i := range 100 {
		happen(t, db, push(fmt.Sprint(i), fmt.Sprintf("repo%d", i%7)))
	}
	ids := r.await(t, 100)
	if slices.Sort(ids); len(slices.Compact(ids)) != 100 {
		t.Errorf("events were repeated: %v", ids)
	}
}

// An event is sent again while it isn't too old by then, and dropped after that.
func TestDropsInTheEnd(t *testing.T) {
	db := openIndex(t)
	var n atomic.Int64
	r := newReceiver(t, func(w http.ResponseWriter, _ *http.Request) {
		if n.Add(1) > 1 {
			w.Header().Set("Retry-After", "1800") // it is half an hour old
		}
		w.WriteHeader(http.StatusBadGateway)
	})
	outcomes := make(chan Outcome, 100)
	running(t, db, Options{
		Endpoints: []Endpoint{{Name: "e", URL: r.URL}}, Retain: 45 * time.Minute, RetryMin: 10 * time.Millisecond, RetryMax: 40 * time.Minute,
		Observe: func(a Attempt) { outcomes <- a.Outcome },
	})
	event := push("a", "one")
	event.Time = event.Time.Add(-30 * time.Minute)
	happen(t, db, event)
	if first, second := <-outcomes, <-outcomes; first != Retried || second != Dropped {
		t.Errorf("it was %s, and then %s", first, second)
	}
}

// Neither logs nor errors tell what is secret, redirects lead nowhere, and an
// answer without end is not read to its end.
func TestHostileEndpoint(t *testing.T) {
	db, elsewhere := openIndex(t), newReceiver(t, nil)
	redirecting := newReceiver(t, func(w http.ResponseWriter, req *http.Request) {
		http.Redirect(w, req, elsewhere.URL, http.StatusTemporaryRedirect)
	})
	ended := make(chan struct{}, 10)
	endless := newReceiver(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Connection", "close")
		for {
			if _, err := w.Write(make([]byte, 32<<10)); err != nil {
				ended <- struct{}{}
				return
			}
		}
	})
	var mu sync.Mutex
	var log bytes.Buffer
	locked := writerFunc(func(p []byte) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		return log.Write(p)
	})
	failed, redirected := make(chan struct{}, 1000), make(chan struct{}, 1000)
	running(t, db, Options{
		Endpoints: []Endpoint{
			{Name: "redirecting", URL: redirecting.URL + "/?code=hidden1", Secret: "hidden2", Headers: map[string]string{"Authorization": "hidden3"}},
			{Name: "nowhere", URL: "http://user:hidden4@127.0.0.1:1/?code=hidden5"},
			{Name: "endless", URL: endless.URL},
		},
		Log: slog.New(slog.NewTextHandler(locked, nil)),
		Observe: func(a Attempt) {
			switch {
			case a.Outcome == Retried && a.Endpoint == "nowhere":
				failed <- struct{}{}
			case a.Outcome == Retried && a.Endpoint == "redirecting":
				redirected <- struct{}{}
			}
		},
	})
	happen(t, db, push("a", "one"))
	<-failed
	<-failed
	<-redirected
	<-ended
	endless.await(t, 1)
	mu.Lock()
	defer mu.Unlock()
	if strings.Contains(log.String(), "hidden") || !strings.Contains(log.String(), "endpoint=nowhere") || !strings.Contains(log.String(), "redirects are not followed") {
		t.Errorf("the log:\n%s", log.String())
	}
	if len(elsewhere.all()) > 0 {
		t.Error("a redirect was followed")
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// A certificate that nobody vouches for is refused.
func TestVerifiesTLS(t *testing.T) {
	db := openIndex(t)
	r := &receiver{}
	r.Server = httptest.NewTLSServer(r)
	r.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	t.Cleanup(r.Close)
	retried := make(chan struct{}, 1000)
	stop := running(t, db, Options{Endpoints: []Endpoint{{Name: "e", URL: r.URL}}, Observe: func(a Attempt) {
		if a.Outcome == Retried {
			retried <- struct{}{}
		}
	}})
	happen(t, db, push("a", "one"))
	<-retried
	stop()
	if len(r.all()) > 0 {
		t.Fatal("it was delivered to a stranger")
	}
	running(t, db, Options{Endpoints: []Endpoint{{Name: "e", URL: r.URL}}, TLS: r.Client().Transport.(*http.Transport).TLSClientConfig})
	r.await(t, 1)
}

func TestRefusesEndpoints(t *testing.T) {
	good := Endpoint{Name: "a", URL: "https://a.example/hook"}
	for name, endpoints := range map[string][]Endpoint{
		"twice":       {good, good},
		"no name":     {{URL: good.URL}},
		"bad name":    {{Name: "a/b", URL: good.URL}},
		"scheme":      {{Name: "a", URL: "ftp://a.example"}},
		"no host":     {{Name: "a", URL: "https:///hook"}},
		"unparseable": {{Name: "a", URL: "https://a.example/%zz?secret"}},
		"pattern":     {{Name: "a", URL: good.URL, Repositories: []string{"a*b"}}},
		"timeout":     {{Name: "a", URL: good.URL, Timeout: -1}},
	} {
		if _, err := New(nil, Options{Endpoints: endpoints}); err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestPauses(t *testing.T) {
	n, err := New(nil, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for attempts, want := range map[int]time.Duration{0: time.Second, 1: time.Second, 4: 8 * time.Second, 1000: 10 * time.Minute} {
		for range 50 {
			if got := n.pause(attempts); got < want/2 || got > want {
				t.Errorf("after %d attempts: a pause of %v, want up to %v", attempts, got, want)
			}
		}
	}
}
