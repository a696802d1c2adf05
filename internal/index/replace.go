package index

import (
	"context"
	"fmt"
	"iter"
	"time"
)

// RepositoryContent is all that the storage tree says of a repository.
type RepositoryContent struct {
	Repository
	Manifests []Manifest
	Tags      []Tag
	Blobs     []Blob
	Deleted   []Deleted
}

// ReplaceRepository makes the rows of a repository what content says, in one
// transaction. Touched of a blob that the index knows stays, that of others is
// now: who pushed it may be about to push the manifest. Exclude whoever changes
// the repository from before its tree is read.
func (db *DB) ReplaceRepository(ctx context.Context, repo string, content RepositoryContent) error {
	var tx Tx
	tx.changes(repo, 2)
	tx.add("UPDATE blobs SET touched = -touched WHERE repo = $1", repo) // to be told from those put now
	for _, statement := range []string{
		"DELETE FROM manifests WHERE repo = $1", "DELETE FROM tags WHERE repo = $1",
		"DELETE FROM needs WHERE repo = $1", "DELETE FROM deleted WHERE repo = $1",
	} {
		tx.add(statement, repo)
	}
	content.Name = repo
	tx.PutRepository(content.Repository)
	started := now()
	for _, b := range content.Blobs {
		tx.add(`INSERT INTO blobs (`+blobColumns+`) VALUES ($1, $2, $3, $4)
			ON CONFLICT (repo, digest) DO UPDATE SET size = excluded.size, touched = abs(blobs.touched)`,
			repo, b.Digest.String(), b.Size, started)
	}
	tx.add("DELETE FROM blobs WHERE repo = $1 AND touched < 0", repo)
	for _, m := range content.Manifests {
		m.Repo = repo
		tx.PutManifest(m)
	}
	for _, t := range content.Tags {
		t.Repo = repo
		tx.PutTag(t)
	}
	for _, d := range content.Deleted {
		d.Repo = repo
		tx.PutDeleted(d)
	}
	return db.send(ctx, &tx, "replace "+repo)
}

// dumpPage is how many rows Dump asks for at a time.
const dumpPage = 500

// Dump yields all that can be made anew from the storage tree, ordered: two
// indexes of the same tree have the same Dump. What the tree doesn't say is
// zero: Touched of blobs and Updated of repositories, which deletions move as
// well. An error is the last element.
func (db *DB) Dump(ctx context.Context) iter.Seq2[RepositoryContent, error] {
	return func(yield func(RepositoryContent, error) bool) {
		last := ""
		for {
			page, err := db.Repositories(ctx, RepositoryQuery{Last: last, N: dumpPage, All: true})
			if err != nil {
				yield(RepositoryContent{}, err)
				return
			}
			for _, r := range page {
				content, err := db.dump(ctx, r)
				if !yield(content, err) || err != nil {
					return
				}
				last = r.Name
			}
			if len(page) < dumpPage {
				return
			}
		}
	}
}

func (db *DB) dump(ctx context.Context, r Repository) (c RepositoryContent, err error) {
	r.Updated = time.Time{}
	c.Repository = r
	// Paged, so that no page takes much memory, though the whole may.
	c.Manifests, err = pages(func(last Manifest) ([]Manifest, error) {
		return db.Manifests(ctx, ManifestQuery{Repo: r.Name, Last: last.Digest.String(), N: dumpPage})
	})
	if err != nil {
		return c, err
	}
	c.Tags, err = pages(func(last Tag) ([]Tag, error) {
		return db.Tags(ctx, TagQuery{Repo: r.Name, Last: last.Name, N: dumpPage})
	})
	if err != nil {
		return c, err
	}
	c.Blobs, err = pages(func(last Blob) ([]Blob, error) {
		page, err := all(ctx, db, "SELECT "+blobColumns+" FROM blobs WHERE repo = $1 AND digest > $2 ORDER BY digest LIMIT $3",
			scanBlob, r.Name, last.Digest.String(), dumpPage)
		for i := range page {
			page[i].Touched = time.Time{}
		}
		return page, err
	})
	if err != nil {
		return c, fmt.Errorf("index: blobs of %s: %w", r.Name, err)
	}
	c.Deleted, err = pages(func(last Deleted) ([]Deleted, error) {
		return db.DeletedManifests(ctx, r.Name, time.Time{}, last.Digest.String(), dumpPage)
	})
	return c, err
}

// pages collects all pages that next returns after the last entry seen.
func pages[T any](next func(last T) ([]T, error)) ([]T, error) {
	var all []T
	var last T
	for {
		page, err := next(last)
		if err != nil {
			return nil, err
		}
		all = append(all, page...)
		if len(page) < dumpPage {
			return all, nil
		}
		last = page[len(page)-1]
	}
}
