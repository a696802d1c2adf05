// Package disks makes images usable on this node whose layers a registry has
// expanded into disks: Project Teleport's node half. It asks the registry where the
// disks are (package mountapi), reads them from a file server's share (package smb)
// through the cache, and mounts each layer through the plane, one EROFS mount for a
// disk. An image is its layers' mounts, stacked by overlayfs.
//
// Manager is all of it; to package snapshot it is what mount.Manager is for streamed
// images. Its steps, for one image:
//
//	Pull     where are the disks?  ->  of each that isn't here, all at once: its
//	         sums, its first block and its footer  ->  what is left of its
//	         metadata  ->  checked, on the disk, mounted
//	Attach   for an owner; one mount serves all owners and images that have the layer
//	Release  the last owner gone, the mount lingers for a while and goes; the last
//	         hold gone, so does the image, and the disks that no other has
//
// # A disk
//
// A file on the share is a VHD: EROFS metadata, the layer's tar, what its sparse
// members expand to, zeros, and a footer (package teleport). Its sums are the
// SHA-256 of its blocks. With them the file is a device of the cache
// (artifact.StoredDevice), which reads what is needed of it, once, and checks every
// block. The metadata, which the kernel parses, is copied from there to a file of
// its own and checked (erofs.FS.Check); the tar and what follows are the metadata's
// devices, as windows of the VHD.
//
// # State
//
// Everything lies beneath Options.Root:
//
//	images/HEX.json     an image by its ID: its layers' disks, and where they came from
//	images/HEX.manifest, HEX.config   likewise, once somebody wanted the config
//	disks/HEX/sums      the sums of a disk
//	disks/HEX/head      its first blocks: those with the metadata
//	m/HEX               where it is mounted; HEX as in disks, but shorter
//
// An image's ID is the digest of what it is: its manifest's digest, and for each layer
// the digests of the blob, of the tar, of the disk and of its sums. So everything is
// checked from the ID down when it's read: the record by the ID, the sums by the
// record, the head by the sums. What isn't what it was is lost: its images are
// unknown from then on (mount.ErrUnknownImage), and whoever has them pulls them again.
// Credentials are in memory only.
//
// Open adopts the mounts that outlived the last process. After that, and after a
// reboot, neither the registry nor the share is needed for what was read before.
// Owners are not stored: whoever has owners says so again after a start and then calls
// Settled, and only from then on is anything removed.
//
// # Trust
//
// That a disk shows what the layer's tar has is the registry's word: it says which
// VHD belongs to which diff ID. Whoever knows the diff IDs from the image's config
// compares them with mount.Image.DiffIDs (package snapshot does, Config does). The file
// server is not trusted: it can refuse, or be slow, but no byte of another file gets
// through.
//
// # Locks and goroutines
//
// A disk's lock is held while its files are fetched, and while it is mounted or
// unmounted; Manager.files while something in images or disks gets or loses its name;
// Manager.mu guards the books, and nothing is waited for under it. They are taken in
// this order. A repository's lock (share.go) is a leaf. All goroutines are background's, which
// Close ends and waits for, or of an errgroup that its caller waits for.
package disks
