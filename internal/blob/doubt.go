package blob

import (
	"context"
	"time"
)

type doubtKey struct{}

// Doubt returns a context for asking once more for what came, and wasn't what
// its digest or size says. A Source that has several places to read from then
// asks another one first: content that a mirror sends wrong all the time must
// not be lost to its readers. What is asked for after the call isn't doubted,
// however often it takes.
func Doubt(ctx context.Context) context.Context {
	return context.WithValue(ctx, doubtKey{}, time.Now())
}

// Doubted reports whether ctx is one of Doubt.
func Doubted(ctx context.Context) bool {
	_, ok := DoubtedBefore(ctx)
	return ok
}

// DoubtedBefore returns before when what was asked for is doubted, and whether
// anything is.
func DoubtedBefore(ctx context.Context) (before time.Time, ok bool) {
	before, ok = ctx.Value(doubtKey{}).(time.Time)
	return before, ok
}
