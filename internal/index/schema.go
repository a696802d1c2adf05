package index

import (
	"context"
	"fmt"
	"strings"
	"sync"
)

// dialect is what the two databases spell differently. Statements are written
// once, in PostgreSQL's spelling with these words in braces:
//
//	{text}      text that is compared by bytes
//	{bytes}     a byte string
//	{serial}    a primary key that counts up
//	{compact}   ends a table whose rows are little more than their key
//	{each $1}   a table with the column "value", from a JSON array of strings
//	{list x}    aggregates x to a JSON array
//	{locked}    ends a SELECT whose rows nobody else is to take
//
// Both know $1 by position once SQLite's are spelled ?1.
type dialect struct {
	words *strings.Replacer
	cache *sync.Map // statement as written → as spelled
}

func sqliteDialect() dialect {
	return dialect{cache: new(sync.Map), words: strings.NewReplacer(
		"{text}", "TEXT", "{bytes}", "BLOB", "{serial}", "INTEGER PRIMARY KEY AUTOINCREMENT", "{compact}", "WITHOUT ROWID",
		"{each $1}", "json_each(?1)", "{each $2}", "json_each(?2)", "{each $3}", "json_each(?3)", "{list name}", "json_group_array(name)",
		"{locked}", "", "$", "?")}
}

func postgresDialect() dialect {
	return dialect{cache: new(sync.Map), words: strings.NewReplacer(
		"{text}", `TEXT COLLATE "C"`, "{bytes}", "BYTEA", "{serial}", "BIGSERIAL PRIMARY KEY", "{compact}", "",
		"{each $1}", "jsonb_array_elements_text($1::jsonb)", "{each $2}", "jsonb_array_elements_text($2::jsonb)",
		"{each $3}", "jsonb_array_elements_text($3::jsonb)", "{list name}", "json_agg(name)::text",
		"{locked}", "FOR UPDATE SKIP LOCKED")}
}

func (d dialect) spell(statement string) string {
	if s, ok := d.cache.Load(statement); ok {
		return s.(string)
	}
	s := d.words.Replace(statement)
	d.cache.Store(statement, s)
	return s
}

// migrations lead from nothing to the schema of today; the version of a
// database is how many of them it has seen. One that was released is never
// changed: what is to be different is a further one.
func migrations() []string {
	return []string{schema1}
}

