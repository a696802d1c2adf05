package mount

import (
	"context"
	"runtime/debug"
	"time"
)

// tidyAfter is how long after the last pull its memory is given back.
const tidyAfter = 5 * time.Second

// noteGarbage tells that there is memory to give back.
func (m *Manager) noteGarbage() {
	select {
	case m.garbage <- struct{}{}:
	default:
	}
}

// tidyLoop gives memory back to the system that pulls needed to unpack and check
// metadata, some time after the last of them. The runtime by itself keeps what it
// had at the most, on a node where nothing may happen for days.
func (m *Manager) tidyLoop(ctx context.Context) {
	due := time.NewTimer(tidyAfter) // the start has read and checked images, too
	defer due.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.garbage:
			due.Reset(tidyAfter)
		case <-due.C:
			debug.FreeOSMemory()
		}
	}
}
