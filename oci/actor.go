package oci

import "context"

// Actor is who makes a call of a Registry, and by which request: what a
// Registry that keeps records puts into them. It grants nothing.
type Actor struct {
	// Name is that of the account; empty when anonymous.
	Name string

	// Remote is the client's address, Agent what it calls itself.
	Remote, Agent string

	// RequestID joins records of the same request.
	RequestID string
}

type actorKey struct{}

// WithActor returns a context of calls made by a.
func WithActor(ctx context.Context, a Actor) context.Context {
	return context.WithValue(ctx, actorKey{}, a)
}

// ActorOf returns the actor of a context, the zero Actor if it has none.
func ActorOf(ctx context.Context) Actor {
	a, _ := ctx.Value(actorKey{}).(Actor)
	return a
}
