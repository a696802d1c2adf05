// Package mount makes images usable on this node: it finds an image's
// streaming artifact in a registry, brings home the little that a mount needs,
// mounts the image through the plane with the cache behind it, and fills in
// the rest while containers already run.
//
// Manager is all of it. Its steps, for one image:
//
//	Pull     referrers -> artifact's manifest -> metadata and chunk table, in
//	         parallel -> checked, on disk, mounted. Three round trips.
//	Attach   for an owner (a container's snapshot, a directory that somebody
//	         asked for); one mount serves all owners of an image
//	         Meanwhile: boot pack, then the rest of the table and the layers'
//	         own metadata, then all content, until the registry isn't needed.
//	Release  the last owner gone, the mount lingers for a while and goes; the
//	         last hold gone, so does the image's state, with Collect at once.
//
// # State
//
// Everything lives beneath Options.Root:
//
//	images/HEX/          an image by its artifact's digest, complete or absent
//	    image.json       where it came from
//	    manifest.json    the artifact's manifest
//	    table, root      the chunk table, or only its root until the rest came
//	    merged.erofs     metadata of the whole image
//	    N.erofs          metadata of layer N alone
//	m/HEX.merged, m/HEX.N   where they are mounted; HEX as short as it can be
//	claims/ID.json       mounts that people asked for
//
// Open adopts the mounts that outlived the last process. Neither that nor
// attaching an image that was pulled before needs the registry, unless content
// is still missing and somebody reads it. A broken image is reported and
// concerns nobody else.
//
// Owners are not stored: whoever has owners (the snapshotter from its metadata
// store, this package for claims) says so again after a start and then calls
// Settled, and only from then on is anything collected.
//
// # Trust
//
// Everything that comes from a registry is verified before it is used:
// metadata and chunk table against the artifact's manifest, the manifest
// against the digest by which the registry's referrers list names it, its
// subject against the image that was asked for. Who can write referrers into a
// repository can therefore decide what its images show, until a layer is
// complete and its diff ID is checked; a caller who knows the diff IDs from
// the image's config compares them with Image.DiffIDs.
package mount
