package mount

import (
	"strconv"

	"sluice/oci"
)

// Part says what of an image a directory shows: the whole of it, or what one
// of its layers contributes.
type Part int

// Merged is the whole image: one EROFS mount with all layers merged.
const Merged Part = -1

// String is "merged" or the layer's number.
func (p Part) String() string {
	if p == Merged {
		return "merged"
	}
	return strconv.Itoa(int(p))
}

// Image is an image that this node can stream: everything that a mount of it
// needs is on the local disk and has been verified.
type Image struct {
	// ID is the digest of the streaming artifact's manifest; of a Layered image,
	// of what its layers are made of.
	ID oci.Digest

	// Reference is how the image was asked for when it first came here.
	Reference string

	// Manifest is the digest of the image's own manifest for this platform,
	// or of its index when only that was known.
	Manifest oci.Digest

	// DiffIDs are the layers' diff IDs as the artifact states them, lowest
	// first. Whoever knows them from a trusted source must compare.
	DiffIDs []oci.Digest

	// Layered: there is nothing merged of it. The whole image is its layers' own
	// mounts, stacked.
	Layered bool
}
