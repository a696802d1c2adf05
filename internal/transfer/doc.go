// Package transfer copies images into a registry: from another registry, from
// an OCI image layout, or from what `docker save` writes.
//
// Start with Copy (copy.go). It first reads all manifests that are to be copied
// (plan.go, platform.go, referrers.go), then sends the blobs that the target
// lacks (blob.go, upload.go), then the manifests, leaves first, and sets the
// tags last: whoever pulls meanwhile sees the old image or the whole new one.
// What a run has brought over stays when it is interrupted, and the next run
// goes on from there (state.go).
//
// Archive (archive.go) is an oci.Reader of images in files: layout.go reads
// OCI image layouts, docker.go the older form of `docker save`, files.go and
// spool.go the directories and tars they are in.
//
// Sources are hostile: sizes are bounded before anything is allocated, every
// manifest and blob is verified, and nothing outside an archive is opened.
package transfer
