package stored

import (
	"context"
	"encoding/json"

	"sluice/internal/index"
	"sluice/oci"
)

// ExpandQueues begins the names of the queues of expansions for Teleport, of which
// each repository has one: ExpandQueue. A job's key is the digest of the image or
// index to expand, or empty: then what no image needs any more is to be removed.
// Its payload is an Expansion.
const ExpandQueues = "expand/"

// ExpandQueue returns the name of a repository's queue of expansions.
func ExpandQueue(repo string) string { return ExpandQueues + repo }

// Expansion says for whom something is expanded.
type Expansion struct {
	Actor oci.Actor `json:"actor"` // who asked, pushed, or deleted
}

// EnqueueExpansion puts a manifest into its repository's queue of expansions,
// unless it is waiting there or being expanded. Without a digest, it has removed
// what no image needs, also if that is under way: it may have passed by what isn't
// needed any more.
func EnqueueExpansion(tx *index.Tx, repo string, digest oci.Digest, e Expansion) error {
	payload, err := json.Marshal(e)
	if err != nil {
		return err
	}
	if digest == "" {
		tx.EnqueueAnew(ExpandQueue(repo), "", payload)
	} else {
		tx.EnqueueOnce(ExpandQueue(repo), digest.String(), payload)
	}
	return nil
}

// shrink returns what enqueues the removal of what expansions left behind, when
// something is deleted in a repository that the caller has alone.
func (r *Registry) shrink(ctx context.Context, repo string) (func(*index.Tx) error, error) {
	nothing := func(*index.Tx) error { return nil }
	if !r.opts.Expand {
		return nothing, nil
	}
	row, err := r.db.Repository(ctx, repo)
	if err != nil || !row.TeleportEnabled {
		return nothing, err
	}
	e := Expansion{Actor: oci.ActorOf(ctx)}
	return func(tx *index.Tx) error { return EnqueueExpansion(tx, repo, "", e) }, nil
}
