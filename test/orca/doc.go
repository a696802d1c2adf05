// Package orca tests orca with a real registry, file server, teleportd and runc:
// what it prints, its exit codes, and what happens when one of them isn't there.
package orca
