package cache

import (
	"context"
)

const (
	// maxStreams is how many sequential readers of one layer are told apart.
	maxStreams = 16

	// firstReadAhead is what the second read in sequence fetches ahead, in
	// decoded bytes. Each later one fetches twice as much, up to
	// Options.ReadAhead.
	firstReadAhead = 512 << 10

	// skipAhead is up to how many chunks that are there already are passed
	// over in search of what to fetch ahead.
	skipAhead = 64
)

// streams recognises readers that go through a layer from chunk to chunk.
// Guarded by content.mu.
type streams struct {
	all   [maxStreams]stream
	clock int64
}

// stream is one such reader, or maybe one.
type stream struct {
	next   int   // the chunk after the last one fetched for it
	mark   int   // the chunk that, when read, starts the next read-ahead
	window int64 // decoded bytes to fetch ahead; 0 before it's known to be one
	used   int64 // when, by clock; 0: free
}

// advance takes note that chunks first to end, exclusive, are fetched on
// demand. It returns the stream that they continue, with its window grown, or
// nil if this is the first that is seen of it.
func (s *streams) advance(first, end int, most int64) *stream {
	s.clock++
	oldest := &s.all[0]
	for k := range s.all {
		t := &s.all[k]
		// Readers in the kernel ask for several pieces at a time, which
		// arrive here in any order.
		if t.used > 0 && first >= t.next-1 && first <= t.next+2 {
			t.grow(most)
			t.next = max(t.next, end)
			t.used = s.clock
			return t
		}
		if t.used < oldest.used {
			oldest = t
		}
	}
	*oldest = stream{next: end, mark: -1, used: s.clock}
	return nil
}

// marked returns the stream whose mark a chunk is.
func (s *streams) marked(chunk int) *stream {
	for k := range s.all {
		if t := &s.all[k]; t.used > 0 && t.mark == chunk {
			s.clock++
			t.used = s.clock
			return t
		}
	}
	return nil
}

func (t *stream) grow(most int64) { t.window = min(max(2*t.window, firstReadAhead), most) }

// extend adds to a run, which ends with what a reader waits for, what it will
// want next if it is sequential. content.mu is held.
func (l *Layer) extend(run []want) []want {
	most := l.cache.opts.ReadAhead
	c := l.content
	if most <= 0 || c.failing.Load() { // what can't be written isn't kept for long
		return run
	}
	end := run[len(run)-1].chunk + 1
	t := c.streams.advance(run[0].chunk, end, most)
	if t == nil {
		return run
	}
	n := len(run)
	run = l.ahead(run, end, t.window)
	if len(run) > n {
		t.mark = end
		t.next = run[len(run)-1].chunk + 1
		c.chunks[end].Or(mark)
	}
	return run
}

// ahead appends missing chunks from chunk i on to run, up to window decoded
// bytes or the bound of one request. It stops at a chunk that isn't missing.
// Nobody waits for their flights yet. content.mu is held.
func (l *Layer) ahead(run []want, i int, window int64) []want {
	c := l.content
	for ; i < c.count && window > 0; i++ {
		ch, err := l.chunk(i)
		if err != nil {
			break // its page isn't loaded; reading on will load it
		}
		w := want{chunk: i, ch: ch, origin: ReadAhead, started: true}
		if c.chunks[i].Load()&(present|claimed) != 0 || c.flights[i] != nil || (len(run) > 0 && !l.fits(run, w)) {
			break
		}
		w.flight, _ = c.join(i)
		w.flight.waiters--
		run = append(run, w)
		window -= int64(ch.Length)
	}
	return run
}

// readAhead is called when the marked chunk i is read: it fetches, in the
// background, what follows what its stream has fetched so far.
func (l *Layer) readAhead(ctx context.Context, i int) {
	c := l.content
	if c.chunks[i].And(^uint32(mark))&mark == 0 {
		return // another reader of the chunk does it
	}
	if !l.cache.traffic.tryReadAhead() {
		c.chunks[i].Or(mark) // later, then
		return
	}
	c.mu.Lock()
	var run []want
	if t := c.streams.marked(i); t != nil {
		t.grow(l.cache.opts.ReadAhead)
		at := t.next
		for n := 0; n < skipAhead && at < c.count && c.chunks[at].Load()&(present|claimed) != 0; n++ {
			at++
		}
		run = l.ahead(nil, at, t.window)
		t.next = at + len(run)
		t.mark = -1
		if len(run) > 0 {
			t.mark = at
			c.chunks[at].Or(mark)
		}
	}
	c.mu.Unlock()
	if len(run) == 0 {
		l.cache.traffic.endReadAhead()
		return
	}
	l.cache.stats.readAheads.Add(1)
	l.startFetch(ctx, run, l.cache.traffic.endReadAhead)
}
