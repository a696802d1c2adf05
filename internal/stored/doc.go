// Package stored is the registry itself: an oci.Registry whose truth is a tree
// of objects in a storage.Store, and whose questions are answered by an
// index.DB. Package registry speaks HTTP for it.
//
//	repositories/REPO/_manifests/DIGEST           manifests, byte for byte
//	repositories/REPO/_layers/DIGEST              blobs
//	repositories/REPO/_referrers/SUBJECT/DIGEST   descriptor of a manifest with that subject
//	repositories/REPO/_tags/TAG                   where a tag points, and its attributes
//	repositories/REPO/_attributes/DIGEST          what a manifest doesn't say of itself
//	repositories/REPO/_attributes/repository      attributes of the repository
//	repositories/REPO/_deleted/DIGEST             a soft-deleted manifest, whole
//
// Components of a repository name never begin with "_", so these can't collide
// with repositories inside REPO. What is in the objects is in tree.go.
//
// # Changes
//
// The tree is written between Intend and Commit of the index (Registry.change),
// in an order that lets no crash contradict a manifest's existence: what
// describes a manifest comes before it, what points at it after it; on deletion
// the other way round. Readers of manifests ask the index first, so a manifest
// is seen from its commit on. Of what a crash leaves in the tree the intent
// remembers the repository, and the next one to have it alone indexes it anew
// (Registry.exclude, Reconcile). A client that goes away doesn't stop a change
// that has begun.
//
// A blob has no intent. Its row is put before its object, so that no object is
// without a row; a row without object is cleared away by Collect.
//
// # Locks
//
// Each repository has a lock of the index (repositoryLock), which holds across
// replicas. Who adds to a repository, or relies on a blob being there, shares
// it: pushes of manifests from the check of what they refer to until the commit,
// blobs while their row and object are put, and HEADs of blobs. Deletions,
// attributes, indexing and garbage collection have it alone. Nobody waits for a
// client while holding it, nor for a second repository's lock.
//
// Two replicas that push one tag at the same moment may commit in another order
// than they wrote the tree; each looks at the tree once more afterwards, and the
// last one sets the index right (Registry.settlePush). If that one is killed
// right before, the tag is where its push put it until the repository is next
// indexed.
//
// # Garbage collection
//
// A client asks for a blob (HEAD), or pushes or mounts it, and later pushes the
// manifest that needs it. Each of those sets the time of the blob's row, under
// the shared lock; Collect, having the lock alone, deletes blobs that nothing
// needs and whose time is older than its grace. So a client whose gap between
// the two is shorter than the grace never loses a blob.
//
// Files are named after the verbs of oci.Registry, and after what is asked of
// this registry besides: attributes.go, deleted.go, collect.go, reindex.go. What
// is pushed and to be converted goes into a queue for package streaming, what is
// to be expanded into one for package teleport: convert.go, expand.go.
package stored
