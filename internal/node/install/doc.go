// Package install puts `sluice node` on a machine with containerd, and takes it
// away again: the program, a systemd unit, a drop-in for containerd, and where
// it's asked for hosts.toml files and a drop-in for kubelet.
//
// A Plan is made first, from what the machine has. It tells every change with
// its diff and changes nothing. Apply carries it out, whole or not at all: a
// change that fails takes back those before it. A plan for a machine that has
// all of it is empty, so a plan can be made and applied again and again.
//
// What containerd makes of its configuration is not for us to guess. Its
// versions differ in how they merge imported files and migrate old ones, so the
// machine's own containerd is asked, with `containerd config dump`: once for
// what it has without us, once, before anything is changed, for what it would
// have. Only what is ours may differ between the two (see containerd.go).
//
// What was there before is kept below RecordDir, with a record of what was
// installed. Removal gives back byte for byte what nobody has edited since, and
// takes only its own part out of what somebody has.
//
// Paths are those of the machine; Options.Root is where its file system is seen.
// Package host runs programs on it.
package install
