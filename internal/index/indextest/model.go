package indextest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"sluice/internal/index"
	"sluice/oci"
)

// model is what the tables should hold, by repository.
type model map[string]*repository

type repository struct {
	index.Repository
	manifests map[oci.Digest]index.Manifest
	tags      map[string]index.Tag
	blobs     map[oci.Digest]index.Blob
	deleted   map[oci.Digest]index.Deleted
}

// The world of the random changes. Names are such that a database which sorts
// by language, or matches them as patterns, is found out.
func repositories() []string { return []string{"A/b", "a", "a-b", "a/b", "a_b"} }
func tags() []string         { return []string{"1.0", "V1", "_x", "latest", "v1"} }
func types() []string        { return []string{"", "application/x", "application/y"} }

func digests() []oci.Digest {
	var all []oci.Digest
	for i := range 7 {
		all = append(all, oci.DigestOf([]byte{byte(i)}))
	}
	return all
}

// Times that are given are years before now, and come back as they are; those
// that the DB takes from the clock come back as late.
func early(second int) time.Time {
	return time.Date(2020, 1, 1, 0, 0, second, 1000, time.UTC)
}

func late() time.Time { return time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC) }

func known(t time.Time) time.Time {
	if t.After(early(1 << 20)) {
		return late()
	}
	return t
}

// repo returns the repository; its row is made, at a time, if need be.
func (m model) repo(name string, at time.Time) *repository {
	if m[name] == nil {
		m[name] = &repository{
			Repository: index.Repository{Name: name, Created: at, Updated: at, Attributes: index.DefaultAttributes()},
			manifests:  map[oci.Digest]index.Manifest{}, tags: map[string]index.Tag{},
			blobs: map[oci.Digest]index.Blob{}, deleted: map[oci.Digest]index.Deleted{},
		}
	}
	return m[name]
}

func (m model) changed(name string, at time.Time) *repository {
	r := m.repo(name, at)
	if r.Updated.Before(at) {
		r.Updated = at
	}
	return r
}

// change is one call of a Tx, and what it does to the model.
type change struct {
	text  string
	tx    func(*index.Tx)
	model func(model)
}

// changed times must lie before now whatever the model made of it.
func drawChange(t *rapid.T) change {
	repo := rapid.SampledFrom(repositories()).Draw(t, "repo")
	digest := rapid.SampledFrom(digests()).Draw(t, "digest")
	kind := rapid.SampledFrom([]string{
		"PutRepository", "PutManifest", "PutManifest", "PutManifest", "DeleteManifest", "PutTag", "PutTag", "PutTag", "DeleteTag",
		"PutBlob", "PutBlob", "PutBlob", "DeleteBlob", "PutDeleted", "RemoveDeleted", "RemoveRepository",
	}).Draw(t, "change")
	c := change{text: fmt.Sprintf("%s %s %s", kind, repo, digest[:12])}
	switch kind {
	case "PutRepository":
		r := drawRepository(t, repo)
		c.tx = func(tx *index.Tx) { tx.PutRepository(r) }
		c.model = func(m model) { m.repo(repo, r.Updated).Repository = r }
	case "PutManifest":
		put := drawManifest(t, repo, digest)
		c.tx = func(tx *index.Tx) { tx.PutManifest(put) }
		c.model = func(m model) { m.changed(repo, put.Updated).manifests[digest] = put }
	case "DeleteManifest":
		c.tx = func(tx *index.Tx) { tx.DeleteManifest(repo, digest) }
		c.model = func(m model) { delete(m.changed(repo, late()).manifests, digest) }
	case "PutTag":
		put := drawTag(t, repo, rapid.SampledFrom(tags()).Draw(t, "tag"))
		c.tx = func(tx *index.Tx) { tx.PutTag(put) }
		c.model = func(m model) { m.changed(repo, put.Updated).tags[put.Name] = put }
	case "DeleteTag":
		tag := rapid.SampledFrom(tags()).Draw(t, "tag")
		c.tx = func(tx *index.Tx) { tx.DeleteTag(repo, tag) }
		c.model = func(m model) { delete(m.changed(repo, late()).tags, tag) }
	case "PutBlob":
		put := drawBlob(t, repo, digest)
		c.tx = func(tx *index.Tx) { tx.PutBlob(put) }
		c.model = func(m model) {
			r := m.repo(repo, late())
			stored := put
			if old := r.blobs[digest].Touched; old.After(put.Touched) {
				stored.Touched = old
			}
			r.blobs[digest] = stored
		}
	case "DeleteBlob":
		c.tx = func(tx *index.Tx) { tx.DeleteBlob(repo, digest) }
		c.model = func(m model) {
			if m[repo] != nil {
				delete(m[repo].blobs, digest)
			}
		}
	case "PutDeleted":
		put := drawDeleted(t, repo, digest)
		c.tx = func(tx *index.Tx) { tx.PutDeleted(put) }
		c.model = func(m model) { m.repo(repo, late()).deleted[digest] = put }
	case "RemoveDeleted":
		c.tx = func(tx *index.Tx) { tx.RemoveDeleted(repo, digest) }
		c.model = func(m model) {
			if m[repo] != nil {
				delete(m[repo].deleted, digest)
			}
		}
	case "RemoveRepository":
		c.tx = func(tx *index.Tx) { tx.RemoveRepository(repo) }
		c.model = func(m model) { delete(m, repo) }
	}
	return c
}

