package index

import (
	"context"
	"fmt"

	"sluice/oci"
)

// TagQuery asks for tags of a repository.
type TagQuery struct {
	Repo   string
	Last   string     // only what comes after this tag, in the order asked for
	N      int        // at most so many
	Digest oci.Digest // only tags of this manifest, if not empty
	Order  Order
}

const tagColumns = "repo, name, digest, created, updated, attributes"

func scanTag(scan scan) (t Tag, err error) {
	var created, updated, bits int64
	err = scan(&t.Repo, &t.Name, &t.Digest, &created, &updated, &bits)
	t.Created, t.Updated, t.Attributes = timeOf(created), timeOf(updated), attributesOf(bits)
	return t, err
}

// Tags returns tags. Ordered by time, a Last that isn't there any more begins
// the list anew, so that deleting what was listed leaves nothing out.
func (db *DB) Tags(ctx context.Context, q TagQuery) ([]Tag, error) {
	after, err := afterLast("tags", "name", q.Order)
	if err != nil {
		return nil, err
	}
	filter := ""
	args := []any{q.Repo, q.Last, max(q.N, 0)}
	if q.Digest != "" {
		filter = " AND digest = $4"
		args = append(args, q.Digest.String())
	}
	list, err := all(ctx, db, "SELECT "+tagColumns+" FROM tags WHERE repo = $1"+filter+after, scanTag, args...)
	if err != nil {
		return nil, fmt.Errorf("index: tags of %s: %w", q.Repo, err)
	}
	return list, nil
}

// Tag returns a tag. Errors: ErrNotFound.
func (db *DB) Tag(ctx context.Context, repo, name string) (Tag, error) {
	t, err := one(ctx, db, "SELECT "+tagColumns+" FROM tags WHERE repo = $1 AND name = $2", scanTag, repo, name)
	if err != nil {
		return t, fmt.Errorf("index: %s:%s: %w", repo, name, err)
	}
	return t, nil
}

// afterLast is the end of a query of $3 rows of a table that come after that
// whose name is $2, all in the repository $1.
func afterLast(table, name string, order Order) (string, error) {
	last := "(SELECT updated FROM " + table + " WHERE repo = $1 AND " + name + " = $2)"
	switch order {
	case ByName:
		return " AND " + name + " > $2 ORDER BY " + name + " LIMIT $3", nil
	case TimeAscending:
		return " AND (updated, " + name + ") > (coalesce(" + last + ", -1), $2) ORDER BY updated, " + name + " LIMIT $3", nil
	case TimeDescending:
		return " AND (updated, " + name + ") < (coalesce(" + last + ", 9223372036854775807), $2) ORDER BY updated DESC, " + name + " DESC LIMIT $3", nil
	}
	return "", fmt.Errorf("index: %d is not an order", order)
}
