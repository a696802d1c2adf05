package stored_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/index"
	"sluice/internal/storage"
	"sluice/internal/stored"
	"sluice/oci"
)

// keys are all objects of a repository, without the digests.
func keys(t *testing.T, store storage.Store, repo string) []string {
	t.Helper()
	var all []string
	var list func(prefix string)
	list = func(prefix string) {
		for key, err := range store.List(t.Context(), prefix, "") {
			if err != nil {
				t.Fatal(err)
			}
			if strings.HasSuffix(key, "/") {
				list(key)
				continue
			}
			parts := strings.Split(strings.TrimPrefix(key, "repositories/"+repo+"/"), "/")
			if strings.Contains(parts[len(parts)-1], ":") {
				parts = parts[:1]
			}
			all = append(all, strings.Join(parts, "/"))
		}
	}
	list("repositories/" + repo + "/")
	return all
}

// Deleting an image takes its streaming artifacts, and theirs, and nothing else.
func TestDeleteArtifacts(t *testing.T) {
	for _, soft := range []time.Duration{0, time.Hour} {
		store := &storage.Memory{}
		reg := open(t, store, stored.Options{SoftDelete: soft, AllowStreamingPush: true})
		ctx := t.Context()
		image := pushImage(t, reg, "a", "v1", "layer")
		other := pushImage(t, reg, "a", "v2", "other")
		artifact := pushArtifact(t, reg, "a", "artifact", image)
		nested := pushArtifact(t, reg, "a", "nested", artifact)
		kept := pushArtifact(t, reg, "a", "kept", other)
		signature := pushIndex(t, reg, "a", "", indexDoc(t, image.Digest, "signature"))
		must(reg.PushManifest(ctx, "a", "tagged", artifact.MediaType, must(reg.GetManifest(ctx, "a", artifact.Digest.String()))(t).Content))(t)
		if err := reg.DeleteManifest(ctx, "a", image.Digest); err != nil {
			t.Fatal(err)
		}
		for digest, want := range map[oci.Digest]error{
			image.Digest: oci.ErrManifestUnknown, artifact.Digest: oci.ErrManifestUnknown, nested.Digest: oci.ErrManifestUnknown,
			other.Digest: nil, kept.Digest: nil, signature: nil,
		} {
			if _, err := reg.GetManifest(ctx, "a", digest.String()); !errors.Is(err, want) {
				t.Errorf("%s: %v, want %v", digest, err, want)
			}
		}
		var tags []string
		for tag := range reg.Tags(ctx, "a", "") {
			tags = append(tags, tag)
		}
		if !slices.Equal(tags, []string{"v2"}) {
			t.Errorf("tags are %v", tags)
		}
		all := keys(t, store, "a")
		want := slices.Concat(
			[]string{"_attributes/repository"}, slices.Repeat([]string{"_attributes"}, 3), slices.Repeat([]string{"_deleted"}, min(1, int(soft))),
			slices.Repeat([]string{"_layers"}, 6), slices.Repeat([]string{"_manifests"}, 3), slices.Repeat([]string{"_referrers"}, 2), []string{"_tags/v2"})
		if diff := cmp.Diff(want, all); diff != "" {
			t.Errorf("objects (-want +got):\n%s", diff)
		}
	}
}

// A push of what was deleted brings back that alone, wherever it's killed: what was
// deleted with it stays so.
func TestKilledPushOfDeleted(t *testing.T) {
	ctx := t.Context()
	opts := stored.Options{SoftDelete: time.Hour}
	for left := 1; ; left++ {
		store := &mortal{Store: &storage.Memory{}, left: -1, die: func() {}}
		reg := open(t, store, opts)
		image := pushImage(t, reg, "a", "v1", "layer")
		artifact := pushArtifact(t, reg, "a", "artifact", image)
		content := must(reg.GetManifest(ctx, "a", "v1"))(t).Content
		if err := reg.DeleteManifest(ctx, "a", image.Digest); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Microsecond) // times have that much of a difference
		store.left = left
		_, err := reg.PushManifest(ctx, "a", "v2", image.MediaType, content)
		killed := store.left == 0
		store.left = -1
		reg = open(t, store, opts)
		if err := reg.Rebuild(ctx, nil); err != nil {
			t.Fatal(err)
		}
		_, there := reg.GetManifest(ctx, "a", image.Digest.String())
		deleted := must(reg.DeletedManifests(ctx, "a", time.Time{}, "", 10))(t)
		if err == nil && there != nil || (there == nil) == (len(deleted) == 1) {
			t.Errorf("killed after %d changes, with %v: it's there: %v, and %d are deleted", left, err, there, len(deleted))
		}
		for _, gone := range []string{artifact.Digest.String(), "v1"} {
			if _, err := reg.GetManifest(ctx, "a", gone); !errors.Is(err, oci.ErrManifestUnknown) && !errors.Is(err, oci.ErrNameUnknown) {
				t.Errorf("killed after %d changes: what was deleted with it, %s: %v", left, gone, err)
			}
		}
		if !killed {
			if left < 4 {
				t.Errorf("it made %d changes", left)
			}
			return
		}
	}
}

