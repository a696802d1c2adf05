// Package peers holds figures: the whole registry process beside distribution,
// olareg and, for plain bytes, nginx, on one machine in one run, in turns; and
// what it keeps of its promises under load and kill -9.
//
// Tests fail for wrong bytes and for lost objects, never for slowness: figures
// are printed as lines that begin with FIGURE.
package peers
