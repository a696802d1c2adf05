// Package teleport tests Project Teleport with real parts. The registry's half:
// images are pushed, expanded, and read from a Samba server. The node's: package smb
// on that server, and containerd with teleportd.
package teleport