func drawTime(t *rapid.T) time.Time { return early(rapid.IntRange(0, 4).Draw(t, "second")) }

func drawAttributes(t *rapid.T) index.Attributes {
	bit := func() bool { return rapid.Bool().Draw(t, "attribute") }
	return index.Attributes{
		DeleteEnabled: bit(), WriteEnabled: bit(), ListEnabled: bit(), ReadEnabled: bit(),
		TeleportEnabled: bit(), StreamingEnabled: bit(), AnonymousPullEnabled: bit(),
	}
}

func drawRepository(t *rapid.T, name string) index.Repository {
	return index.Repository{Name: name, Created: drawTime(t), Updated: drawTime(t), Attributes: drawAttributes(t)}
}

func drawDescriptors(t *rapid.T) []oci.Descriptor {
	var all []oci.Descriptor
	for _, d := range drawDigests(t) {
		all = append(all, oci.Descriptor{MediaType: "application/z", Digest: d, Size: sizeOf(d)})
	}
	return all
}

func drawDigests(t *rapid.T) []oci.Digest {
	return rapid.SliceOfN(rapid.SampledFrom(digests()), 0, 3).Draw(t, "digests")
}

// sizeOf makes sizes up, one for each digest.
func sizeOf(d oci.Digest) int64 { return int64(d.Encoded()[0])<<33 | 7 }

func drawManifest(t *rapid.T, repo string, d oci.Digest) index.Manifest {
	m := index.Manifest{
		Repo: repo, Digest: d, MediaType: oci.MediaTypeImageManifest, ConfigMediaType: "c", OS: "linux", Architecture: "arm64",
		ArtifactType: rapid.SampledFrom(types()).Draw(t, "type"), Size: sizeOf(d), ImageSize: 3,
		Blobs: drawDescriptors(t), Children: drawDigests(t), Pushed: drawTime(t), Updated: drawTime(t), By: "ann", Attributes: drawAttributes(t),
	}
	if rapid.Bool().Draw(t, "refers") {
		m.Subject = rapid.SampledFrom(digests()).Draw(t, "subject")
		m.Annotations = map[string]string{"k\"ey": "välue\n'", "": "$1 ?1"}
	}
	return m
}

func drawTag(t *rapid.T, repo, name string) index.Tag {
	return index.Tag{Repo: repo, Name: name, Digest: rapid.SampledFrom(digests()).Draw(t, "tagged"),
		Created: drawTime(t), Updated: drawTime(t), Attributes: drawAttributes(t)}
}

func drawBlob(t *rapid.T, repo string, d oci.Digest) index.Blob {
	return index.Blob{Repo: repo, Digest: d, Size: sizeOf(d), Touched: drawTime(t)}
}

func drawDeleted(t *rapid.T, repo string, d oci.Digest) index.Deleted {
	return index.Deleted{
		Repo: repo, Digest: d, MediaType: oci.MediaTypeIndex, Tags: rapid.SliceOfN(rapid.SampledFrom(tags()), 0, 2).Draw(t, "tags"),
		Deleted: drawTime(t), By: "bob", Blobs: drawDescriptors(t), Children: drawDigests(t), Size: sizeOf(d), ImageSize: 5,
	}
}