func TestRestore(t *testing.T) {
	store := &storage.Memory{}
	reg := open(t, store, stored.Options{SoftDelete: time.Hour})
	ctx := oci.WithActor(t.Context(), oci.Actor{Name: "ann"})
	image := pushImage(t, reg, "a", "v1", "layer")
	push(t, reg, reg, "a", "v2", "layer", nil)
	artifact := pushArtifact(t, reg, "a", "artifact", image)
	must(reg.SetManifestAttributes(ctx, "a", image.Digest, func(a *index.Attributes) error { a.ListEnabled = false; return nil }))(t)
	before := must(reg.Manifest(ctx, "a", image.Digest))(t)
	remove := func() {
		t.Helper()
		if err := reg.DeleteManifest(ctx, "a", image.Digest); err != nil {
			t.Fatal(err)
		}
	}
	remove()
	list := must(reg.DeletedManifests(ctx, "a", time.Time{}, "", 10))(t)
	if len(list) != 1 || list[0].By != "ann" || !slices.Equal(list[0].Tags, []string{"v1", "v2"}) || len(list[0].Blobs) != 3 || list[0].ImageSize != image.ImageSize {
		t.Errorf("deleted are %+v", list)
	}
	if _, err := reg.Repository(ctx, "a"); !errors.Is(err, oci.ErrNameUnknown) {
		t.Errorf("a repository all of which is deleted: %v", err)
	}
	for repo := range reg.Repositories(ctx, "") {
		t.Errorf("%s is listed", repo)
	}
	pushImage(t, reg, "a", "v2", "another") // v2 is taken from now on
	if desc, err := reg.Restore(ctx, "a", image.Digest, ""); err != nil || desc.Digest != image.Digest {
		t.Fatalf("restore: %v, %v", desc, err)
	}
	after := must(reg.Manifest(ctx, "a", image.Digest))(t)
	before.Updated, before.Tags = after.Updated, []string{"v1"}
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("restored (-before +after):\n%s", diff)
	}
	must(reg.GetManifest(ctx, "a", artifact.Digest.String()))(t)
	if list := must(reg.DeletedManifests(ctx, "", time.Time{}, "", 10))(t); len(list) != 0 {
		t.Errorf("still deleted are %+v", list)
	}
	if _, err := reg.Restore(ctx, "a", image.Digest, ""); !errors.Is(err, oci.ErrManifestUnknown) {
		t.Errorf("restore again: %v", err)
	}

	remove()
	if _, err := reg.Restore(ctx, "a", image.Digest, "v2"); !errors.Is(err, oci.ErrDenied) {
		t.Errorf("restore under a tag that is taken: %v", err)
	}
	must(reg.Restore(ctx, "a", image.Digest, "new"))(t)
	if _, err := reg.Tag(ctx, "a", "v1"); !errors.Is(err, oci.ErrManifestUnknown) {
		t.Errorf("a tag that wasn't asked for: %v", err)
	}

	// Without the artifact's blob it comes back alone, without its own not at all.
	remove()
	if err := reg.DeleteBlob(ctx, "a", artifact.Blobs[1].Digest); err != nil {
		t.Fatal(err)
	}
	must(reg.Restore(ctx, "a", image.Digest, ""))(t)
	if _, err := reg.GetManifest(ctx, "a", artifact.Digest.String()); !errors.Is(err, oci.ErrManifestUnknown) {
		t.Errorf("an artifact that isn't complete: %v", err)
	}
	remove()
	if err := reg.DeleteBlob(ctx, "a", image.Blobs[1].Digest); err != nil {
		t.Fatal(err)
	}
	if _, err := reg.Restore(ctx, "a", image.Digest, ""); !errors.Is(err, oci.ErrManifestBlobUnknown) || !strings.Contains(err.Error(), image.Blobs[1].Digest.String()) {
		t.Errorf("restore what isn't complete: %v", err)
	}
	// Pushed again it isn't deleted any more.
	pushImage(t, reg, "a", "v9", "layer")
	if list := must(reg.DeletedManifests(ctx, "", time.Time{}, "", 10))(t); len(list) != 0 {
		t.Errorf("still deleted are %+v", list)
	}
	if got := must(reg.Manifest(ctx, "a", image.Digest))(t); !slices.Equal(got.Tags, []string{"v9"}) {
		t.Errorf("tags after a push are %v", got.Tags)
	}
}

