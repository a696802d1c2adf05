package stored

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"sluice/internal/index"
	"sluice/internal/storage"
	"sluice/oci"
)

const root = "repositories/"

// The parts of a repository.
const (
	manifestsPart  = "_manifests/"
	layersPart     = "_layers/"
	tagsPart       = "_tags/"
	referrersPart  = "_referrers/"
	attributesPart = "_attributes/"
	deletedPart    = "_deleted/"
)

func partKey(repo, part string) string             { return root + repo + "/" + part }
func manifestKey(repo string, d oci.Digest) string { return partKey(repo, manifestsPart) + d.String() }
func layerKey(repo string, d oci.Digest) string    { return partKey(repo, layersPart) + d.String() }
func tagKey(repo, tag string) string               { return partKey(repo, tagsPart) + tag }
func attributesKey(repo string, d oci.Digest) string {
	return partKey(repo, attributesPart) + d.String()
}
func repositoryKey(repo string) string            { return partKey(repo, attributesPart) + "repository" }
func deletedKey(repo string, d oci.Digest) string { return partKey(repo, deletedPart) + d.String() }
func referrersKey(repo string, s oci.Digest) string {
	return partKey(repo, referrersPart) + s.String() + "/"
}
func referrerKey(repo string, s, d oci.Digest) string { return referrersKey(repo, s) + d.String() }

// maxRecord bounds what the small objects hold, in bytes; those of tags and
// attributes are less than a kilobyte.
const maxRecord = 64 << 10

// repositoryRecord is _attributes/repository.
type repositoryRecord struct {
	Created    time.Time        `json:"created"`
	Updated    time.Time        `json:"updated"`
	Attributes index.Attributes `json:"attributes"`
}

// tagRecord is _tags/TAG. Older stores have a bare digest there, and its times
// are unknown.
type tagRecord struct {
	Digest     oci.Digest       `json:"digest"`
	Created    time.Time        `json:"created"`
	Updated    time.Time        `json:"updated"`
	Attributes index.Attributes `json:"attributes"`
}

// manifestRecord is _attributes/DIGEST: what a manifest doesn't say of itself.
// Older stores have none.
type manifestRecord struct {
	MediaType    string           `json:"mediaType"`
	Pushed       time.Time        `json:"pushed"`
	By           string           `json:"by,omitempty"`
	Updated      time.Time        `json:"updated"`
	OS           string           `json:"os,omitempty"` // this and the next from an image's config
	Architecture string           `json:"architecture,omitempty"`
	Attributes   index.Attributes `json:"attributes"`
}

// deletedRecord is _deleted/DIGEST: a soft-deleted manifest with what was
// deleted with it.
type deletedRecord struct {
	DeletedAt time.Time `json:"deletedAt"`
	By        string    `json:"by,omitempty"` // who deleted it
	deletedManifest
	Artifacts []deletedManifest `json:"artifacts,omitempty"` // its streaming artifacts, and theirs
}

type deletedManifest struct {
	Digest       oci.Digest       `json:"digest"`
	Tags         []string         `json:"tags"`
	MediaType    string           `json:"mediaType"`
	Pushed       time.Time        `json:"pushed"`
	PushedBy     string           `json:"pushedBy,omitempty"`
	OS           string           `json:"os,omitempty"`
	Architecture string           `json:"architecture,omitempty"`
	Attributes   index.Attributes `json:"attributes"`
	Content      []byte           `json:"content"` // in base64
}

func recordOfRepository(row index.Repository) repositoryRecord {
	return repositoryRecord{Created: row.Created, Updated: row.Updated, Attributes: row.Attributes}
}

func recordOfTag(t index.Tag) tagRecord {
	return tagRecord{Digest: t.Digest, Created: t.Created, Updated: t.Updated, Attributes: t.Attributes}
}

func recordOfManifest(m index.Manifest) manifestRecord {
	return manifestRecord{
		MediaType: m.MediaType, Pushed: m.Pushed, By: m.By, Updated: m.Updated,
		OS: m.OS, Architecture: m.Architecture, Attributes: m.Attributes,
	}
}

// put stores a record.
func (r *Registry) put(ctx context.Context, key string, record any) error {
	content, err := json.Marshal(record)
	if err != nil {
		return err
	}
	return r.store.Put(ctx, key, content)
}

