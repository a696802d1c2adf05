package erofs

// Image is a tree of inodes and the devices that its files lie on.
type Image struct {
	Root    *Inode   // a directory
	Devices []Device // at most 65,535
}

// Device is what the contents of regular files lie on. The image records its
// size and its tag; the kernel gets the device itself by a device= option of the
// mount, in the order of Image.Devices.
type Device struct {
	Size int64  // bytes, less than 2 TiB
	Tag  string // at most 64 bytes without zero bytes, for people and tools; the kernel ignores it
}

// Inode is one file of any kind. An inode that several entries refer to has
// several names (hard links); its link count is computed. A directory may
// be referred to once only.
type Inode struct {
	Mode      uint32 // type and permission bits as in stat(2)
	UID, GID  uint32
	Mtime     int64  // seconds since 1970, may be negative
	MtimeNsec uint32 // 0 to 999,999,999

	Size         int64    // of a regular file; ignored for the others
	Extents      []Extent // of a regular file; what they leave out reads as zeros
	Major, Minor uint32   // of a device node: 12 and 20 bits; 0:0 is an overlayfs whiteout
	Target       string   // of a symbolic link: 1 to 4,095 bytes
	Entries      []Entry  // of a directory, without "." and "..", in any order

	// Xattrs are the extended attributes, in any order. Names begin with
	// "user.", "trusted." or "security.", or are "system.posix_acl_access" or
	// "system.posix_acl_default": EROFS has no place for others.
	Xattrs []Xattr
}

// Entry is one name in a directory: 1 to 255 bytes, any but '/' and zero.
type Entry struct {
	Name  string
	Inode *Inode
}

// Xattr is an extended attribute. The name behind its prefix has 1 to 255 bytes,
// the value at most 65,535, and all of one inode together about 256 KiB.
type Xattr struct {
	Name  string
	Value string
}

// Extent is a range of a regular file that lies in one piece on a device.
// Offset and FileOffset are multiples of BlockSize, and so is Length unless the
// extent ends with the file. The last block of an extent must be wholly on the
// device, because for Linux (6.18 at least) a read of a block that the device
// has only a part of is an I/O error.
type Extent struct {
	Device     int   // index in Image.Devices
	Offset     int64 // on the device
	Length     int64 // bytes
	FileOffset int64
}

func (i *Inode) isDir() bool { return i.Mode&modeType == modeDir }
