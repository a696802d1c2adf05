package cache

import (
	"context"

	"sluice/internal/artifact"
)

// What is fetched before anybody asks for it. Two things foresee: streams
// knows readers that go through a layer from front to end, and neighbours that
// what is read lies together, in whatever order. A tar has the files of a
// directory side by side, and a program that starts reads many of them, and
// most of each library that it maps, but from there to here.
//
// What was fetched ahead and not read is never more than a little to begin with
// (creditBase), a part of what was read (creditPart) and a multiple of what was
// guessed rightly (creditHit), per layer, in bytes of the blob. So guessing
// wrong ends by itself, and reads here and there cost little more.
const (
	creditBase = 256 << 10
	creditPart = 0.2
	creditHit  = 2
)

const (
	// maxStreams is how many sequential readers of one layer are told apart.
	maxStreams = 16

	// sequence is after how many chunks in a row a reader is taken for one
	// that reads on. As much as it has read is then fetched ahead of it, up to
	// Options.ReadAhead.
	sequence = 4

	// heatReach is how many chunks to either side a read warms, the next one
	// by 2*heatReach, the one behind by heatReach, those farther away by less.
	// hotChunk is the heat from which on a chunk is fetched ahead: one that was
	// read just before it, or two a little farther away. These and the credit
	// were chosen by replaying starts of Python, Perl, Node, PHP, Ruby, git,
	// gcc and PostgreSQL; somewhat more or less changes little.
	heatReach = 4
	hotChunk  = 7

	// maxHot is how many such chunks are kept in mind.
	maxHot = 128
)

// foresight is what is known of a layer's reads. Guarded by content.mu.
type foresight struct {
	streams streams
	latest  *stream // the one that read last
	heat    []uint8 // by chunk; nil before the first read
	hot     []int   // chunks that became hot, the latest last

	used   int64 // bytes of the blob whose chunks were read
	hits   int64 // of used: those that were fetched ahead
	unused int64 // bytes that were fetched ahead, and not read yet
}

// credit is how many bytes of the blob may be fetched ahead now.
func (a *foresight) credit() int64 {
	return creditBase + int64(creditPart*float64(a.used)) + creditHit*a.hits - a.unused
}

// read takes note of the first read of chunk i.
func (a *foresight) read(c *content, i int, ch artifact.Chunk) {
	a.used += int64(ch.BlobLength)
	a.latest = a.streams.advance(i, int64(ch.Length))
	if a.heat == nil {
		a.heat = make([]uint8, c.count)
	}
	for d := range heatReach {
		a.warm(c, i+1+d, 2*uint8(heatReach-d))
		a.warm(c, i-1-d, uint8(heatReach-d))
	}
}

func (a *foresight) warm(c *content, i int, by uint8) {
	if i < 0 || i >= len(a.heat) {
		return
	}
	was := a.heat[i]
	a.heat[i] = was + min(by, 255-was)
	if was < hotChunk && a.heat[i] >= hotChunk && c.lacks(i) {
		if len(a.hot) == maxHot {
			a.hot = append(a.hot[:0], a.hot[1:]...)
		}
		a.hot = append(a.hot, i)
	}
}

// hottest returns the missing chunk that is most likely to be read, -1 if none
// is likely enough.
func (a *foresight) hottest(c *content) int {
	best := -1
	kept := a.hot[:0]
	for _, i := range a.hot {
		if !c.lacks(i) {
			continue
		}
		kept = append(kept, i)
		if best < 0 || a.heat[i] >= a.heat[best] {
			best = i
		}
	}
	a.hot = kept
	return best
}

// lacks reports whether chunk i isn't there, nor on its way. mu is held.
func (c *content) lacks(i int) bool {
	return c.chunks[i].Load()&(present|claimed) == 0 && c.flights[i] == nil && !c.awaited(i)
}

// streams recognises readers that go through a layer from chunk to chunk.
// Guarded by content.mu.
type streams struct {
	all   [maxStreams]stream
	clock int64
}

// stream is one such reader, or maybe one.
type stream struct {
	next    int   // the chunk that it'll read next
	chunks  int   // that it has read
	read    int64 // decoded bytes of them
	fetched int   // up to which chunk, exclusive, it was read ahead for
	used    int64 // when, by clock; 0: free
}

// advance takes note of a first read of chunk i, of n decoded bytes, and
// returns the stream that it belongs to.
func (s *streams) advance(i int, n int64) *stream {
	s.clock++
	t := &s.all[0]
	for k := range s.all {
		o := &s.all[k]
		// Readers in the kernel ask for several pieces at a time, which
		// arrive here in any order.
		if o.used > 0 && i >= o.next-2 && i <= o.next+2 {
			o.next = max(o.next, i+1)
			o.chunks++
			o.read += n
			o.used = s.clock
			return o
		}
		if o.used < t.used {
			t = o
		}
	}
	*t = stream{next: i + 1, chunks: 1, read: n, used: s.clock}
	return t
}

