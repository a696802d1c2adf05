package blob

import (
	"context"
	"io"
	"slices"
	"sync"
	"time"
)

const (
	// hedgeSeen is how many answers a Hedger remembers, hedgeLeast how many it
	// must have seen before it judges.
	hedgeSeen  = 64
	hedgeLeast = 16

	// hedgeEvery is of how many requests, in the long run, at most one is
	// asked twice, hedgeSaved up to how many may follow each other. A source
	// that has become slow as a whole must not be asked twice as much.
	hedgeEvery = 20
	hedgeSaved = 4

	// hedgeFloor is what no request is asked twice before.
	hedgeFloor = 10 * time.Millisecond

	// hedgePeek is how much of an answer is waited for: more than headers,
	// which a proxy may send long before it has the content.
	hedgePeek = 512
)

// Hedger knows how long answers usually take to begin, and how many requests
// may be asked twice. Sources of one kind share one. The zero value is ready;
// it may be used concurrently.
type Hedger struct {
	mu     sync.Mutex
	took   []time.Duration // of the last answers, a ring
	at     int             // where the next one goes
	saved  float64         // requests that may be asked twice now
	hedges int64
}

// Hedges is how many requests were asked twice.
func (h *Hedger) Hedges() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.hedges
}

// patience is after how long a request that begins now may be asked twice; 0:
// it may not.
func (h *Hedger) patience() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.saved = min(h.saved+1.0/hedgeEvery, hedgeSaved)
	if len(h.took) < hedgeLeast {
		return 0
	}
	sorted := slices.Sorted(slices.Values(h.took))
	usual, rare := sorted[len(sorted)/2], sorted[len(sorted)*95/100]
	return max(rare, 2*usual, hedgeFloor)
}

// spend takes one request out of the budget, if there's one.
func (h *Hedger) spend() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.saved < 1 {
		return false
	}
	h.saved--
	h.hedges++
	return true
}

// saw takes note of an answer that began after d, or would not have before.
func (h *Hedger) saw(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.took) < hedgeSeen {
		h.took = append(h.took, d)
		return
	}
	h.took[h.at] = d
	h.at = (h.at + 1) % hedgeSeen
}

// Hedge returns src, asking for a range once more, of second, when its first
// byte takes longer than nearly all others did; who begins to answer first is
// listened to, the other request is cancelled. second may be src itself: over
// HTTP/1 it is then another connection that is used. At most about one request
// in twenty is asked twice. Errors of a request that wasn't are the caller's:
// put Retry around Hedge.
func Hedge(src, second Source, h *Hedger) Source {
	return &hedgeSource{Source: src, second: second, h: h}
}

type hedgeSource struct {
	Source
	second Source
	h      *Hedger
}

// answer is how one of the requests began.
type answer struct {
	r     *hedgeReader
	err   error
	asked *asking
}

// asking is a request under way.
type asking struct {
	began  time.Time
	cancel context.CancelFunc
}

func (s *hedgeSource) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	answers := make(chan answer, 2) // room for all: nobody has to listen
	first := ask(ctx, s.Source, off, n, answers)
	running := []*asking{first}
	var late <-chan time.Time
	if d := s.h.patience(); d > 0 {
		timer := time.NewTimer(d)
		defer timer.Stop()
		late = timer.C
	}
	for {
		select {
		case <-late:
			if s.h.spend() {
				running = append(running, ask(ctx, s.second, off, n, answers))
			}
			late = nil
		case a := <-answers:
			running = slices.DeleteFunc(running, func(r *asking) bool { return r == a.asked })
			if a.err != nil {
				a.asked.cancel()
				if len(running) > 0 {
					continue // the other one may have more luck
				}
				return nil, a.err
			}
			s.h.saw(time.Since(first.began))
			a.r.cancel = a.asked.cancel
			if len(running) > 0 {
				running[0].cancel()
				a.r.loser = answers
			}
			return a.r, nil
		}
	}
}

// ask makes a request and waits for the answer's first bytes, in the
// background.
func ask(ctx context.Context, src Source, off, n int64, answers chan<- answer) *asking {
	ctx, cancel := context.WithCancel(ctx)
	a := &asking{began: time.Now(), cancel: cancel}
	go func() {
		body, err := src.ReadRange(ctx, off, n)
		if err != nil {
			answers <- answer{err: err, asked: a}
			return
		}
		r := &hedgeReader{body: body}
		peek := make([]byte, hedgePeek)
		for len(r.peeked) == 0 && r.err == nil {
			var got int
			got, r.err = body.Read(peek)
			r.peeked = peek[:got]
		}
		if err := r.err; err != nil && err != io.EOF && len(r.peeked) == 0 {
			body.Close()
			answers <- answer{err: err, asked: a}
			return
		}
		answers <- answer{r: r, asked: a}
	}()
	return a
}

// hedgeReader is the answer that began first.
type hedgeReader struct {
	body   io.ReadCloser
	peeked []byte // what has been read of it
	err    error  // that followed
	cancel context.CancelFunc
	loser  <-chan answer // where the other request ends up; nil: there was none
}

func (r *hedgeReader) Read(p []byte) (int, error) {
	if len(r.peeked) > 0 {
		n := copy(p, r.peeked)
		r.peeked = r.peeked[n:]
		return n, nil
	}
	if r.err != nil {
		return 0, r.err
	}
	return r.body.Read(p)
}

// Close also waits for the other request, which has been cancelled, to end.
func (r *hedgeReader) Close() error {
	err := r.body.Close()
	r.cancel()
	if r.loser != nil {
		if a := <-r.loser; a.r != nil {
			a.r.body.Close()
		}
		r.loser = nil
	}
	return err
}
