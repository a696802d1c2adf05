// Package converters holds our conversion against those of others, of the same
// layer in the same run, each through its library: eStargz, the format of
// containerd's stargz snapshotter, which like ours is another form of the layer,
// and SOCI, which keeps the layer and makes an index of it (that needs cgo and
// Debian's zlib1g-dev). It is a module of its own so that their dependencies are
// none of Sluice's:
//
//	cd test/converters && go test -v .
package converters
