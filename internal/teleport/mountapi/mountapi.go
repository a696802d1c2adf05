// Package mountapi is the API by which clients of Project Teleport learn where the
// expanded layers of an image are: GET /mount/v1/{repository}/_manifests/{reference}.
// Get asks; package mountserver answers; docs/teleport.md describes the documents,
// which are below.
//
// What is answered in the original is public only as far as its statuses: 200 when
// all layers can be mounted, 409 while they are being expanded, 404 where Teleport is
// not enabled. Here an image that can't be expanded is 422, so that nobody waits for
// it. The documents and the headers by which a client says where it is and what it can
// do are of our making.
package mountapi

import (
	"time"

	"sluice/oci"
)

// Prefix is where the API is.
const Prefix = "/mount/v1/"

// Headers of requests. A client that sends none can mount, and is where the registry
// is.
const (
	HeaderCapable = "X-Teleport-Capable" // "true" or "false"
	HeaderRegion  = "X-Teleport-Region"  // as in the registry's teleport.region
)

// The formats of layers.
const (
	FormatVHD  = "vhd+erofs" // a fixed VHD on an SMB share, with an EROFS file system
	FormatBlob = "blob"      // the compressed layer, to be pulled
)

// The codes of errors, besides those of the distribution specification.
const (
	CodeExpanding   = "TELEPORT_EXPANDING"    // 409
	CodeNotEnabled  = "TELEPORT_NOT_ENABLED"  // 404
	CodeNotExpanded = "TELEPORT_NOT_EXPANDED" // 404
	CodeFailed      = "TELEPORT_FAILED"       // 422
)

// Mount is the answer for an image that can be had.
type Mount struct {
	Repository string       `json:"repository"`
	Digest     oci.Digest   `json:"digest"` // of the image's manifest
	Platform   oci.Platform `json:"platform"`
	Format     string       `json:"format"`
	SMB        *SMB         `json:"smb,omitempty"` // of FormatVHD
	Layers     []Layer      `json:"layers"`        // the lowest first
}

// SMB says how the share is reached.
type SMB struct {
	Server   string    `json:"server"` // HOST[:PORT]
	Share    string    `json:"share"`
	Username string    `json:"username"`
	Password string    `json:"password"`
	Expires  time.Time `json:"expires"` // of username and password; ask again before
}

// Layer is a layer, in one form or the other.
type Layer struct {
	Digest oci.Digest `json:"digest"` // of the layer's blob
	DiffID oci.Digest `json:"diffID"`

	// URL is where it is: smb://SERVER/SHARE/PATH or the blob's. Size is what is
	// there, in bytes.
	URL  string `json:"url"`
	Size int64  `json:"size"`

	// Of FormatVHD: the path in the share, the digest of the file, and the SHA-256
	// of its blocks, with which it can be read in parts.
	Path      string     `json:"path,omitempty"`
	VHDDigest oci.Digest `json:"vhdDigest,omitempty"`
	Sums      *Sums      `json:"sums,omitempty"`

	// Of FormatBlob.
	MediaType string `json:"mediaType,omitempty"`
}

// Sums are the SHA-256 of each block of a file, one behind the other.
type Sums struct {
	Path      string     `json:"path"` // in the share
	Digest    oci.Digest `json:"digest"`
	BlockSize int64      `json:"blockSize"` // bytes
}

// Progress is the detail of CodeExpanding and CodeFailed.
type Progress struct {
	Status    string `json:"status"` // of the operation, as in /acr/v1/…/_operations
	Progress  string `json:"progress,omitempty"`
	ErrorCode string `json:"errorCode,omitempty"`
	Details   string `json:"details"`
}
