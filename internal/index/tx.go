package index

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"sluice/oci"
)

// Tx collects what a transaction is to write. Nothing is sent to the database
// before the function that has it returns, and a Tx can't read: decide first,
// under a lock of the repository, and write then. What can't be written, such
// as text that isn't UTF-8, fails the transaction as a whole.
//
// Every Put replaces the row if there is one, and makes the row of the
// repository, with DefaultAttributes, if there is none. What is put or deleted
// of manifests and tags moves Repository.Updated forward.
type Tx struct {
	statements []statement
	err        error    // the first thing that couldn't be written
	repos      []string // what is changed
	rows       int      // how many rows of them, or more; see changes
}

// changes tells that rows of a repository follow. Transactions that change more
// than one row of a repository come one after the other, so that the order in
// which they change rows can't be a deadlock.
func (tx *Tx) changes(repo string, rows int) {
	tx.repos = append(tx.repos, repo)
	tx.rows += rows
}

func (tx *Tx) add(sql string, args ...any) {
	tx.statements = append(tx.statements, statement{sql, args})
}

// json returns v, nothing of which is a cycle or a channel, as JSON.
func (tx *Tx) json(v any) string {
	b, err := json.Marshal(v)
	if err != nil && tx.err == nil {
		tx.err = err
	}
	return string(b)
}

// Update runs what f collects as one transaction, unless f returns an error,
// which it then returns. f runs once.
func (db *DB) Update(ctx context.Context, f func(*Tx) error) error {
	var tx Tx
	if err := f(&tx); err != nil {
		return err
	}
	return db.send(ctx, &tx, "update")
}

func (db *DB) send(ctx context.Context, tx *Tx, what string) error {
	if tx.err == nil {
		tx.err = db.engine.write(ctx, tx.locks(), tx.statements)
	}
	if tx.err != nil {
		return fmt.Errorf("index: %s: %w", what, tx.err)
	}
	return nil
}

// locks returns the keys of what is to be locked first, in the order that
// everybody has.
func (tx *Tx) locks() []int64 {
	if tx.rows < 2 {
		return nil
	}
	var keys []int64
	for _, repo := range tx.repos {
		keys = append(keys, lockKey("rows of "+repo))
	}
	slices.Sort(keys)
	return slices.Compact(keys)
}

// Intent is the durable note that the tree of a repository is about to change.
// It ends with Commit or Drop; if neither succeeds, Stale will find it.
type Intent struct {
	db   *DB
	id   string
	repo string
}

// Intend notes durably that the tree of repo is about to change.
func (db *DB) Intend(ctx context.Context, repo string) (*Intent, error) {
	i := &Intent{db: db, id: rand.Text(), repo: repo}
	var tx Tx
	tx.add("INSERT INTO intents (id, repo, created) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING", i.id, repo, now())
	return i, db.send(ctx, &tx, "intent to change "+repo)
}

// Commit is Update, and takes the note back in the same transaction: call it
// when the tree has been written. If it fails, the note stays.
func (i *Intent) Commit(ctx context.Context, f func(*Tx) error) error {
	return i.db.Update(ctx, func(tx *Tx) error {
		if err := f(tx); err != nil {
			return err
		}
		tx.add("DELETE FROM intents WHERE id = $1", i.id)
		return nil
	})
}

// Drop takes the note back: nothing was changed in the tree.
func (i *Intent) Drop(ctx context.Context) error {
	return i.Commit(ctx, func(*Tx) error { return nil })
}

// Stale returns, ordered, the repositories that have an intent which is older
// than age, so that whoever left it has died or failed. With a database that is
// this process's alone, none but what a dead process left is there before the
// first Intend, and Stale(ctx, 0) finds it; with replicas age must exceed what
// the slowest change of a tree takes.
//
// Index such a repository anew and then ClearStale, while excluding who changes
// it.
func (db *DB) Stale(ctx context.Context, age time.Duration) ([]string, error) {
	return all(ctx, db, "SELECT DISTINCT repo FROM intents WHERE created <= $1 ORDER BY repo", func(scan scan) (repo string, err error) {
		return repo, scan(&repo)
	}, now()-age.Microseconds())
}