const schema1 = `
CREATE TABLE repositories (
	name {text} NOT NULL PRIMARY KEY,
	created BIGINT NOT NULL,
	updated BIGINT NOT NULL,
	attributes BIGINT NOT NULL
);
CREATE TABLE manifests (
	repo {text} NOT NULL,
	digest {text} NOT NULL,
	media_type TEXT NOT NULL,
	artifact_type TEXT NOT NULL,
	config_media_type TEXT NOT NULL,
	os TEXT NOT NULL,
	architecture TEXT NOT NULL,
	size BIGINT NOT NULL,
	image_size BIGINT NOT NULL,
	subject {text} NOT NULL,
	annotations TEXT NOT NULL,
	blobs TEXT NOT NULL,
	children TEXT NOT NULL,
	pushed BIGINT NOT NULL,
	updated BIGINT NOT NULL,
	pushed_by TEXT NOT NULL,
	attributes BIGINT NOT NULL,
	PRIMARY KEY (repo, digest)
);
CREATE INDEX manifests_by_time ON manifests (repo, updated, digest);
CREATE INDEX manifests_by_subject ON manifests (repo, subject, digest) WHERE subject <> '';
CREATE TABLE tags (
	repo {text} NOT NULL,
	name {text} NOT NULL,
	digest {text} NOT NULL,
	created BIGINT NOT NULL,
	updated BIGINT NOT NULL,
	attributes BIGINT NOT NULL,
	PRIMARY KEY (repo, name)
);
CREATE INDEX tags_by_time ON tags (repo, updated, name);
CREATE INDEX tags_by_digest ON tags (repo, digest, name);
CREATE TABLE blobs (
	repo {text} NOT NULL,
	digest {text} NOT NULL,
	size BIGINT NOT NULL,
	touched BIGINT NOT NULL,
	PRIMARY KEY (repo, digest)
);
CREATE INDEX blobs_by_digest ON blobs (digest, repo, size);
CREATE TABLE needs (
	repo {text} NOT NULL,
	digest {text} NOT NULL,
	owner {text} NOT NULL,
	deleted BIGINT NOT NULL,
	PRIMARY KEY (repo, digest, owner, deleted)
) {compact};
CREATE INDEX needs_by_owner ON needs (repo, owner, deleted);
CREATE TABLE deleted (
	repo {text} NOT NULL,
	digest {text} NOT NULL,
	media_type TEXT NOT NULL,
	tags TEXT NOT NULL,
	deleted BIGINT NOT NULL,
	deleted_by TEXT NOT NULL,
	blobs TEXT NOT NULL,
	children TEXT NOT NULL,
	size BIGINT NOT NULL,
	image_size BIGINT NOT NULL,
	PRIMARY KEY (repo, digest)
);
CREATE TABLE intents (
	id {text} NOT NULL PRIMARY KEY,
	repo {text} NOT NULL,
	created BIGINT NOT NULL
);
CREATE TABLE jobs (
	seq {serial},
	id {text} NOT NULL UNIQUE,
	queue {text} NOT NULL,
	key {text} NOT NULL,
	single BIGINT NOT NULL,
	payload {bytes} NOT NULL,
	state TEXT NOT NULL,
	canceling BIGINT NOT NULL,
	progress {bytes} NOT NULL,
	result {bytes} NOT NULL,
	attempts BIGINT NOT NULL,
	ready BIGINT NOT NULL,
	created BIGINT NOT NULL,
	updated BIGINT NOT NULL
);
CREATE INDEX jobs_by_key ON jobs (queue, key, seq);
CREATE INDEX jobs_active ON jobs (queue, key, seq) WHERE state IN ('queued', 'running');
CREATE INDEX jobs_ready ON jobs (queue, ready, seq) WHERE state IN ('queued', 'running');
CREATE INDEX jobs_ended ON jobs (updated) WHERE state NOT IN ('queued', 'running');
CREATE UNIQUE INDEX jobs_single ON jobs (queue, key) WHERE single = 1 AND state IN ('queued', 'running');
`

// tables are those of the newest schema, for Reset.
const tables = "repositories, manifests, tags, blobs, needs, deleted, intents, jobs, version"

// migrate brings the schema to what this program knows. q holds off every
// other process that might be doing the same.
func migrate(ctx context.Context, q querier) error {
	if _, err := q.exec(ctx, "CREATE TABLE IF NOT EXISTS version (version BIGINT NOT NULL)"); err != nil {
		return err
	}
	versions, err := collect(ctx, q, "SELECT version FROM version", func(scan scan) (version int, err error) {
		return version, scan(&version)
	})
	if err != nil {
		return err
	}
	version, set := 0, "INSERT INTO version (version) VALUES ($1)"
	if len(versions) > 0 {
		version, set = versions[0], "UPDATE version SET version = $1"
	}
	steps := migrations()
	if version < 0 || version > len(steps) {
		return fmt.Errorf("%w: it has schema version %d and this program knows %d; run the newer one that made it, or make it anew with `sluice registry rebuild-index`",
			ErrCorrupt, version, len(steps))
	}
	if version == len(steps) {
		return nil
	}
	for i, step := range steps[version:] {
		for statement := range strings.SplitSeq(step, ";\n") {
			if strings.TrimSpace(statement) == "" {
				continue
			}
			if _, err := q.exec(ctx, statement); err != nil {
				return fmt.Errorf("migration to schema version %d: %w", version+i+1, err)
			}
		}
	}
	_, err = q.exec(ctx, set, len(steps))
	return err
}
