// Package erofs writes, reads and checks EROFS images that hold metadata only:
// inodes, directories, symbolic links and extended attributes. The bytes of
// regular files lie elsewhere, on up to 65,535 extra devices, and the image
// says for each file which ranges of which device it is made of. In Sluice a
// device is the uncompressed tar of a layer, or the expanded content of that
// tar's sparse members.
//
// [Write] makes an image from a tree of [Inode] values. It is deterministic:
// the same tree gives the same bytes on any machine, in whatever order entries
// and attributes are given. [Open] reads an image, [FS.Check] decides whether
// an image from a stranger may be shown to a kernel.
//
// # The image
//
// EROFS is the kernel's read-only file system; the format is defined by
// fs/erofs/erofs_fs.h and described in Documentation/filesystems/erofs.rst of
// the Linux source. All numbers are little endian. What this package writes,
// and the only thing it reads, is this subset, which Linux >= 6.4 mounts:
//
//		     0  1024 zero bytes
//		  1024  superblock, 128 bytes
//		  1152  device table, 128 bytes for each device
//		        shared attributes, from a block border on, if there are any
//		        metadata, from a block border on: inodes and directory blocks
//
//	  - Blocks are 512 bytes, because a tar aligns the content of its members to
//	    512 bytes and to nothing more. Kernels before 6.4 need blocks as large as
//	    a page.
//	  - An inode's number (nid) is its offset from the metadata's start address in
//	    units of 32 bytes. The start address is one block before the first
//	    inode, so the root directory always has nid 16: the superblock has only
//	    16 bits for it, and nid 0 would be an inode number that C libraries
//	    take for a deleted directory entry.
//	  - Inodes are of the 64-byte kind, the one with its own modification time,
//	    nanoseconds and 32-bit owners. The first 64 bytes never cross a block.
//	  - A regular file that is not empty is followed by 8-byte chunk indexes, each
//	    the device and start block of one chunk, or a hole. All chunks of a
//	    file have the same size, a power of two times 512 bytes. A file that is
//	    one extent has one chunk up to 1 TiB.
//	  - Directories are blocks of entries sorted by the bytes of the name, with "."
//	    and "..". The last block is inline behind the inode when both fit
//	    into one block. So are the targets of symbolic links.
//	  - Attributes that several inodes have with the same value are stored once
//	    when that is smaller, the others behind their inode.
//
// The order of the metadata is the order of a walk: a directory's blocks, then
// the inodes of its entries, then the same for each of its subdirectories. So
// reading a cold tree touches each page of the image about once.
//
// Each device also has an address of its own in a unified address space, where
// it would lie if the devices followed the image in one file, each padded to
// a block. Such a file mounts as it is, without device= options.
package erofs
