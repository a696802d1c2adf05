// Package index is the database beside the registry's storage tree: what can be
// asked of the tree in tables, and the locks and queues that the processes of
// one registry share. The tree is the truth. Everything but the queue can be
// made anew from it (ReplaceRepository), so losing the database loses no image.
//
// A DB is SQLite in a file (one process, the default), or PostgreSQL (any
// number of replicas), behind the same schema and the same methods; the suite
// that both pass is in indextest.
//
// # Which table answers which question
//
//	repositories   what is there; attributes of a repository      Repositories, Repository
//	manifests      manifests, by digest or by time; referrers     Manifests, Manifest, Referrers
//	tags           tags, by name or by time, or of one digest     Tags, Tag
//	blobs          which repository has a blob; space taken       FindBlob, Usage, TotalUsage
//	needs          which manifest (also a deleted one) needs a    Needed, NeededBy, Garbage
//	               blob or a manifest of its repository
//	deleted        soft-deleted manifests                         DeletedManifests
//	intents        which repositories were being changed when     Stale
//	               a process ended
//	jobs           the durable queue                              Lease, Job, LatestJob, Jobs
//	version        which migrations have run                      Open
//
// # Changing tree and index
//
// Tree and index can't change in one step. Whoever changes the tree of a
// repository first leaves a durable note (Intend), then writes the tree, then
// commits the rows and takes the note back in one transaction (Intent.Commit).
// A crash in between leaves the note: Stale finds it, and the repository is
// read again from the tree. A Tx only collects what is to be written, so that
// the transaction itself never waits for its caller; see Update.
//
// # Durability and isolation
//
// What a method acknowledges by returning nil survives loss of power, and every
// query that begins afterwards sees it. A transaction is seen whole or not at
// all. Readers never wait for writers. On SQLite, concurrent small transactions
// share one fsync.
//
// # Times
//
// Times are kept in microseconds and returned in UTC. A caller that compares
// what it wrote with what it reads truncates to microseconds first. The clock
// is the process's; those of replicas must agree to within a few seconds.
package index
