package cache

import (
	"sync/atomic"
	"time"
)

// Origin is why bytes of a layer's blob were fetched.
type Origin int

// The origins, in the order in which they have priority.
const (
	Fault      Origin = iota // a reader waited for them
	ReadAhead                // a reader was expected to want them next
	BootPack                 // they came in a boot pack (PutFrame)
	Background               // Fill

	origins = iota
)

// String is the name that metrics use.
func (o Origin) String() string {
	switch o {
	case Fault:
		return "fault"
	case ReadAhead:
		return "readahead"
	case BootPack:
		return "bootpack"
	case Background:
		return "background"
	}
	return "unknown"
}

// Meter counts what reading some layers costs, those of an image, say: all
// Layers that were acquired with it. The zero value is ready; it may be used
// concurrently.
type Meter struct {
	faults, failures atomic.Int64
	wait             atomic.Int64 // nanoseconds
	latency          [latencies]atomic.Int64
	bytes            [origins]atomic.Int64
}

// latencies is the number of counts in a Metered's histogram.
const latencies = 14

// LatencyBounds returns the upper bounds of the histogram of Metered: count i
// has the waits that are at most bound i, and longer than the one before. The
// last count has all that are longer.
func LatencyBounds() [latencies - 1]time.Duration {
	const ms = time.Millisecond
	return [...]time.Duration{
		ms, 2 * ms, 5 * ms, 10 * ms, 20 * ms, 50 * ms, 100 * ms, 200 * ms, 500 * ms,
		1000 * ms, 2000 * ms, 5000 * ms, 20_000 * ms,
	}
}

// Metered is what a Meter has counted. All of it only grows.
type Metered struct {
	Faults   int64            // reads that had to wait for content, Failures included
	Failures int64            // reads that ended with an error
	Wait     time.Duration    // how long all readers waited, added up
	Latency  [latencies]int64 // of Faults, by how long they waited; see LatencyBounds
	Bytes    [origins]int64   // compressed bytes that arrived, by Origin
}

// Read returns the counts up to now. Those of a read that ends meanwhile may
// be in some of them only.
func (m *Meter) Read() Metered {
	r := Metered{Faults: m.faults.Load(), Failures: m.failures.Load(), Wait: time.Duration(m.wait.Load())}
	for i := range r.Latency {
		r.Latency[i] = m.latency[i].Load()
	}
	for i := range r.Bytes {
		r.Bytes[i] = m.bytes[i].Load()
	}
	return r
}

// waited counts a fault.
func (m *Meter) waited(d time.Duration) {
	m.faults.Add(1)
	m.wait.Add(int64(d))
	i := 0
	for bounds := LatencyBounds(); i < len(bounds) && d > bounds[i]; {
		i++
	}
	m.latency[i].Add(1)
}

// arrived counts bytes of a blob.
func (m *Meter) arrived(o Origin, n int) { m.bytes[o].Add(int64(n)) }
