package layer

import (
	"encoding/binary"
	"errors"
	"math"
)

const (
	aclAccess  = "system.posix_acl_access"
	aclDefault = "system.posix_acl_default"
)

// The form of an ACL in an xattr (linux/posix_acl_xattr.h): a version, then
// entries of tag, permissions and id, little-endian.
const (
	aclVersion   = 2
	aclHeaderLen = 4
	aclEntryLen  = 8

	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20
)

var errACL = errors.New("POSIX ACL is not valid")

// isForeignACL reports whether value is in a form that the kernel doesn't
// support; containerd then goes on as if it weren't there.
func isForeignACL(name, value string) bool {
	return (name == aclAccess || name == aclDefault) && len(value) >= aclHeaderLen &&
		binary.LittleEndian.Uint32([]byte(value[:aclHeaderLen])) != aclVersion
}

// storedACL returns what the kernel stores when value is set as an ACL and
// the file then gets mode, as extraction does; "" for nothing. Setting an
// invalid one fails there too (posix_acl_valid in fs/posix_acl.c).
func storedACL(name, value string, mode uint32) (string, error) {
	if len(value) < aclHeaderLen {
		if value == "" {
			return "", nil
		}
		return "", errACL
	}
	acl := []byte(value)
	entries := acl[aclHeaderLen:]
	if len(entries)%aclEntryLen != 0 {
		return "", errACL
	}
	if len(entries) == 0 {
		return "", nil
	}
	tags, err := checkACL(entries)
	if err != nil {
		return "", err
	}
	if name == aclDefault {
		return string(acl), nil
	}
	if tags&^(aclUserObj|aclGroupObj|aclOther) == 0 {
		return "", nil // says no more than the mode does
	}
	// chmod(2) changes these entries (posix_acl_chmod).
	for e := entries; len(e) > 0; e = e[aclEntryLen:] {
		perm := -1
		switch binary.LittleEndian.Uint16(e) {
		case aclUserObj:
			perm = int(mode >> 6 & 7)
		case aclMask:
			perm = int(mode >> 3 & 7)
		case aclOther:
			perm = int(mode & 7)
		}
		if perm >= 0 {
			binary.LittleEndian.PutUint16(e[2:], uint16(perm))
		}
	}
	return string(acl), nil
}

// checkACL checks the entries' order and completeness, gives those that are
// not about an id the id that the kernel reports, and returns the set of tags.
// An ACL that names users or groups has a mask.
func checkACL(entries []byte) (tags uint16, err error) {
	for e := entries; len(e) > 0; e = e[aclEntryLen:] {
		tag, perm, id := binary.LittleEndian.Uint16(e), binary.LittleEndian.Uint16(e[2:]), e[4:aclEntryLen]
		switch tag {
		case aclUser, aclGroup:
			if tags >= tag<<1 || binary.LittleEndian.Uint32(id) == math.MaxUint32 {
				return 0, errACL
			}
		case aclUserObj, aclGroupObj, aclMask, aclOther:
			if tags >= tag {
				return 0, errACL // a second one, or out of order
			}
			binary.LittleEndian.PutUint32(id, math.MaxUint32)
		default:
			return 0, errACL
		}
		if perm > 7 {
			return 0, errACL
		}
		tags |= tag
	}
	const always = aclUserObj | aclGroupObj | aclOther
	if tags&always != always || tags&(aclUser|aclGroup) != 0 && tags&aclMask == 0 {
		return 0, errACL
	}
	return tags, nil
}