func drawContent(t *rapid.T, repo string) index.RepositoryContent {
	some := func() []oci.Digest {
		return rapid.SliceOfNDistinct(rapid.SampledFrom(digests()), 0, 3, rapid.ID[oci.Digest]).Draw(t, "some")
	}
	c := index.RepositoryContent{Repository: drawRepository(t, repo)}
	for _, d := range some() {
		c.Manifests = append(c.Manifests, drawManifest(t, repo, d))
	}
	for _, d := range some() {
		c.Blobs = append(c.Blobs, drawBlob(t, repo, d))
	}
	for _, d := range some() {
		c.Deleted = append(c.Deleted, drawDeleted(t, repo, d))
	}
	for _, name := range rapid.SliceOfNDistinct(rapid.SampledFrom(tags()), 0, 3, rapid.ID[string]).Draw(t, "tags") {
		c.Tags = append(c.Tags, drawTag(t, repo, name))
	}
	return c
}

func (m model) replace(name string, c index.RepositoryContent) {
	old := m[name]
	delete(m, name)
	r := m.repo(name, c.Updated)
	r.Repository = c.Repository
	for _, b := range c.Blobs {
		b.Touched = late()
		if old != nil && !old.blobs[b.Digest].Touched.IsZero() {
			b.Touched = old.blobs[b.Digest].Touched
		}
		r.blobs[b.Digest] = b
	}
	for _, d := range c.Deleted {
		r.deleted[d.Digest] = d
	}
	for _, x := range c.Manifests {
		m.changed(name, x.Updated).manifests[x.Digest] = x
	}
	for _, x := range c.Tags {
		m.changed(name, x.Updated).tags[x.Name] = x
	}
}

var errGivenUp = errors.New("given up")

// step makes one random change to both.
func step(ctx context.Context, t *rapid.T, db *index.DB, m model) error {
	switch rapid.IntRange(0, 9).Draw(t, "step") {
	case 0:
		repo := rapid.SampledFrom(repositories()).Draw(t, "replace")
		content := drawContent(t, repo)
		m.replace(repo, content)
		return db.ReplaceRepository(ctx, repo, content)
	case 1:
		repo, digest := rapid.SampledFrom(repositories()).Draw(t, "repo"), rapid.SampledFrom(digests()).Draw(t, "touch")
		if r := m[repo]; r != nil && !r.blobs[digest].Touched.IsZero() {
			b := r.blobs[digest]
			b.Touched = late()
			r.blobs[digest] = b
		}
		return db.Touch(ctx, repo, digest)
	}
	changes := rapid.SliceOfN(rapid.Custom(drawChange), 1, 4).Draw(t, "changes")
	givenUp := rapid.IntRange(0, 9).Draw(t, "give up") == 0
	run := func(tx *index.Tx) error {
		for _, c := range changes {
			t.Log(c.text)
			c.tx(tx)
		}
		if givenUp {
			return errGivenUp
		}
		return nil
	}
	var err error
	if rapid.Bool().Draw(t, "intend") {
		var i *index.Intent
		if i, err = db.Intend(ctx, "a"); err != nil {
			return err
		}
		if err = i.Commit(ctx, run); givenUp {
			err = errors.Join(err, i.Drop(ctx))
		}
	} else {
		err = db.Update(ctx, run)
	}
	if givenUp && errors.Is(err, errGivenUp) {
		return nil
	}
	for _, c := range changes {
		c.model(m)
	}
	return err
}

// testModel compares every query with the model after random changes.
func testModel(t *testing.T, db *index.DB) {
	rapid.Check(t, func(rt *rapid.T) {
		ctx := t.Context()
		err := db.Update(ctx, func(tx *index.Tx) error {
			for _, repo := range repositories() {
				tx.RemoveRepository(repo)
			}
			return nil
		})
		if err != nil {
			rt.Fatal(err)
		}
		m := model{}
		for range rapid.IntRange(1, 12).Draw(rt, "steps") {
			if err := step(ctx, rt, db, m); err != nil {
				rt.Fatal(err)
			}
		}
		c := comparison{t: rt, db: db, m: m, n: rapid.IntRange(1, 4).Draw(rt, "page")}
		c.all(ctx)
	})
}

func sorted[K interface{ ~string }, V any](m map[K]V) []V {
	var all []V
	for _, k := range slices.Sorted(maps.Keys(m)) {
		all = append(all, m[k])
	}
	return all
}
