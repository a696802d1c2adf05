package cache

import (
	"sync"
	"time"
)

// pace is what is measured of the way to the sources: how long an answer
// takes to begin and how fast it then comes. The zero value knows nothing.
type pace struct {
	mu   sync.Mutex // a leaf lock
	trip time.Duration
	rate float64 // bytes per second
}

// A measurement moves the estimate by 1/paceWeight; a faster one more: what
// is slow is often slow because others share the way.
const paceWeight = 8

// answered takes note of how long the first byte of an answer took.
func (p *pace) answered(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.trip == 0:
		p.trip = d
	case d < p.trip:
		p.trip -= (p.trip - d) / 2
	default:
		p.trip += (d - p.trip) / paceWeight
	}
}

// minPaced is how many bytes an answer must have to tell a rate.
const minPaced = 64 << 10

// arrived takes note of how long n bytes took after the first.
func (p *pace) arrived(n int64, d time.Duration) {
	if n < minPaced || d <= 0 {
		return
	}
	rate := float64(n) / d.Seconds()
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.rate == 0:
		p.rate = rate
	case rate > p.rate:
		p.rate += (rate - p.rate) / 2
	default:
		p.rate += (rate - p.rate) / paceWeight
	}
}

// product is the bandwidth-delay product in bytes: what the way holds.
func (p *pace) product() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return int64(p.rate * p.trip.Seconds())
}
