package cache

import "sluice/oci"

// Remove removes a layer from disk, unless it is acquired, and returns how many
// bytes that gave back: for content that no image of the node has any more.
func (c *Cache) Remove(key oci.Digest) int64 {
	c.mu.Lock()
	s := c.slots[key]
	c.mu.Unlock()
	if s == nil {
		return 0
	}
	return c.remove(s)
}
