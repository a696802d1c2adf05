// Package starts holds figures: containers started from images that the node
// has never seen, by Sluice and by stargz-snapshotter in turns, from one
// registry over one shaped link. stargz gets its best case, images optimized
// for the very command that is measured; nobody ran it for Sluice.
//
// Tests fail for wrong output, never for slowness: figures are printed as lines
// that begin with FIGURE.
package starts
