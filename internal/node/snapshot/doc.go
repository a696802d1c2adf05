// Package snapshot is Sluice as containerd sees it: a Snapshotter whose
// snapshots are overlayfs directories, as in containerd's own overlayfs
// snapshotter, or layers of a streamed image that nobody had to download.
//
// # How a pull streams
//
// containerd's unpacker asks the snapshotter to Prepare one snapshot per layer
// and names, in labels, the image and the chain ID that the layer will have.
// For an image that streams, the snapshotter commits a snapshot under that
// chain ID at once and answers "already exists"; containerd then neither
// downloads nor unpacks that layer. For every other image it returns an
// ordinary writable directory and the pull goes on as it always did. Which of
// the two happens is decided by Images (the mount manager), once per image.
//
// # What is mounted
//
// A snapshot on top of an image's last layer gets one lower directory: the
// image's merged EROFS mount, however many layers the image has. A snapshot on
// top of some lower layer (another image that begins with the same layers)
// stacks those layers' own mounts; so does every one on an image that has only
// those (mount.Image.Layered). Streamed and ordinary layers mix freely in
// one chain, because the content of a chain ID is the same either way.
//
// # State
//
// The metadata store (bbolt) records which snapshots are streamed, in labels
// that only this package writes. Everything else is derived: after a restart
// Open claims the mounts again for every snapshot that it finds, without
// asking a registry. A streamed image that can't be mounted any more fails the
// containers that need it and nothing else.
//
// This is the only package that links containerd's libraries.
package snapshot
