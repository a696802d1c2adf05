package cache

import (
	"errors"
	"fmt"

	"sluice/oci"
)

var (
	// ErrTimeout is a ReadAt that waited Options.FaultTimeout in vain.
	ErrTimeout = errors.New("content did not arrive in time")

	// ErrClosed is the use of a Cache or a Layer after Close or Release.
	ErrClosed = errors.New("layer released or cache closed")

	// ErrQuota ends a Fill for which there's no room.
	ErrQuota = errors.New("the cache's quota is used up by layers in use; raise it or remove images")

	// ErrUnsettled is a Prune before Settled.
	ErrUnsettled = errors.New("what is in use isn't known yet, so soon after the start; try again in a while")
)

// IntegrityError is content that isn't what its digest promises, and that
// asking again didn't mend.
type IntegrityError struct {
	Key   oci.Digest // of the layer
	Chunk int        // -1: the layer as a whole, which is now quarantined
	Err   error
}

// Error names the layer, the chunk and what differs.
func (e *IntegrityError) Error() string {
	if e.Chunk < 0 {
		return fmt.Sprintf("layer %s: integrity: %v", e.Key, e.Err)
	}
	return fmt.Sprintf("layer %s: integrity of chunk %d: %v", e.Key, e.Chunk, e.Err)
}

// Unwrap returns what differs.
func (e *IntegrityError) Unwrap() error { return e.Err }
