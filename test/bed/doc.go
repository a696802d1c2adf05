// Package bed is the ground that demonstrations and end-to-end tests stand on:
// the real programs of others (containerd, runc, crane) built once and cached,
// a real Debian image in two shapes, a shaped network link, a node made of a
// private containerd and a private sluice, a whole Kubernetes on a host of its
// own, the servers that a registry stores in (Azurite, MinIO, PostgreSQL), and
// those it is held against (distribution, olareg, nginx).
//
// Everything cached lies below Dir and is keyed by what it is made of, so that
// a new version is a new entry and an interrupted build is never taken for a
// finished one. Everything started listens on loopback and ends with the
// context or function that its docstring names.
package bed
