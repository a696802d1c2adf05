package cache

import (
	"log/slog"
	"time"
)

// Options configure a Cache. The zero value of each is its default.
type Options struct {
	// Dir is the cache's directory, made if it's missing. One Cache at a time
	// has it.
	Dir string

	// Quota is how much disk the cache may have; 0 is no bound. Free is how
	// much of the file system it leaves to others. From the lesser of both
	// follows the high mark: when it is passed, layers are evicted, from
	// Settled on, until the cache is down to Low percent of it (default 90).
	// First go the layers that no image has, then the least recently used,
	// never pinned ones nor those that somebody has acquired. Fill stops at
	// the high mark, or for layers that only it has acquired at the low one.
	// What running containers read is stored even so: an ordinary pull would
	// have needed the disk for it before they started.
	Quota, Free Space
	Low         float64

	// FaultTimeout bounds how long a ReadAt waits for content; default 60 s.
	FaultTimeout time.Duration

	// ReadAhead is up to how many decoded bytes are fetched ahead of a
	// sequential reader; default 4 MiB, negative for none.
	ReadAhead int64

	// MaxRequest bounds the bytes of one ranged request, but for those of
	// Fill, which end when a reader comes to wait; default 4 MiB.
	MaxRequest int64

	// FillBandwidth bounds what all Fills together fetch, in bytes per
	// second; default no bound.
	FillBandwidth int64

	// FlushInterval is how often new content is made durable; default 1 s.
	// What a crash catches before that is fetched again.
	FlushInterval time.Duration

	// Log receives what operators should know; default none.
	Log *slog.Logger
}

func (o Options) withDefaults() Options {
	o.FaultTimeout = defaultTo(o.FaultTimeout, 60*time.Second)
	o.FlushInterval = defaultTo(o.FlushInterval, time.Second)
	o.MaxRequest = defaultTo(o.MaxRequest, 4<<20)
	switch {
	case o.ReadAhead == 0:
		o.ReadAhead = 4 << 20
	case o.ReadAhead < 0:
		o.ReadAhead = 0
	}
	if o.Low <= 0 || o.Low > 100 {
		o.Low = 90
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

func defaultTo[T int64 | time.Duration](v, d T) T {
	if v <= 0 {
		return d
	}
	return v
}