// ClearStale takes back the intents of repo that are older than age.
func (db *DB) ClearStale(ctx context.Context, repo string, age time.Duration) error {
	var tx Tx
	tx.add("DELETE FROM intents WHERE repo = $1 AND created <= $2", repo, now()-age.Microseconds())
	return db.send(ctx, &tx, "clear intents of "+repo)
}

// PutRepository puts a repository's own row. A zero time is now.
func (tx *Tx) PutRepository(r Repository) {
	tx.changes(r.Name, 1)
	tx.add(`INSERT INTO repositories (name, created, updated, attributes) VALUES ($1, $2, $3, $4)
		ON CONFLICT (name) DO UPDATE SET created = excluded.created, updated = excluded.updated, attributes = excluded.attributes`,
		r.Name, orNow(r.Created), orNow(r.Updated), r.bits())
}

// changed makes the repository's row and moves its Updated to at, but never
// back.
func (tx *Tx) changed(repo string, at int64) {
	tx.changes(repo, 2)
	tx.add(`INSERT INTO repositories (name, created, updated, attributes) VALUES ($1, $2, $2, $3)
		ON CONFLICT (name) DO UPDATE SET updated = excluded.updated WHERE repositories.updated < excluded.updated`,
		repo, at, DefaultAttributes().bits())
}

// exists makes the repository's row.
func (tx *Tx) exists(repo string) {
	tx.changes(repo, 1)
	tx.add("INSERT INTO repositories (name, created, updated, attributes) VALUES ($1, $2, $2, $3) ON CONFLICT (name) DO NOTHING",
		repo, now(), DefaultAttributes().bits())
}

// PutManifest puts a manifest and what it needs. Its Tags are not looked at.
func (tx *Tx) PutManifest(m Manifest) {
	tx.changed(m.Repo, orNow(m.Updated))
	tx.add(`INSERT INTO manifests (`+manifestColumns+`)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)
		ON CONFLICT (repo, digest) DO UPDATE SET media_type = excluded.media_type, artifact_type = excluded.artifact_type,
			config_media_type = excluded.config_media_type, os = excluded.os, architecture = excluded.architecture,
			size = excluded.size, image_size = excluded.image_size, subject = excluded.subject, annotations = excluded.annotations,
			blobs = excluded.blobs, children = excluded.children, pushed = excluded.pushed, updated = excluded.updated,
			pushed_by = excluded.pushed_by, attributes = excluded.attributes`,
		m.Repo, m.Digest.String(), m.MediaType, m.ArtifactType, m.ConfigMediaType, m.OS, m.Architecture, m.Size, m.ImageSize,
		m.Subject.String(), tx.json(m.Annotations), tx.json(m.Blobs), tx.json(m.Children),
		orNow(m.Pushed), orNow(m.Updated), m.By, m.bits())
	tx.needs(m.Repo, m.Digest, 0, m.Blobs, m.Children)
}

// The values of needs.deleted.
const (
	neededByManifest = 0
	neededByDeleted  = 1
)

// needs replaces what owner needs.
func (tx *Tx) needs(repo string, owner oci.Digest, deleted int, blobs []oci.Descriptor, children []oci.Digest) {
	tx.add("DELETE FROM needs WHERE repo = $1 AND owner = $2 AND deleted = $3", repo, owner.String(), deleted)
	digests := make([]oci.Digest, 0, len(blobs)+len(children))
	for _, b := range blobs {
		digests = append(digests, b.Digest)
	}
	digests = append(digests, children...)
	if len(digests) == 0 {
		return
	}
	tx.add("INSERT INTO needs (repo, digest, owner, deleted) SELECT DISTINCT $1, value, $2, CAST($4 AS BIGINT) FROM {each $3}",
		repo, owner.String(), tx.json(digests), deleted)
}

