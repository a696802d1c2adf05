package mount

import (
	"context"
	"runtime/debug"
	"time"
)

const (
	// tidyAfter is how long after the last metadata was unpacked the memory that
	// it took is given back.
	tidyAfter = 5 * time.Second

	// forgetInterval is how often chunk tables are forgotten. What is read
	// meanwhile needs them, and what is read next reads them again, which is
	// little once in that time.
	forgetInterval = time.Minute
)

// noteGarbage tells that there is memory to give back.
func (m *Manager) noteGarbage() {
	select {
	case m.garbage <- struct{}{}:
	default:
	}
}

// tidyLoop gives memory back to the system that it took to unpack and check
// metadata, some time after the last of it: that of layers comes after the pull.
// The runtime by itself keeps what it had at the most, on a node where nothing may
// happen for days.
func (m *Manager) tidyLoop(ctx context.Context) {
	due := time.NewTimer(tidyAfter) // the start has read and checked images, too
	defer due.Stop()
	forget := time.NewTicker(forgetInterval)
	defer forget.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.garbage:
			due.Reset(tidyAfter)
		case <-due.C:
			m.forgetTables()
			debug.FreeOSMemory()
		case <-forget.C:
			m.forgetTables()
		}
	}
}

// forgetTables gives back the memory of all chunk tables that are on the disk. It
// would grow with the images that are mounted, and most of them have all that
// they need.
func (m *Manager) forgetTables() {
	for _, img := range m.list() {
		img.opening.Lock()
		if img.table != nil && img.tables.local.Load() != nil {
			img.table.Forget()
		}
		img.opening.Unlock()
	}
}
