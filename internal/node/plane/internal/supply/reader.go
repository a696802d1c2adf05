package supply

import (
	"context"
	"time"
)

// Patience bounds the reads of a plane.
type Patience struct {
	Read  time.Duration // one read
	Adopt time.Duration // the wait for a device's first source
}

// Reader reads from supplies, one read at a time, without allocating. The zero
// value is ready.
type Reader struct{ ctx *readContext }

// Read fills p, all of which lies below d.KernelSize, with the device's bytes
// from off on; past the device's end they are zeros. It ends when base does, and
// within patience.Read; what has just been waited for in vain is given only a
// moment, so that the kernel's own retries don't multiply the bound.
func (r *Reader) Read(base context.Context, patience Patience, d *Supply, p []byte, off int64) error {
	if r.ctx == nil {
		r.ctx = &readContext{base: base}
	}
	began := time.Now()
	r.ctx.deadline = began.Add(d.patience(off, int64(len(p)), patience.Read))
	err := d.readAt(r.ctx, p, off, patience.Adopt)
	if !r.ctx.finish() {
		r.ctx = nil
	}
	if err != nil {
		d.fail(off, int64(len(p)), time.Since(began))
	}
	return err
}