func TestPurge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db, err := index.Open(t.Context(), index.Options{URL: "sqlite::memory:"})
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		reg := stored.New(&storage.Memory{}, db, stored.Options{SoftDelete: 7 * 24 * time.Hour})
		ctx := t.Context()
		early, late := pushImage(t, reg, "a", "v1", "early"), pushImage(t, reg, "b", "v1", "late")
		purge := func(want int) {
			t.Helper()
			if n, err := reg.Purge(ctx); n != want || err != nil {
				t.Errorf("purged %d, %v; want %d", n, err, want)
			}
		}
		if err := reg.DeleteManifest(ctx, "a", early.Digest); err != nil {
			t.Fatal(err)
		}
		time.Sleep(4 * 24 * time.Hour)
		if err := reg.DeleteManifest(ctx, "b", late.Digest); err != nil {
			t.Fatal(err)
		}
		purge(0)
		if n, err := reg.Collect(ctx, time.Hour); n.Blobs != 0 || err != nil {
			t.Errorf("collected what can be restored: %v, %v", n, err)
		}
		time.Sleep(4 * 24 * time.Hour)
		purge(1)
		purge(0)
		if _, err := reg.Restore(ctx, "a", early.Digest, ""); !errors.Is(err, oci.ErrManifestUnknown) {
			t.Errorf("restore what was purged: %v", err)
		}
		if n, err := reg.Collect(ctx, time.Hour); n.Blobs != 2 || err != nil {
			t.Errorf("collected %v, %v; want 2", n, err)
		}
		must(reg.Restore(ctx, "b", late.Digest, ""))(t)
	})
}

func TestDeleteRepository(t *testing.T) {
	for _, soft := range []time.Duration{0, time.Hour} {
		store := &storage.Memory{}
		reg := open(t, store, stored.Options{SoftDelete: soft})
		ctx := t.Context()
		image := pushImage(t, reg, "a", "v1", "layer")
		artifact := pushArtifact(t, reg, "a", "artifact", image)
		pushBlob(t, reg, "a", "garbage")
		pushImage(t, reg, "a/b", "v1", "layer")
		must(reg.SetRepositoryAttributes(ctx, "a", func(a *index.Attributes) error { a.StreamingEnabled = true; return nil }))(t)
		if err := reg.DeleteRepository(ctx, "a"); err != nil {
			t.Fatal(err)
		}
		for name, err := range map[string]error{
			"again": reg.DeleteRepository(ctx, "a"), "tags": second(reg.TagsPage(ctx, index.TagQuery{Repo: "a", N: 1})),
			"usage": second(reg.Usage(ctx, "a")), "image": second(reg.GetManifest(ctx, "a", image.Digest.String())),
		} {
			if !errors.Is(err, oci.ErrNameUnknown) {
				t.Errorf("%s: %v, want ErrNameUnknown", name, err)
			}
		}
		for repo := range reg.Repositories(ctx, "") {
			if repo != "a/b" {
				t.Errorf("repository %s is listed", repo)
			}
		}
		left := slices.DeleteFunc(keys(t, store, "a"), func(k string) bool { return strings.HasPrefix(k, "b") })
		if soft == 0 {
			if len(left) > 0 {
				t.Errorf("left are %v", left)
			}
			continue
		}
		if want := []string{"_attributes/repository", "_deleted", "_layers", "_layers", "_layers"}; !slices.Equal(left, want) {
			t.Errorf("left are %v, want %v", left, want)
		}
		must(reg.Restore(ctx, "a", image.Digest, ""))(t)
		must(reg.GetManifest(ctx, "a", "v1"))(t)
		must(reg.GetManifest(ctx, "a", artifact.Digest.String()))(t)
		if row := must(reg.Repository(ctx, "a"))(t); row.StreamingEnabled {
			t.Error("attributes outlived their repository")
		}
	}
}

