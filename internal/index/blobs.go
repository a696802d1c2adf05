package index

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"sluice/oci"
)

const blobColumns = "repo, digest, size, touched"

func scanBlob(scan scan) (b Blob, err error) {
	var touched int64
	err = scan(&b.Repo, &b.Digest, &b.Size, &touched)
	b.Touched = timeOf(touched)
	return b, err
}

// FindBlob returns a repository that has the blob, and its size.
//
// Errors: ErrNotFound.
func (db *DB) FindBlob(ctx context.Context, digest oci.Digest) (repo string, size int64, err error) {
	b, err := one(ctx, db, "SELECT "+blobColumns+" FROM blobs WHERE digest = $1 ORDER BY repo LIMIT 1", scanBlob, digest.String())
	if err != nil {
		return "", 0, fmt.Errorf("index: blob %s: %w", digest, err)
	}
	return b.Repo, b.Size, nil
}

// touchAge is how exact Blob.Touched is: asking for a blob over and over isn't
// to be as many writes.
const touchAge = time.Minute

// Touch sets Touched of a blob to now, unless it was touched within the last
// minute. It is durable: an answer that makes a client rely on the blob comes
// after it. For a blob that isn't there it does nothing.
func (db *DB) Touch(ctx context.Context, repo string, digest oci.Digest) error {
	before := now() - touchAge.Microseconds()
	b, err := one(ctx, db, "SELECT "+blobColumns+" FROM blobs WHERE repo = $1 AND digest = $2", scanBlob, repo, digest.String())
	if err == nil && micros(b.Touched) < before {
		var tx Tx
		tx.add("UPDATE blobs SET touched = $3 WHERE repo = $1 AND digest = $2 AND touched < $4", repo, digest.String(), now(), before)
		err = db.engine.write(ctx, nil, tx.statements)
	}
	if err != nil && !errors.Is(err, ErrNotFound) {
		return fmt.Errorf("index: touch %s@%s: %w", repo, digest, err)
	}
	return nil
}

// Garbage returns at most n blobs of repo, ordered by digest, after last, that
// no manifest and no soft-deleted manifest of repo needs and that nobody has
// touched since before.
func (db *DB) Garbage(ctx context.Context, repo string, before time.Time, last oci.Digest, n int) ([]Blob, error) {
	list, err := all(ctx, db, "SELECT "+blobColumns+` FROM blobs WHERE repo = $1 AND digest > $2 AND touched < $3
			AND NOT EXISTS (SELECT 1 FROM needs WHERE needs.repo = blobs.repo AND needs.digest = blobs.digest)
		ORDER BY digest LIMIT $4`, scanBlob, repo, last.String(), micros(before), max(n, 0))
	if err != nil {
		return nil, fmt.Errorf("index: garbage of %s: %w", repo, err)
	}
	return list, nil
}

// Needed tells whether a manifest or a soft-deleted manifest of repo needs the
// blob or manifest with the digest.
func (db *DB) Needed(ctx context.Context, repo string, digest oci.Digest) (bool, error) {
	needed, err := one(ctx, db, "SELECT EXISTS (SELECT 1 FROM needs WHERE repo = $1 AND digest = $2)", func(scan scan) (b bool, err error) {
		return b, scan(&b)
	}, repo, digest.String())
	if err != nil {
		return true, fmt.Errorf("index: who needs %s@%s: %w", repo, digest, err)
	}
	return needed, nil
}

// NeededBy returns the manifests of repo that need the blob or manifest with the
// digest, in no order; soft-deleted ones aren't among them.
func (db *DB) NeededBy(ctx context.Context, repo string, digest oci.Digest) ([]oci.Digest, error) {
	owners, err := all(ctx, db, "SELECT owner FROM needs WHERE repo = $1 AND digest = $2 AND deleted = $3", func(scan scan) (d oci.Digest, err error) {
		return d, scan(&d)
	}, repo, digest.String(), neededByManifest)
	if err != nil {
		return nil, fmt.Errorf("index: which manifests need %s@%s: %w", repo, digest, err)
	}
	return owners, nil
}

const deletedColumns = "repo, digest, media_type, tags, deleted, deleted_by, blobs, children, size, image_size"

