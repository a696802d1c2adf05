package hosts

import (
	"sync"
	"time"
)

const (
	// minOut is how long a server that failed is left out; after each further
	// failure twice as long, up to maxOut.
	minOut, maxOut = 5 * time.Second, 5 * time.Minute

	// probeEvery is how often a server is asked whether it's back.
	probeEvery = 10 * time.Second
)

// health is whether a server works, as far as its answers tell. A server that
// fails is left out for a while. Then it is probed in the background, so that
// nobody who waits for content is the one to find out that it's still down.
type health struct {
	mu       sync.Mutex // guards what follows; nothing is waited for under it
	failures int        // of requests, not long ago; probes don't count
	marked   time.Time  // when the last of them was noted
	out      bool       // the server is left out ...
	until    time.Time  // ... and not even probed until then
	probing  bool
	reason   error // why it's out
}

// state reports whether the server is left out, and whether it's for the caller
// to probe it, and to call probed after that.
func (h *health) state(now time.Time) (out, probe bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.out && !h.probing && !now.Before(h.until) {
		h.probing, probe = true, true
	}
	return h.out, probe
}

// failed notes that a request failed which began at a time. It returns for how
// long the server is left out because of that; 0 if it was already: of requests
// that were under way together, only one failure counts.
func (h *health) failed(began, now time.Time, reason error) time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.failures > 0 && !began.After(h.marked) {
		return 0
	}
	h.failures++
	pause := h.pause()
	h.marked, h.out, h.until, h.reason = now, true, now.Add(pause), reason
	return pause
}

// pause is how long the server is left out; mu is held.
func (h *health) pause() time.Duration { return min(minOut<<min(h.failures-1, 10), maxOut) }

// worked notes an answer. Failures are forgotten when they are long ago: a
// server that answers some requests and stalls with others must not cost a
// time-out again and again. It reports whether the server had been left out.
func (h *health) worked(now time.Time) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.failures > 0 && now.Sub(h.marked) > 2*h.pause() {
		h.failures = 0
	}
	was := h.out
	h.out, h.reason = false, nil
	return was
}

// probed ends a probe: the server is back, or not.
func (h *health) probed(now time.Time, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.probing = false
	switch {
	case !h.out: // an answer was faster
	case err == nil:
		h.out, h.reason = false, nil
	default:
		h.until, h.reason = now.Add(probeEvery), err
	}
}

// problem is why the server is left out, or nil.
func (h *health) problem() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.reason
}
