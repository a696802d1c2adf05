package index

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	"sluice/oci"
)

// ManifestQuery asks for manifests of a repository.
type ManifestQuery struct {
	Repo  string
	Last  string // only what comes after the manifest with this digest, in the order asked for
	N     int    // at most so many
	Order Order
}

const (
	manifestColumns = `repo, digest, media_type, artifact_type, config_media_type, os, architecture, size, image_size,
	subject, annotations, blobs, children, pushed, updated, pushed_by, attributes`

	selectManifests = "SELECT " + manifestColumns + `,
	(SELECT {list name} FROM tags WHERE tags.repo = manifests.repo AND tags.digest = manifests.digest) FROM manifests WHERE repo = $1`
)

func scanManifest(scan scan) (m Manifest, err error) {
	var annotations, blobs, children string
	var tags *string // PostgreSQL aggregates nothing to NULL
	var pushed, updated, bits int64
	err = scan(&m.Repo, &m.Digest, &m.MediaType, &m.ArtifactType, &m.ConfigMediaType, &m.OS, &m.Architecture, &m.Size, &m.ImageSize,
		&m.Subject, &annotations, &blobs, &children, &pushed, &updated, &m.By, &bits, &tags)
	if err != nil {
		return m, err
	}
	m.Pushed, m.Updated, m.Attributes = timeOf(pushed), timeOf(updated), attributesOf(bits)
	if tags != nil {
		if m.Tags, err = list[string](*tags); err != nil {
			return m, err
		}
		slices.Sort(m.Tags)
	}
	if annotations != "null" && annotations != "{}" {
		if err := json.Unmarshal([]byte(annotations), &m.Annotations); err != nil {
			return m, err
		}
	}
	if m.Blobs, err = list[oci.Descriptor](blobs); err != nil {
		return m, err
	}
	m.Children, err = list[oci.Digest](children)
	return m, err
}

// list decodes a JSON array. An empty one is nil.
func list[T any](text string) ([]T, error) {
	if text == "null" || text == "[]" {
		return nil, nil
	}
	var l []T
	err := json.Unmarshal([]byte(text), &l)
	return l, err
}

// Manifests returns manifests. Ordered by time, a Last that isn't there any
// more begins the list anew.
func (db *DB) Manifests(ctx context.Context, q ManifestQuery) ([]Manifest, error) {
	after, err := afterLast("manifests", "digest", q.Order)
	if err != nil {
		return nil, err
	}
	list, err := all(ctx, db, selectManifests+after, scanManifest, q.Repo, q.Last, max(q.N, 0))
	if err != nil {
		return nil, fmt.Errorf("index: manifests of %s: %w", q.Repo, err)
	}
	return list, nil
}

// Manifest returns a manifest. Errors: ErrNotFound.
func (db *DB) Manifest(ctx context.Context, repo string, digest oci.Digest) (Manifest, error) {
	m, err := one(ctx, db, selectManifests+" AND digest = $2", scanManifest, repo, digest.String())
	if err != nil {
		return m, fmt.Errorf("index: %s@%s: %w", repo, digest, err)
	}
	return m, nil
}

// Referrers returns at most n manifests of repo whose subject is the given one,
// ordered by digest, after last; with an artifactType only those of that type.
func (db *DB) Referrers(ctx context.Context, repo string, subject oci.Digest, artifactType string, last oci.Digest, n int) ([]Manifest, error) {
	if subject == "" {
		return nil, nil
	}
	list, err := all(ctx, db, selectManifests+` AND subject = $2 AND subject <> '' AND digest > $3
			AND ($4 = '' OR artifact_type = $4) ORDER BY digest LIMIT $5`,
		scanManifest, repo, subject.String(), last.String(), artifactType, max(n, 0))
	if err != nil {
		return nil, fmt.Errorf("index: referrers of %s@%s: %w", repo, subject, err)
	}
	return list, nil
}
