package mount

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"sluice/oci"
)

const (
	// maxRecent bounds the outcomes that are remembered.
	maxRecent = 256

	// presentLife is how long the answer of a look-up is given again, maxPresent
	// how many are kept.
	presentLife = 10 * time.Minute
	maxPresent  = 1024
)

// Ledger is what a daemon remembers of pulls, for its status and for those who tell
// pods of it: how they ended, and who doesn't want them. A Manager has one, and so
// has whoever else mounts images for pulls. Use NewLedger. It may be used
// concurrently.
type Ledger struct {
	log func(Outcome)

	mu      sync.Mutex // a leaf lock
	recent  []Outcome  // the last pulls, oldest first
	counts  map[Reason]PullCount
	optOuts map[string]*optOut  // by reference
	present map[string]presence // by reference
}

// optOut is who wants an image pulled the ordinary way, now.
type optOut struct {
	pulls int    // of this kind under way
	why   string // of the last
	noted bool   // among the outcomes
}

// presence is why an image that is here isn't streamed, and until when that is
// the answer.
type presence struct {
	err   error
	until time.Time
}

// NewLedger returns a Ledger in which nothing has happened. log is called for each
// outcome that is noted.
func NewLedger(log func(Outcome)) *Ledger {
	return &Ledger{
		log:     log,
		counts:  make(map[Reason]PullCount),
		optOuts: make(map[string]*optOut),
		present: make(map[string]presence),
	}
}

// Note remembers and counts what became of a pull.
func (l *Ledger) Note(o Outcome) {
	l.log(o)
	l.mu.Lock()
	defer l.mu.Unlock()
	count := l.counts[o.Reason]
	l.counts[o.Reason] = PullCount{o.Reason, count.Pulls + 1, count.Time + o.Duration}
	if l.recent = append(l.recent, o); len(l.recent) > maxRecent {
		l.recent = l.recent[len(l.recent)-maxRecent:]
	}
}

// Pulls returns the last outcomes, oldest first, and the counts of all since the
// start, by reason.
func (l *Ledger) Pulls() ([]Outcome, []PullCount) {
	l.mu.Lock()
	defer l.mu.Unlock()
	counts := make([]PullCount, 0, len(l.counts))
	for _, c := range l.counts {
		counts = append(counts, c)
	}
	slices.SortFunc(counts, func(a, b PullCount) int { return cmp.Compare(a.Reason, b.Reason) })
	return append([]Outcome{}, l.recent...), counts
}

// LastPull returns what became of the last pull of an image by the name ref, as far
// as Pulls goes back.
func (l *Ledger) LastPull(ref string) (Outcome, bool) {
	r, err := oci.ParseReference(ref)
	if err != nil {
		return Outcome{}, false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, o := range slices.Backward(l.recent) {
		if o.Reference == r.String() {
			return o, true
		}
	}
	return Outcome{}, false
}

// OptOut has OptedOut fail for the name ref, with reason Disabled and the text why,
// until end is called.
func (l *Ledger) OptOut(ref, why string) (end func()) {
	r, err := oci.ParseReference(ref)
	if err != nil {
		return func() {} // such an image isn't streamed
	}
	key := r.String()
	l.mu.Lock()
	defer l.mu.Unlock()
	o := l.optOuts[key]
	if o == nil {
		o = &optOut{}
		l.optOuts[key] = o
	}
	o.pulls++
	o.why, o.noted = why, false
	return sync.OnceFunc(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if o.pulls--; o.pulls == 0 {
			delete(l.optOuts, key)
		}
	})
}

// OptedOut is the error of a pull by a name that somebody pulls the ordinary way
// now, nil if nobody does. The first for each OptOut is an outcome.
func (l *Ledger) OptedOut(r oci.Reference, manifest oci.Digest) error {
	l.mu.Lock()
	o := l.optOuts[r.String()]
	if o == nil {
		l.mu.Unlock()
		return nil
	}
	err := notStreaming(Disabled, "%s", o.why)
	first := !o.noted
	o.noted = true
	l.mu.Unlock()
	if first {
		l.Note(Outcome{Time: time.Now(), Reference: r.String(), Manifest: manifest, Reason: Disabled, Message: err.Error()})
	}
	return err
}

// Present returns what lookUp says of the name ref, why an image of it that is here
// isn't streamed: the same answer for ten minutes.
func (l *Ledger) Present(ctx context.Context, ref string, lookUp func(ctx context.Context) error) error {
	l.mu.Lock()
	p, ok := l.present[ref]
	l.mu.Unlock()
	if ok && time.Now().Before(p.until) {
		return p.err
	}
	err := lookUp(ctx)
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.present) >= maxPresent {
		clear(l.present)
	}
	l.present[ref] = presence{err, time.Now().Add(presentLife)}
	return err
}

// NotStreamedOf returns the images whose last pull, of those given, went the ordinary
// way, by reference, with the words that meaning and remedy have for the reasons.
func NotStreamedOf(pulls []Outcome, meaning, remedy func(Reason) string) []NotStreamed {
	list := []NotStreamed{}
	seen := make(map[string]bool)
	for _, p := range slices.Backward(pulls) {
		if !seen[p.Reference] && p.Reason != "" {
			list = append(list, NotStreamed{
				Reference: p.Reference, Manifest: p.Manifest, Time: p.Time, Message: p.Message,
				Reason: p.Reason, Meaning: meaning(p.Reason), Remedy: remedy(p.Reason),
			})
		}
		seen[p.Reference] = true
	}
	slices.SortFunc(list, func(a, b NotStreamed) int { return cmp.Compare(a.Reference, b.Reference) })
	return list
}
