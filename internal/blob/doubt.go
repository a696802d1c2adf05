package blob

import "context"

type doubtKey struct{}

// Doubt returns a context for asking once more for what came, and wasn't what
// its digest or size says. A Source that has several places to read from then
// asks another one first: content that a mirror sends wrong all the time must
// not be lost to its readers.
func Doubt(ctx context.Context) context.Context { return context.WithValue(ctx, doubtKey{}, true) }

// Doubted reports whether ctx is one of Doubt.
func Doubted(ctx context.Context) bool { return ctx.Value(doubtKey{}) != nil }
