// Package layer turns the layers of an image, which are tar files, into trees
// of nodes that know where in the tar each file's content lies.
//
// Start with Read: one uncompressed tar in, one Tree out. Decompress comes
// before it for layers that travel compressed, and Merge after it to stack the
// trees of all layers as overlayfs would. No file content is ever kept or
// copied: a Node of a regular file carries Extents, which point into the tar
// (always at a multiple of 512, because tar is made of 512-byte blocks), so
// whoever has the tar has the files.
//
// # What a layer means
//
// The reference is what containerd's overlayfs snapshotter shows after it has
// extracted the layer (pkg/archive and core/diff/apply of containerd 2.4), and
// the image specification where containerd has no answer. The tests extract
// random stacks of layers with containerd, mount them with overlayfs, and
// compare every name, attribute and byte. In short:
//
//   - Names are cleaned and relative to the root. Symbolic links in the parent
//     part of a name are followed inside the root, but only those which this
//     same layer made; a link of a lower layer is replaced by a directory.
//   - An entry for a name that exists replaces it, except that a directory on a
//     directory only changes its attributes and adds its xattrs.
//   - The attributes of the root directory are not the tar's to choose: it is
//     0755, owned by 0:0, without xattrs. Only its modification time is kept.
//   - A hard link entry also sets the attributes of the inode it links to.
//   - Times before 1970 or after 2262 become 1970.
//   - xattrs come from SCHILY.xattr PAX records. Those in the namespaces user,
//     security and the two POSIX ACLs are kept, others dropped (trusted ones
//     above all: a layer must not speak to overlayfs directly), as is what
//     the kernel refuses for a type of file (user xattrs on a symbolic link).
//     An ACL says of the owner, the mask and others what the mode says.
//     LIBARCHIVE.xattr records are ignored.
//   - Whiteouts (.wh.NAME, .wh..wh..opq) speak of lower layers only, wherever
//     they stand in the tar.
//
// # Where it differs from containerd
//
// On purpose, and only in what no sound image has:
//
//   - Names and link targets that climb out of the root with ".." are refused;
//     containerd clamps them to the root.
//   - Owners outside 0..4294967294 and device numbers that Linux cannot
//     represent are refused; containerd lets the kernel truncate them.
//   - A whiteout and an entry of the same name in one layer may come in either
//     order; if the entry is a directory it hides the lower one. containerd
//     fails in one order and forgets the whiteout in the other.
//   - In the lowest layer, too, whiteouts say nothing of the layer itself;
//     containerd deletes there what came before in the tar.
//   - Names beginning with ".wh..wh." other than the opaque marker belong to
//     aufs and are skipped.
//   - Hard links to files of lower layers, contiguous files (type 7) and old GNU
//     sparse files (type S) are understood; containerd refuses them.
//   - A directory listed after one of its children has exactly the xattrs of
//     its own entry; containerd adds those of the lower layer's directory, and
//     gives what came between the group of that one if it is setgid.
//   - The modification time of a directory that no tar entry describes is
//     that of the lower layer's directory, else that of the first entry
//     below it; containerd leaves the time of extraction.
//   - Default POSIX ACLs are kept as they are but not inherited by what is
//     created below them, as extraction does by accident.
package layer
