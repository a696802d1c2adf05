package supply

import (
	"log/slog"
	"sync"
	"time"
)

// ErrorLog lets one line per second through and counts the others: a registry
// that is away fails thousands of reads.
type ErrorLog struct {
	mu      sync.Mutex // of what follows
	next    time.Time
	skipped int
}

// Report logs an error, or counts it.
func (e *ErrorLog) Report(log *slog.Logger, msg string, args ...any) {
	e.mu.Lock()
	now := time.Now()
	if now.Before(e.next) {
		e.skipped++
		e.mu.Unlock()
		return
	}
	skipped := e.skipped
	e.next, e.skipped = now.Add(time.Second), 0
	e.mu.Unlock()
	if skipped > 0 {
		args = append(args, "not_logged_before", skipped)
	}
	log.Error(msg, args...)
}
