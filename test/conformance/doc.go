// Package conformance runs the official conformance suite of the OCI
// distribution specification against the `sluice registry` program: on local
// disk, on every real backend, and on two replicas that are killed in turns. It
// is a module of its own so that the suite's dependencies are none of Sluice's:
//
//	cd test/conformance && go test -v .
package conformance
