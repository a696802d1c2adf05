package auth

import (
	"sync"
	"time"
)

// cache keeps at most max values, each for a while. When it is full, one that
// was soon to go makes room. The zero value holds nothing and takes nothing.
type cache[K comparable, V any] struct {
	max int

	mu      sync.Mutex
	entries map[K]cached[V] // guarded by mu
	sets    uint64          // guarded by mu; counts calls of set
}

type cached[V any] struct {
	value   V
	expires time.Time
}

// get returns a value that hasn't expired, and the count that fill wants.
func (c *cache[K, V]) get(key K, now time.Time) (value V, ok bool, sets uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.entries[key]
	if !ok || !now.Before(e.expires) {
		return value, false, c.sets
	}
	return e.value, true, c.sets
}

// set keeps a value that the caller knows to be the newest.
func (c *cache[K, V]) set(key K, value V, expires time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sets++
	c.put(key, value, expires)
}

// fill keeps a value that was read after get missed, unless another was set
// meanwhile, which might be newer.
func (c *cache[K, V]) fill(key K, value V, expires time.Time, sets uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if sets == c.sets {
		c.put(key, value, expires)
	}
}

// drop forgets a value; what is being read now won't be kept either.
func (c *cache[K, V]) drop(key K) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sets++
	delete(c.entries, key)
}

func (c *cache[K, V]) put(key K, value V, expires time.Time) {
	if c.max == 0 {
		return
	}
	if c.entries == nil {
		c.entries = map[K]cached[V]{}
	}
	if _, ok := c.entries[key]; !ok && len(c.entries) >= c.max {
		c.evict()
	}
	c.entries[key] = cached[V]{value, expires}
}

// evict removes the entry that expires first of a few.
func (c *cache[K, V]) evict() {
	var first K
	var expires time.Time
	n := 0
	for key, e := range c.entries { // which begins anywhere
		if n == 0 || e.expires.Before(expires) {
			first, expires = key, e.expires
		}
		if n++; n == 8 {
			break
		}
	}
	delete(c.entries, first)
}
