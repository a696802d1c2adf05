package webhook

import (
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"sluice/internal/convert"
	"sluice/internal/index"
	"sluice/oci"
)

// Options are the options of New.
type Options struct {
	// Registry is the one that sends the webhooks, and Agent the User-Agent by
	// which its client knows itself again in them. "" recognizes none.
	Registry oci.Registry
	Agent    string

	// Secret, if not empty, must be what requests have in their Authorization
	// header: by itself, after "Bearer ", or as the password of Basic.
	Secret string

	// Repositories, if not empty, are the only ones whose images are
	// converted. A trailing * stands for anything.
	Repositories []string

	// Queue is how many images may wait; default 10000. Beyond, requests are
	// refused, and registries try again.
	Queue int

	// Attempts is how often an image is tried if the network, the registry or
	// the storage fails, over about an hour; default 10.
	Attempts int

	// RetryMin and RetryMax are the pauses after the first attempt and, each
	// being twice the one before, the longest; default 10 seconds and
	// 10 minutes.
	RetryMin, RetryMax time.Duration

	// Convert says how; its Ask, Progress and Log are not used.
	Convert convert.Options

	// Log gets what became of each image; nil: nothing.
	Log *slog.Logger
}

// Receiver converts what webhooks tell of. Use New. It is an http.Handler, whose
// methods may be called concurrently.
type Receiver struct {
	db   *index.DB
	opts Options
	wake chan struct{} // has an element when a job was put into the queue
}

// Queues of the index begin with prefix; CountJobs counts by it.
const (
	prefix = "webhook:"
	queue  = prefix + "push"
)

// New returns a receiver that keeps its queue in db, which may be one in memory
// if what waits may be lost with the process.
func New(db *index.DB, opts Options) *Receiver {
	if opts.Queue <= 0 {
		opts.Queue = 10_000
	}
	if opts.Attempts <= 0 {
		opts.Attempts = 10
	}
	if opts.RetryMin <= 0 {
		opts.RetryMin = 10 * time.Second
	}
	if opts.RetryMax <= 0 {
		opts.RetryMax = 10 * time.Minute
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	opts.Convert.Log = opts.Log
	opts.Convert.Progress, opts.Convert.Ask = nil, false
	return &Receiver{db: db, opts: opts, wake: make(chan struct{}, 1)}
}

// ServeHTTP takes webhooks at every path. It answers 202 with the number of
// images that wait because of this request, once that is durable; 401 without
// the secret, 400 to what no registry sends, and 503 when too many wait.
func (r *Receiver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	n, status, err := r.receive(w, req)
	w.Header().Set("Content-Type", "application/json")
	answer := map[string]any{"queued": n}
	if err != nil {
		r.opts.Log.WarnContext(req.Context(), "a webhook was refused", "from", req.RemoteAddr, "status", status, "error", err)
		answer = map[string]any{"error": err.Error()}
	}
	if status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "60")
	}
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(answer) // whoever is gone doesn't need it
}

func (r *Receiver) receive(w http.ResponseWriter, req *http.Request) (queued, status int, err error) {
	if req.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		return 0, http.StatusMethodNotAllowed, errors.New("webhooks are POST requests")
	}
	if !r.knows(req) {
		w.Header().Set("WWW-Authenticate", "Bearer")
		return 0, http.StatusUnauthorized, errors.New("the Authorization header isn't the secret")
	}
	content, err := io.ReadAll(io.LimitReader(req.Body, MaxBody+1))
	if err != nil {
		return 0, http.StatusBadRequest, fmt.Errorf("reading the request: %w", err)
	}
	if len(content) > MaxBody {
		return 0, http.StatusRequestEntityTooLarge, fmt.Errorf("the request has more than %d bytes", MaxBody)
	}
	pushes, err := Parse(content, r.opts.Agent)
	if err != nil {
		return 0, http.StatusBadRequest, err
	}
	if queued, err = r.enqueue(req.Context(), pushes); err != nil {
		return 0, http.StatusServiceUnavailable, err
	}
	return queued, http.StatusAccepted, nil
}

// knows reports whether a request has the secret.
func (r *Receiver) knows(req *http.Request) bool {
	if r.opts.Secret == "" {
		return true
	}
	given := req.Header.Get("Authorization")
	if _, password, ok := req.BasicAuth(); ok {
		given = password
	} else if scheme, rest, ok := strings.Cut(given, " "); ok && strings.EqualFold(scheme, "bearer") {
		given = rest
	}
	return subtle.ConstantTimeCompare([]byte(given), []byte(r.opts.Secret)) == 1 ||
		subtle.ConstantTimeCompare([]byte(req.Header.Get("Authorization")), []byte(r.opts.Secret)) == 1
}

// errFull says that there is no room for more.
var errFull = errors.New("too many images wait to be converted: try again later")

// enqueue makes jobs of the pushes that are wanted, all or none.
func (r *Receiver) enqueue(ctx context.Context, pushes []Push) (n int, err error) {
	var wanted []Push
	for _, p := range pushes {
		if r.wants(p.Repository) {
			wanted = append(wanted, p)
		}
	}
	if len(wanted) == 0 {
		return 0, nil
	}
	waiting, running, err := r.db.CountJobs(ctx, prefix)
	if err != nil {
		return 0, err
	}
	if waiting+running+len(wanted) > r.opts.Queue {
		return 0, errFull
	}
	err = r.db.Update(ctx, func(tx *index.Tx) error {
		for _, p := range wanted {
			payload, err := json.Marshal(p)
			if err != nil {
				return err
			}
			if p.Digest != "" {
				tx.EnqueueOnce(queue, p.String(), payload)
			} else {
				tx.Enqueue(queue, p.String(), payload) // the tag may name something else by now
			}
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	select {
	case r.wake <- struct{}{}:
	default: // it's awake
	}
	return len(wanted), nil
}

// wants reports whether images of a repository are converted.
func (r *Receiver) wants(repo string) bool {
	for _, p := range r.opts.Repositories {
		if start, ok := strings.CutSuffix(p, "*"); p == repo || ok && strings.HasPrefix(repo, start) {
			return true
		}
	}
	return len(r.opts.Repositories) == 0
}