// DeleteManifest deletes a manifest, if it is there, and what it needs with it.
// Tags that point at it stay.
func (tx *Tx) DeleteManifest(repo string, digest oci.Digest) {
	tx.changed(repo, now())
	tx.add("DELETE FROM manifests WHERE repo = $1 AND digest = $2", repo, digest.String())
	tx.needs(repo, digest, neededByManifest, nil, nil)
}

// PutTag puts a tag.
func (tx *Tx) PutTag(t Tag) {
	tx.changed(t.Repo, orNow(t.Updated))
	tx.add(`INSERT INTO tags (`+tagColumns+`) VALUES ($1, $2, $3, $4, $5, $6)
		ON CONFLICT (repo, name) DO UPDATE SET digest = excluded.digest, created = excluded.created,
			updated = excluded.updated, attributes = excluded.attributes`,
		t.Repo, t.Name, t.Digest.String(), orNow(t.Created), orNow(t.Updated), t.bits())
}

// DeleteTag deletes a tag, if it is there.
func (tx *Tx) DeleteTag(repo, tag string) {
	tx.changed(repo, now())
	tx.add("DELETE FROM tags WHERE repo = $1 AND name = $2", repo, tag)
}

// PutBlob puts a blob. A zero Touched is now, and one that is earlier than what
// the index has changes nothing.
func (tx *Tx) PutBlob(b Blob) {
	tx.exists(b.Repo)
	tx.add(`INSERT INTO blobs (`+blobColumns+`) VALUES ($1, $2, $3, $4)
		ON CONFLICT (repo, digest) DO UPDATE SET size = excluded.size,
			touched = CASE WHEN blobs.touched < excluded.touched THEN excluded.touched ELSE blobs.touched END`,
		b.Repo, b.Digest.String(), b.Size, orNow(b.Touched))
}

// DeleteBlob deletes a blob, if it is there.
func (tx *Tx) DeleteBlob(repo string, digest oci.Digest) {
	tx.changes(repo, 1)
	tx.add("DELETE FROM blobs WHERE repo = $1 AND digest = $2", repo, digest.String())
}

// PutDeleted puts a soft-deleted manifest and what it needs.
func (tx *Tx) PutDeleted(d Deleted) {
	tx.exists(d.Repo)
	tx.changes(d.Repo, 1)
	tx.add(`INSERT INTO deleted (`+deletedColumns+`) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
		ON CONFLICT (repo, digest) DO UPDATE SET media_type = excluded.media_type, tags = excluded.tags,
			deleted = excluded.deleted, deleted_by = excluded.deleted_by, blobs = excluded.blobs,
			children = excluded.children, size = excluded.size, image_size = excluded.image_size`,
		d.Repo, d.Digest.String(), d.MediaType, tx.json(d.Tags), orNow(d.Deleted), d.By,
		tx.json(d.Blobs), tx.json(d.Children), d.Size, d.ImageSize)
	tx.needs(d.Repo, d.Digest, neededByDeleted, d.Blobs, d.Children)
}

// RemoveDeleted removes a soft-deleted manifest, if it is there: it was
// restored, or is gone for good.
func (tx *Tx) RemoveDeleted(repo string, digest oci.Digest) {
	tx.changes(repo, 2)
	tx.add("DELETE FROM deleted WHERE repo = $1 AND digest = $2", repo, digest.String())
	tx.needs(repo, digest, neededByDeleted, nil, nil)
}

// RemoveRepository removes all rows of a repository but its intents.
func (tx *Tx) RemoveRepository(repo string) {
	tx.changes(repo, 2)
	for _, statement := range []string{
		"DELETE FROM manifests WHERE repo = $1", "DELETE FROM tags WHERE repo = $1", "DELETE FROM blobs WHERE repo = $1",
		"DELETE FROM needs WHERE repo = $1", "DELETE FROM deleted WHERE repo = $1", "DELETE FROM repositories WHERE name = $1",
	} {
		tx.add(statement, repo)
	}
}

func orNow(t time.Time) int64 {
	if t.IsZero() {
		return now()
	}
	return micros(t)
}
