package index

import (
	"context"
	"fmt"
)

// RepositoryQuery asks for repositories.
type RepositoryQuery struct {
	Last string // only names after this one
	N    int    // at most so many
	All  bool   // also those without manifests and blobs
}

const repositoryColumns = `name, created, updated, attributes,
	(SELECT count(*) FROM manifests WHERE repo = repositories.name), (SELECT count(*) FROM tags WHERE repo = repositories.name)`

func scanRepository(scan scan) (r Repository, err error) {
	var created, updated, bits int64
	err = scan(&r.Name, &created, &updated, &bits, &r.Manifests, &r.Tags)
	r.Created, r.Updated, r.Attributes = timeOf(created), timeOf(updated), attributesOf(bits)
	return r, err
}

// Repositories returns repositories that have a manifest or a blob, ordered by
// name.
func (db *DB) Repositories(ctx context.Context, q RepositoryQuery) ([]Repository, error) {
	list, err := all(ctx, db, `SELECT `+repositoryColumns+` FROM repositories WHERE name > $1 AND ($3
			OR EXISTS (SELECT 1 FROM manifests WHERE repo = repositories.name)
			OR EXISTS (SELECT 1 FROM blobs WHERE repo = repositories.name))
		ORDER BY name LIMIT $2`, scanRepository, q.Last, max(q.N, 0), q.All)
	if err != nil {
		return nil, fmt.Errorf("index: repositories: %w", err)
	}
	return list, nil
}

// Repository returns a repository that has a row, even without content.
//
// Errors: ErrNotFound.
func (db *DB) Repository(ctx context.Context, name string) (Repository, error) {
	r, err := one(ctx, db, "SELECT "+repositoryColumns+" FROM repositories WHERE name = $1", scanRepository, name)
	if err != nil {
		return r, fmt.Errorf("index: repository %s: %w", name, err)
	}
	return r, nil
}