// remove deletes an object that need not be there.
func (r *Registry) remove(ctx context.Context, key string) error {
	if err := r.store.Delete(ctx, key); err != nil && !errors.Is(err, storage.ErrNotFound) {
		return err
	}
	return nil
}

// readRecord decodes a record into one that has the defaults. Errors: storage.ErrNotFound.
func (r *Registry) readRecord(ctx context.Context, key string, max int64, record any) error {
	content, err := storage.ReadAll(ctx, r.store, key, max)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(content, record); err != nil {
		return damaged{fmt.Errorf("stored object %s is damaged: %w", key, err)}
	}
	return nil
}

// damaged is the error for an object that was read and isn't what it should be,
// which no second try will change.
type damaged struct{ error }

func (d damaged) Unwrap() error { return d.error }

// describeRepository returns a repository as it is in the tree, and makes its
// record if there is none.
func (r *Registry) describeRepository(ctx context.Context, repo string) (index.Repository, error) {
	at := now()
	record := repositoryRecord{Created: at, Updated: at, Attributes: index.DefaultAttributes()}
	err := r.readRecord(ctx, repositoryKey(repo), maxRecord, &record)
	if r.lost(err, repo) {
		record = repositoryRecord{Created: at, Updated: at, Attributes: index.DefaultAttributes()}
		err = r.put(ctx, repositoryKey(repo), record)
	}
	return index.Repository{
		Name: repo, Created: micro(record.Created), Updated: micro(record.Updated), Attributes: record.Attributes,
	}, err
}

// readTag returns a tag as it is in the tree. Errors: storage.ErrNotFound, damaged.
func (r *Registry) readTag(ctx context.Context, repo, name string) (index.Tag, error) {
	content, err := storage.ReadAll(ctx, r.store, tagKey(repo, name), maxRecord)
	if err != nil {
		return index.Tag{}, err
	}
	record := tagRecord{Attributes: index.DefaultAttributes()}
	if digest, err := oci.ParseDigest(string(content)); err == nil {
		record.Digest = digest
	} else if err := json.Unmarshal(content, &record); err != nil {
		return index.Tag{}, damaged{fmt.Errorf("stored tag %s of %s is damaged: it holds %.80q: push the tag again", name, repo, content)}
	} else if _, err := oci.ParseDigest(record.Digest.String()); err != nil {
		return index.Tag{}, damaged{fmt.Errorf("stored tag %s of %s is damaged: it points at %.80q: push the tag again", name, repo, record.Digest)}
	}
	return index.Tag{
		Repo: repo, Name: name, Digest: record.Digest,
		Created: micro(record.Created), Updated: micro(record.Updated), Attributes: record.Attributes,
	}, nil
}

// readManifest returns a manifest that it has verified. Errors:
// storage.ErrNotFound, damaged.
func (r *Registry) readManifest(ctx context.Context, repo string, digest oci.Digest) ([]byte, error) {
	content, err := storage.ReadAll(ctx, r.store, manifestKey(repo, digest), oci.MaxManifestSize)
	if err != nil {
		return nil, err
	}
	// %v, not %w: to a client this is our failure and not a wrong digest of
	// theirs.
	if actual := digest.Algorithm().FromBytes(content); actual != digest {
		return nil, damaged{fmt.Errorf("stored manifest %s of %s is damaged: its digest is %v: push it again", digest, repo, actual)}
	}
	return content, nil
}

// micro is a time from the tree as the index keeps it.
func micro(t time.Time) time.Time {
	if t.IsZero() {
		return time.Time{}
	}
	return t.UTC().Truncate(time.Microsecond)
}

// mediaTypeOf returns the media type of a manifest that was accepted and has no
// record. One without the member mediaType is of an OCI type, since Docker's
// always have it, and indexes alone have the member manifests.
func mediaTypeOf(content []byte) (string, error) {
	var m struct {
		MediaType string          `json:"mediaType"`
		Manifests json.RawMessage `json:"manifests"`
	}
	switch err := json.Unmarshal(content, &m); {
	case err != nil:
		return "", err
	case m.MediaType != "":
		return m.MediaType, nil
	case m.Manifests != nil:
		return oci.MediaTypeIndex, nil
	}
	return oci.MediaTypeImageManifest, nil
}