// follow returns what a stream will want after what was fetched for it, when
// that is half used up. content.mu is held.
func (l *Layer) follow(t *stream) []want {
	c := l.content
	if t == nil || t.chunks < sequence {
		return nil
	}
	window := min(t.read, l.cache.opts.ReadAhead)
	at := max(t.next, t.fetched)
	var due int64 // decoded bytes from where it reads up to what isn't fetched
	for i := t.next; i < c.count && due <= window/2; i++ {
		ch, err := l.chunk(i)
		if err != nil {
			return nil
		}
		if i >= at && c.lacks(i) {
			at = i
			break
		}
		due += int64(ch.Length)
	}
	if due > window/2 {
		return nil
	}
	var run []want
	for i := at; i < c.count && due < window; i++ {
		w, _ := l.foresee(i)
		if !w.started || (len(run) > 0 && !l.fits(run, w)) {
			break
		}
		run = append(run, l.launch(w))
		due += int64(w.ch.Length)
	}
	t.fetched = at + len(run)
	return run
}

// foresee returns chunk i as a want, to be started if it's missing; credit
// says whether there is some for it. content.mu is held.
func (l *Layer) foresee(i int) (w want, credit bool) {
	c := l.content
	if i < 0 || i >= c.count || !c.lacks(i) {
		return want{}, false
	}
	ch, err := l.chunk(i)
	if err != nil { // its page isn't loaded; reading on will load it
		return want{}, false
	}
	return want{chunk: i, ch: ch, origin: ReadAhead, started: true}, int64(ch.BlobLength) <= c.ahead.credit()
}

// launch gives a want that was foreseen its flight, for which nobody waits
// yet. content.mu is held.
func (l *Layer) launch(w want) want {
	c := l.content
	w.flight, _ = c.join(w.chunk)
	w.flight.waiters--
	c.chunks[w.chunk].Or(mark | guessed)
	c.ahead.unused += int64(w.ch.BlobLength)
	return w
}

// unmark returns what chunk i's bits were before it took the marks away.
func (c *content) unmark(i int) uint32 { return c.chunks[i].And(^uint32(mark | guessed)) }

// noteRead is called when the marked chunk i is read: it fetches, in the
// background, what will follow.
func (l *Layer) noteRead(ctx context.Context, i int) {
	c := l.content
	bits := c.unmark(i)
	if bits&mark == 0 {
		return // another reader of the chunk does it
	}
	ch, err := l.chunk(i)
	if err != nil {
		return
	}
	c.mu.Lock()
	if bits&guessed != 0 {
		c.ahead.unused -= int64(ch.BlobLength)
		c.ahead.hits += int64(ch.BlobLength)
	}
	c.ahead.read(c, i, ch)
	c.mu.Unlock()
	l.lookAhead(ctx)
}

// lookAhead fetches, in the background, what foresight says will be wanted.
func (l *Layer) lookAhead(ctx context.Context) {
	c := l.content
	if l.cache.opts.ReadAhead <= 0 || c.failing.Load() {
		return
	}
	for l.cache.traffic.tryReadAhead() {
		c.mu.Lock()
		run := l.follow(c.ahead.latest)
		if len(run) == 0 {
			run = l.neighbourhood(l.cache.traffic.readAheadSize(l.cache.opts.MaxRequest))
		}
		c.mu.Unlock()
		if len(run) == 0 {
			l.cache.traffic.endReadAhead()
			return
		}
		l.cache.stats.readAheads.Add(1)
		if !l.startFetch(ctx, run, func(ok bool) {
			l.cache.traffic.endReadAhead()
			if ok {
				l.lookAhead(ctx)
			}
		}) {
			return
		}
	}
}

// extend appends to a run that somebody waits for the hot chunks that follow
// it. So they come in the same answer, behind what is waited for, and don't
// share the way with it as another request would. content.mu is held.
func (l *Layer) extend(run []want) []want {
	c := l.content
	if l.cache.opts.ReadAhead <= 0 || c.failing.Load() {
		return run
	}
	most := l.cache.traffic.readAheadSize(l.cache.opts.MaxRequest)
	var size int64
	for i := run[len(run)-1].chunk + 1; i < c.count && c.ahead.heat[i] >= hotChunk; i++ {
		w, ok := l.foresee(i)
		if size += int64(w.ch.BlobLength); !ok || size > most || !l.fits(run, w) {
			break
		}
		run = append(run, l.launch(w))
	}
	return run
}

// neighbourhood returns the hottest missing chunk and those around it that are
// hot, too, up to most bytes of the blob. content.mu is held.
func (l *Layer) neighbourhood(most int64) []want {
	c := l.content
	i := c.ahead.hottest(c)
	w, ok := l.foresee(i)
	if !ok {
		return nil
	}
	first := i // first, to begin with the one that is wanted first
	size := int64(w.ch.BlobLength)
	for first > 0 && c.ahead.heat[first-1] >= hotChunk {
		w, ok := l.foresee(first - 1)
		if size += int64(w.ch.BlobLength); !ok || size > most {
			break
		}
		first--
	}
	var run []want
	size = 0
	for i = first; i < c.count && c.ahead.heat[i] >= hotChunk; i++ {
		w, ok := l.foresee(i)
		if size += int64(w.ch.BlobLength); !ok || size > most {
			break
		}
		run = append(run, l.launch(w))
	}
	return run
}
