// Package oci is the vocabulary of the project: repository names, references,
// digests, descriptors, media types and error codes of the OCI distribution,
// image and Docker schema 2 specifications, and Registry, the one interface
// that everything which stores or serves images implements.
//
// Start with Registry. The in-memory implementation is in oci/ocimem, the one
// over HTTP in internal/remote, the one on storage in internal/registry; the
// conformance suite that each of them passes is oci/ocitest.
//
// Specifications: OCI distribution-spec 1.1, OCI image-spec 1.1, Docker image
// manifest version 2 schema 2.
package oci
