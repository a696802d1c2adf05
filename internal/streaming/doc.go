// Package streaming is conversion as a service of the registry: a request, or a
// push to a repository that converts what is pushed, puts an image into a queue
// of the index, and a worker of some replica makes its streaming artifact with
// package convert.
//
// Start with Service (service.go), which answers for operations; run.go is the
// worker's side. What an operation is, and what becomes of one, is package
// operation's.
//
// # The queue
//
// Each repository has a queue (stored.ConvertQueue), and a job's key is the
// digest of what it converts. Right before a worker pushes a manifest it makes
// sure of its lease (guard.go): an artifact appears only for a job that its worker
// has, and when all blobs of it are there.
//
// A process that is killed leaves blobs that nothing refers to, for garbage
// collection, and a job whose lease runs out. Whoever gets it next begins anew,
// but for the layers that were finished.
//
// # Layers
//
// A converted layer is written down, in the storage tree under registry/layers
// (layers.go), and isn't converted again whatever image has it: its blobs are
// mounted from wherever they are. That is by diff ID, which an image's config
// claims; so the registry believes it only of a blob that it has seen having that
// content, and reads others through once. When garbage collection has removed the
// blobs, the layer is converted again.
package streaming
