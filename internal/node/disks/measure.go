package disks

import (
	"time"

	"sluice/internal/node/cache"
)

// Attaches is how long mounting disks took since the start.
type Attaches struct {
	Count   int64         `json:"count"`
	Time    time.Duration `json:"time"`    // all of it, added up
	Latency []int64       `json:"latency"` // of Count, by how long it took; see cache.LatencyBounds
}

// noteAttach counts a disk that was mounted.
func (m *Manager) noteAttach(took time.Duration) {
	bounds := cache.LatencyBounds()
	i := 0
	for i < len(bounds) && took > bounds[i] {
		i++
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.attaches.Latency == nil {
		m.attaches.Latency = make([]int64, len(bounds)+1)
	}
	m.attaches.Count++
	m.attaches.Time += took
	m.attaches.Latency[i]++
}
