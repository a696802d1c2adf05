// Package smb reads files of an SMB share: the disks of Teleport, which a registry
// has expanded and a file server shares.
//
// Share is the interface. Client implements it over a Transport, which is how one
// connection is made and what can be asked over it: NewClient speaks SMB itself
// (userspace.go, guard.go), NewKernel mounts the share with the kernel's CIFS
// (kernel.go), smbmem.Server is a server in memory for tests. What all of them need is
// Client's and written once: one connection for all readers, made when it is first
// needed and again when it broke, with credentials that are asked for before they
// expire and when they were refused (connect.go); files kept open for the next reader
// (session.go); ranges read ahead in parts, so that a large one isn't a sequence of
// round trips (range.go).
//
// Nothing here verifies content, only length: whoever reads a disk checks its blocks
// against its sums. The suite that every share passes is smb/smbtest.
package smb
