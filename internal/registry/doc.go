// Package registry is the server half of the OCI distribution protocol. Wrap is
// the front that everything a registry serves stands behind: who calls, how
// often they may, what is logged, counted and traced. Handler speaks /v2/… for
// any oci.Registry. NewServer adds the limits that an HTTP server on an open
// network needs, Certificate TLS that can be renewed while it runs.
//
// The front keeps a conversation for each request (conversation.go, found in the
// request's context). Handler parses the request to a Request with a Kind
// (request.go), finds its endpoint (handler.go), asks whether the caller may
// (authorize.go), and calls the endpoint's method, which answers or returns an
// error; WriteError turns every error into the protocol's form. Files are named
// after what is asked for: blobs.go, uploads.go, manifests.go, lists.go.
//
// Source: OCI distribution-spec 1.1 and its 1.1+dev additions (digest-algorithm,
// tag parameters, canceling of uploads). "end-4a" and the like are its names of
// endpoints. Where it is silent, the handler does what Docker's registry does.
package registry
