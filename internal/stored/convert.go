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

// autoConvert returns what enqueues the conversion of a manifest that is being
// pushed or restored, if its repository is to be converted. The caller shares
// the repository, and so its attributes are what they are until the change ends.
func (r *Registry) autoConvert(ctx context.Context, m index.Manifest) (func(*index.Tx) error, error) {
	nothing := func(*index.Tx) error { return nil }
	if !r.opts.Convert || !Convertible(m) {
		return nothing, nil
	}
	row, err := r.db.Repository(ctx, m.Repo)
	if err != nil || !row.StreamingEnabled {
		return nothing, err
	}
	c := Conversion{Actor: oci.ActorOf(ctx)}
	return func(tx *index.Tx) error { return EnqueueConversion(tx, m.Repo, m.Digest, c) }, nil
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
