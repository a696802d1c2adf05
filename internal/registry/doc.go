// Package registry is the server half of the OCI distribution protocol: Handler
// speaks it over HTTP for any oci.Registry, such as that of package stored.
// NewServer adds the limits that an HTTP server on an open network needs.
//
// A request is parsed to a Request with a Kind (request.go), the table in
// handler.go finds its method, methods answer or return an error, and writeError
// turns every error into the protocol's form. Files are named after what is
// asked for: blobs.go, uploads.go, manifests.go, lists.go.
//
// Source: OCI distribution-spec 1.1 and its 1.1+dev additions (digest-algorithm,
// tag parameters, canceling of uploads). "end-4a" and the like are its names of
// endpoints. Where it is silent, the handler does what Docker's registry does.
package registry
