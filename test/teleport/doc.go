// Package teleport tests the registry's half of Project Teleport with a real file
// server: images are pushed, expanded, and read from Samba.
package teleport