func scanDeleted(scan scan) (d Deleted, err error) {
	var tags, blobs, children string
	var deleted int64
	err = scan(&d.Repo, &d.Digest, &d.MediaType, &tags, &deleted, &d.By, &blobs, &children, &d.Size, &d.ImageSize)
	if err != nil {
		return d, err
	}
	d.Deleted = timeOf(deleted)
	if d.Tags, err = list[string](tags); err != nil {
		return d, err
	}
	if d.Blobs, err = list[oci.Descriptor](blobs); err != nil {
		return d, err
	}
	d.Children, err = list[oci.Digest](children)
	return d, err
}

// DeletedManifests returns at most n soft-deleted manifests, ordered by
// repository and digest: of repo, or of all if it is empty; those deleted before
// a time, or all if it is zero; after last, which is a digest of repo, or
// REPO@DIGEST when repo is empty.
func (db *DB) DeletedManifests(ctx context.Context, repo string, before time.Time, last string, n int) ([]Deleted, error) {
	lastRepo, lastDigest, ok := strings.Cut(last, "@")
	if !ok {
		lastRepo, lastDigest = repo, last
	}
	where, args := "(repo, digest) > ($1, $2)", []any{lastRepo, lastDigest, max(n, 0)}
	if repo != "" {
		where, args[0] = "repo = $1 AND digest > $2", repo
	}
	if !before.IsZero() {
		args = append(args, micros(before))
		where += fmt.Sprintf(" AND deleted < $%d", len(args))
	}
	list, err := all(ctx, db, "SELECT "+deletedColumns+" FROM deleted WHERE "+where+" ORDER BY repo, digest LIMIT $3", scanDeleted, args...)
	if err != nil {
		return nil, fmt.Errorf("index: deleted manifests: %w", err)
	}
	return list, nil
}

func scanUsage(scan scan) (u Usage, err error) {
	var manifests int64
	err = scan(&u.Manifests, &manifests, &u.Blobs, &u.Size, &u.Shared)
	u.Size += manifests
	return u, err
}

// Usage returns the space that a repository takes. Shared are bytes of blobs
// that other repositories have too. Manifests that are soft-deleted don't
// count, their blobs do.
func (db *DB) Usage(ctx context.Context, repo string) (Usage, error) {
	u, err := one(ctx, db, `SELECT m.n, m.size, b.n, b.size, b.shared FROM
		(SELECT count(*) AS n, CAST(coalesce(sum(size), 0) AS BIGINT) AS size FROM manifests WHERE repo = $1) AS m,
		(SELECT count(*) AS n, CAST(coalesce(sum(size), 0) AS BIGINT) AS size, CAST(coalesce(sum(CASE
			WHEN EXISTS (SELECT 1 FROM blobs AS other WHERE other.digest = blobs.digest AND other.repo <> $1) THEN size ELSE 0
			END), 0) AS BIGINT) AS shared FROM blobs WHERE repo = $1) AS b`, scanUsage, repo)
	if err != nil {
		return u, fmt.Errorf("index: usage of %s: %w", repo, err)
	}
	return u, nil
}

// TotalUsage returns the space that the whole registry takes: numbers and Size
// count each digest once, however many repositories have it.
func (db *DB) TotalUsage(ctx context.Context) (Usage, error) {
	u, err := one(ctx, db, `SELECT m.n, m.size, b.n, b.size, b.shared FROM
		(SELECT count(*) AS n, CAST(coalesce(sum(size), 0) AS BIGINT) AS size FROM
			(SELECT max(size) AS size FROM manifests GROUP BY digest) AS each_manifest) AS m,
		(SELECT count(*) AS n, CAST(coalesce(sum(size), 0) AS BIGINT) AS size,
			CAST(coalesce(sum(CASE WHEN repos > 1 THEN size ELSE 0 END), 0) AS BIGINT) AS shared FROM
			(SELECT max(size) AS size, count(*) AS repos FROM blobs GROUP BY digest) AS each_blob) AS b`, scanUsage)
	if err != nil {
		return u, fmt.Errorf("index: total usage: %w", err)
	}
	return u, nil
}
