// Package teleport is the registry's half of Project Teleport: it expands the
// layers of images into disks that clients mount from an SMB share, so that they
// pull nothing.
//
// Start with Service (service.go): which repositories take part, what has become
// of an image (Find), and the worker, whose jobs are package operation's. expand.go
// makes the disks of one image, disk.go one disk, share.go is the directory that
// they are in, and sweep.go removes what nothing needs. mountapi, below, is the API
// that clients ask, mountserver serves it, and samba is what a file server needs to be
// told.
//
// # Disks
//
// A layer's disk is a fixed VHD (package vhd) with an EROFS file system that is
// made like that of streaming artifacts (artifact.DiskMetadata): its metadata, and
// then the layer's tar as it is. It mounts as it is, read-only, and disks are
// stacked by overlayfs. What is in a disk depends on the layer alone, with one
// exception: a layer that has files in directories that it doesn't describe, whose
// attributes are then those of the layers below. Such a layer has a disk for each
// different stack of layers below it.
//
// # The share
//
//	_layers/NAME.vhd                        every disk, once
//	_layers/NAME.json                       its record: sizes and digests
//	_layers/NAME.sums                       the SHA-256 of each 256 KiB of it
//	repositories/REPO/_layers/NAME.…        hard links to them, for each repository
//
// NAME is the layer's digest with "-" for ":", which SMB doesn't allow in names,
// and where the layers below matter a dot and what stands for them. Clients may be
// shown their repository's directory only, so what they can read is what they may
// pull. A disk is linked last of its three files: one that is there is complete.
// On file systems without hard links disks are copied instead.
//
// # Locks
//
// A layer is expanded, linked and removed by one worker at a time, which has its
// lock. An image's disks are expanded after the image has been pushed, and removed
// when it can be seen that no image needs them; so whichever of the two comes
// second does right.
package teleport
