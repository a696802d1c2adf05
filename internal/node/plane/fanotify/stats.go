package fanotify

import "sync/atomic"

// stats counts what this process has done.
type stats struct{ events, filled, failed, waiting atomic.Int64 }

// Stats counts what the process that asks has served.
type Stats struct {
	Events  int64 // reads that the kernel asked about, and that were answered
	Filled  int64 // bytes written into device files
	Failed  int64 // reads that failed
	Waiting int64 // reads being answered now
}

func (s *stats) snapshot() Stats {
	return Stats{Events: s.events.Load(), Filled: s.filled.Load(), Failed: s.failed.Load(), Waiting: s.waiting.Load()}
}
