package snapshot

import (
	"context"
	"strconv"

	"sluice/internal/node/mount"
	"sluice/oci"
)

// Images is what the snapshotter needs to know about streamed images.
// *mount.Manager is the implementation, and *disks.Manager that of Teleport's; the
// tests use one of plain directories. All methods may be called concurrently.
//
// An owner is a name under which content is kept: as long as an owner holds or
// attaches something of an image, it stays usable.
type Images interface {
	// Pull makes the image ref, whose manifest has the given digest (empty
	// when unknown), ready to be mounted here, or returns an error that says
	// why it can't stream. It remembers either answer for the time that a
	// pull takes, so that asking once per layer costs one lookup.
	Pull(ctx context.Context, ref string, manifest oci.Digest) (mount.Image, error)

	// Hold keeps an image's local state, and the content of its lowest layers
	// up to the given one, for owner.
	Hold(ctx context.Context, image oci.Digest, layer int, owner string) error

	// Own makes owner one of a part of an image without mounting it: if it is
	// mounted it stays so until Release.
	Own(ctx context.Context, image oci.Digest, part mount.Part, owner string) error

	// Attach mounts a part of an image for owner and returns the directory,
	// which stays mounted until Release. Attaching again returns the same.
	Attach(ctx context.Context, image oci.Digest, part mount.Part, owner string) (string, error)

	// Release gives up all that owner has. Unknown owners are fine.
	Release(ctx context.Context, owner string) error

	// Collect removes what is here of the images that were held and aren't
	// any more. It may take as long as removing files does.
	Collect(ctx context.Context)

	// Usage returns how many bytes of one layer's content are on the disk.
	Usage(ctx context.Context, image oci.Digest, layer int) (int64, error)
}

// Labels with which the metadata store remembers that a committed snapshot is
// streamed. A client can neither set nor change them.
const (
	labelImage   = "sluice.image"   // mount.Image.ID
	labelLayer   = "sluice.layer"   // which of the image's layers, from 0
	labelLayers  = "sluice.layers"  // how many layers the image has
	labelLayered = "sluice.layered" // "true": the image has no merged mount
)

// remote says which layer of which image a streamed snapshot is.
type remote struct {
	image   oci.Digest
	layer   int
	layers  int
	layered bool // mount.Image.Layered
}

// top reports whether the image's merged mount is what the snapshot's chain shows:
// it is the whole image, and there is such a mount.
func (r remote) top() bool { return !r.layered && r.layer == r.layers-1 }

// part is what of the image a snapshot on top of this one mounts for it.
func (r remote) part() mount.Part {
	if r.top() {
		return mount.Merged
	}
	return mount.Part(r.layer)
}

// labels returns what remoteOf reads.
func (r remote) labels() map[string]string {
	labels := map[string]string{
		labelImage:  r.image.String(),
		labelLayer:  strconv.Itoa(r.layer),
		labelLayers: strconv.Itoa(r.layers),
	}
	if r.layered {
		labels[labelLayered] = "true"
	}
	return labels
}

// remoteOf reads a snapshot's labels; ok is false for an ordinary snapshot.
func remoteOf(labels map[string]string) (r remote, ok bool) {
	image, err := oci.ParseDigest(labels[labelImage])
	if err != nil {
		return remote{}, false
	}
	layer, err := strconv.Atoi(labels[labelLayer])
	if err != nil {
		return remote{}, false
	}
	layers, err := strconv.Atoi(labels[labelLayers])
	if err != nil || layer < 0 || layer >= layers {
		return remote{}, false
	}
	return remote{image: image, layer: layer, layers: layers, layered: labels[labelLayered] == "true"}, true
}

// dropReserved removes the labels that only this package may set.
func dropReserved(labels map[string]string) {
	delete(labels, labelImage)
	delete(labels, labelLayer)
	delete(labels, labelLayers)
	delete(labels, labelLayered)
}
