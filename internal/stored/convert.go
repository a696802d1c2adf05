package stored

import (
	"context"
	"encoding/json"

	"sluice/internal/index"
	"sluice/oci"
)

// ConvertQueues begins the names of the queues of conversions, of which each
// repository has one: ConvertQueue. A job's key is the digest of the image or
// index to convert; its payload is a Conversion.
const ConvertQueues = "convert/"

// ConvertQueue returns the name of a repository's queue of conversions.
func ConvertQueue(repo string) string { return ConvertQueues + repo }

// Conversion says for whom something is converted.
type Conversion struct {
	Actor oci.Actor `json:"actor"` // who asked, or pushed
}

// Convertible reports whether a manifest may be an image that can be streamed: a
// linux image or an index, and nothing that refers to something else.
func Convertible(m index.Manifest) bool {
	if m.Subject != "" {
		return false
	}
	if oci.IsIndex(m.MediaType) {
		return m.ArtifactType == ""
	}
	image := m.ConfigMediaType == oci.MediaTypeImageConfig || m.ConfigMediaType == oci.MediaTypeDockerConfig
	return image && m.OS == "linux" && m.ArtifactType == m.ConfigMediaType // as without one
}

// EnqueueConversion puts a manifest into its repository's queue of conversions,
// unless it is waiting there or being converted.
func EnqueueConversion(tx *index.Tx, repo string, digest oci.Digest, c Conversion) error {
	payload, err := json.Marshal(c)
	if err != nil {
		return err
	}
	tx.EnqueueOnce(ConvertQueue(repo), digest.String(), payload)
	return nil
}

// followUps returns what enqueues the jobs that follow a manifest's being pushed or
// restored: its conversion and its expansion, as its repository has it. The caller
// shares the repository, and so its attributes are what they are until the change
// ends.
func (r *Registry) followUps(ctx context.Context, m index.Manifest) (func(*index.Tx) error, error) {
	nothing := func(*index.Tx) error { return nil }
	if !r.opts.Convert && !r.opts.Expand || !Convertible(m) {
		return nothing, nil
	}
	row, err := r.db.Repository(ctx, m.Repo)
	if err != nil {
		return nothing, err
	}
	actor := oci.ActorOf(ctx)
	return func(tx *index.Tx) error {
		if r.opts.Convert && row.StreamingEnabled {
			if err := EnqueueConversion(tx, m.Repo, m.Digest, Conversion{Actor: actor}); err != nil {
				return err
			}
		}
		if r.opts.Expand && (row.TeleportEnabled || r.opts.ExpandAll) {
			return EnqueueExpansion(tx, m.Repo, m.Digest, Expansion{Actor: actor})
		}
		return nil
	}, nil
}

// checkSubject returns an error if a streaming artifact that the registry makes
// by itself has lost its image: whoever deletes an image deletes its artifacts,
// and has the repository alone.
func (r *Registry) checkSubject(ctx context.Context, p *manifestPush) error {
	if !p.generated || p.manifest.Subject == "" {
		return nil
	}
	_, err := r.Manifest(ctx, p.repo, p.manifest.Subject)
	return err
}
