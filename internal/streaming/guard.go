package streaming

import (
	"context"
	"errors"
	"fmt"

	"sluice/oci"
)

// errLost is the error for a blob that was stored, and isn't there any more.
var errLost = errors.New("it was removed before the artifact was complete")

// guard is the registry as one conversion sees it.
type guard struct {
	oci.Registry
	hold func(context.Context) error // extends the lease
}

// PushManifest pushes an artifact if the conversion is still this worker's, and
// everything that the artifact needs is there: a registry that allows sparse
// manifests wouldn't object. Having been asked for, the blobs are safe from
// garbage collection until then.
func (g guard) PushManifest(ctx context.Context, repo, reference, mediaType string, content []byte) (oci.Descriptor, error) {
	info, err := oci.ParseManifestInfo(content, mediaType)
	if err != nil {
		return oci.Descriptor{}, err
	}
	for _, b := range info.Blobs {
		if _, err := g.ResolveBlob(ctx, repo, b.Digest); err != nil {
			if errors.Is(err, oci.ErrBlobUnknown) { // another attempt makes it again
				err = errLost
			}
			return oci.Descriptor{}, fmt.Errorf("blob %s of the artifact: %w", b.Digest, err)
		}
	}
	if err := g.hold(ctx); err != nil {
		return oci.Descriptor{}, err
	}
	return g.Registry.PushManifest(ctx, repo, reference, mediaType, content)
}
