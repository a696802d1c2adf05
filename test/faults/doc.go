// Package faults is everything that can go wrong between a node and its
// registry, and with the node's own processes, tried out on real programs.
//
// A Proxy stands between them. It knows the requests of the protocol by their
// paths (Kind) and can do any Fault to any of them: to the first, or to all
// until it is told to stop. The tests know every byte of the image, and what
// they hold after each case is always the same:
//
//   - what a container reads is right, or EIO within the bound that `sluice node
//     --read-timeout` sets;
//   - a pull that would work without streaming works, and `sluice node status`
//     has the reason why it doesn't stream;
//   - when the fault is gone the same read works and the same image streams,
//     without anybody's help;
//   - nothing is left behind: no request, mount, process or temporary file.
//
// # To add a fault
//
// Add an entry to the catalog in catalog.go. Serve gets the request and the
// connection; Answer is what the registry would have said, and Send writes what
// the node gets instead, as wrong as one likes. Mild says that a node must cope
// with it as if nothing were, however often it happens; Final that it is a
// legitimate last word, after which nobody has to try again. The rest is done by
// the table: the fault meets every request that it can happen to, once and for
// ever.
//
// # The rest
//
// TestPullFallsBack does faults to containerd's pulls; TestKilled… kill daemon,
// holder and containerd when the n-th request of a pull, or of a start, arrives;
// TestChaos does all of it at random. Further ones take the registry away for
// good, power, files of the node's state, the FUSE mount, tokens. The wall clock
// can't be set here without harming others, and time namespaces don't have it:
// TestClockJumps builds a sluice whose time.Now is off by as much as it is told,
// and TestCertificateOutOfTime does with certificates what a wrong clock would.
//
// TestPagedTables has a program for which each chunk table is so big that it comes
// in pages.
//
// Not here: HTTP/2 (the proxy speaks 1.1), mirrors (internal/node/hosts), and disks
// that fail while they are written to (internal/node/cache).
//
// # How much
//
// `go test ./faults` does a part of the cross product that finds most of what
// there is to find; with SLUICE_FAULTS=all it does all of it. -run
// 'TestFaults/flip-bit/layer' does a part.
package faults
