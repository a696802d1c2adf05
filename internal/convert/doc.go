// Package convert is the generator: it makes the streaming artifact of an
// image that is in a registry, and stores it there as the image's referrer.
//
// Convert resolves the reference, decides what of it can be streamed
// (eligible.go; the error codes are those of Azure Container Registry),
// converts the layers (image.go) into blobs of the same repository
// (upload.go), and pushes the artifact's manifest last of all. So a referrer that
// exists is complete, and an interrupted conversion leaves nothing but blobs
// that nobody refers to.
//
// It works on any oci.Registry: our own server converts within itself, the
// command line converts in a registry at the other end of HTTP.
package convert