// A store of before there was an index has bare digests as tags, and no records.
func TestOlderStore(t *testing.T) {
	store := &storage.Memory{}
	first := open(t, store, stored.Options{})
	image := pushImage(t, first, "a", "v1", "layer")
	ctx := t.Context()
	if err := errors.Join(
		store.Put(ctx, "repositories/a/_tags/v1", []byte(image.Digest)),
		store.Delete(ctx, "repositories/a/_attributes/"+image.Digest.String()),
		store.Delete(ctx, "repositories/a/_attributes/repository"),
	); err != nil {
		t.Fatal(err)
	}
	var dumps [2][]index.RepositoryContent
	var done []string
	for i := range dumps {
		db := openIndex(t)
		reg := stored.New(store, db, stored.Options{})
		if err := reg.Rebuild(ctx, func(repo string, n int) { done = append(done, fmt.Sprint(repo, n)) }); err != nil {
			t.Fatal(err)
		}
		row := must(reg.Manifest(ctx, "a", image.Digest))(t)
		if row.OS != "linux" || row.Architecture != "arm64" || time.Since(row.Pushed) > time.Minute || !slices.Equal(row.Tags, []string{"v1"}) || !row.WriteEnabled {
			t.Errorf("manifest is %+v", row)
		}
		for c, err := range db.Dump(ctx) {
			dumps[i] = append(dumps[i], c)
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	if diff := cmp.Diff(dumps[0], dumps[1]); diff != "" {
		t.Errorf("two rebuilds differ:\n%s", diff)
	}
	if !slices.Equal(done, []string{"a1", "a1"}) {
		t.Errorf("progress was %v", done)
	}
}

func TestEvents(t *testing.T) {
	db := openIndex(t)
	reg := stored.New(&storage.Memory{}, db, stored.Options{Events: true, SoftDelete: time.Hour})
	ctx := oci.WithActor(t.Context(), oci.Actor{Name: "ann", Remote: "192.0.2.1:1", Agent: "test", RequestID: "r1"})
	content := indexDoc(t, "", "x")
	digest := oci.DigestOf(content)
	must(reg.PushManifest(ctx, "a", "v1", oci.MediaTypeIndex, content))(t)
	must(reg.PushManifest(ctx, "a", "v2", oci.MediaTypeIndex, content))(t)
	if err := reg.DeleteTag(ctx, "a", "v1"); err != nil {
		t.Fatal(err)
	}
	if err := reg.DeleteManifest(ctx, "a", digest); err != nil {
		t.Fatal(err)
	}
	must(reg.Restore(context.WithoutCancel(ctx), "a", digest, ""))(t)
	var got []string
	ids := map[string]bool{}
	for {
		jobs := must(db.Lease(ctx, stored.EventQueue, 1, time.Minute))(t)
		if len(jobs) == 0 {
			break
		}
		j := jobs[0]
		if err := db.Finish(ctx, j, index.Succeeded, nil); err != nil {
			t.Fatal(err)
		}
		var e stored.Event
		if err := json.Unmarshal(j.Payload, &e); err != nil {
			t.Fatal(err)
		}
		ids[e.ID] = true
		if e.Actor != "ann" || e.Remote != "192.0.2.1:1" || e.Agent != "test" || e.RequestID != "r1" || e.Repository != "a" || j.Key != "a" || time.Since(e.Time) > time.Minute {
			t.Errorf("event %s", j.Payload)
		}
		if want := int64(len(content)); e.Digest == digest && (e.Size != want || e.MediaType != oci.MediaTypeIndex) {
			t.Errorf("event %s", j.Payload)
		}
		got = append(got, fmt.Sprintf("%s %s %v", e.Action, e.Tag, e.Digest == digest))
	}
	want := []string{"push v1 true", "push v2 true", "delete v1 false", "delete  true", "push v2 true"}
	if diff := cmp.Diff(want, got); diff != "" || len(ids) != len(want) {
		t.Errorf("events (-want +got):\n%s", diff)
	}
}
