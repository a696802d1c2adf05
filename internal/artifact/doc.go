// Package artifact is the streaming artifact: what a layer and an image look
// like when a node can start from them before it has them. docs/format.md
// describes every byte.
//
// An artifact is an OCI manifest (Manifest, ParseManifest) that refers to
//
//   - each layer's tar as a layer blob: chunks of at most MaxChunkLength
//     bytes, each an independent zstd frame (EncodeLayer writes them,
//     Chunk.Decode reads one back);
//   - the chunk table: where each chunk lies and what its SHA-256 is (Table,
//     Device; OpenTable);
//   - EROFS metadata, without file data, of the merged image and of each
//     layer (MetadataRef);
//   - a boot pack: the chunks that starting the image reads, in one blob
//     (ReadBootPack).
//
// A layer's uncompressed tar is a data device: the metadata's extents point
// straight into it. A layer with sparse members has a second one, with their
// expanded content, directly after it.
//
// A file that is read in verified parts without being an artifact, such as a disk of
// Teleport's, is a Device as well (StoredDevice): to a cache it's all the same.
//
// Everything here is a pure function of its input: the same tar gives the
// same blobs, and the same layers the same manifest, on any machine with any
// number of processors (EncodeLayer, Build, Verify).
//
// The files, by what they are about: cut, compress, readahead, encode make a
// layer's blobs; table, tableroot, tableencode, chunk are the chunk table;
// metadata, manifest, build, verify what their names say; bootpack is the boot
// pack's form, bootplan its explanation (ExplainBoot), and the other boot files
// decide what is in it: boot is commands, bootshell scripts, bootelf and bootlibc
// what loaders and the C library read, the rest one file per runtime.
//
// All decoding takes its input for hostile. No size from it is allocated
// before it has been bounded, and no byte reaches the zstd decoder before its
// SHA-256 has been checked.
package artifact
