// Package acr is the management API of a registry, /acr/v1/…: attributes and
// locks of repositories, manifests and tags, lists that can be ordered and
// paged, soft-deleted content and its restoring, storage usage, tokens and
// scope maps, garbage collection, and import from other registries.
//
// What Azure Container Registry has is here under the same paths with the same
// JSON, so that its command line and SDKs work; what it has not, or has behind
// another API, is under names that begin with an underscore, which no
// repository's name does.
//
// Start with the table of endpoints in request.go: each has a method, a path
// and the access that it needs. Handler (handler.go) is the server; Client
// (client.go) is the other end, which the command line uses. Both speak the
// documents of wire.go. Import (import.go) is a queue in the index: a request
// puts a job there, and RunImports of any replica does it.
package acr
