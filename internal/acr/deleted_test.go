package acr_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"testing"
	"time"

	"sluice/internal/acr"
	"sluice/internal/stored"
	"sluice/oci"
)

func TestSoftDelete(t *testing.T) {
	b := newBench(t, stored.Options{SoftDelete: 7 * 24 * time.Hour})
	ctx, client := t.Context(), b.admin()
	old := push(t, b.reg, "team/app", "old", "v1")
	if err := client.DeleteManifest(ctx, "team/app", old); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Millisecond)
	young := push(t, b.reg, "team/app", "young", "v1", "v2")
	if err := client.DeleteManifest(ctx, "team/app", young); err != nil {
		t.Fatal(err)
	}
	deleted, err := client.DeletedManifests(ctx, "team/app")
	if err != nil || len(deleted) != 2 || deleted[0].Digest != old || deleted[1].Digest != young {
		t.Fatalf("deleted, the oldest first, are %+v, %v", deleted, err)
	}
	d := deleted[1]
	if !slices.Equal(d.Tags, []string{"v1", "v2"}) || d.DeletedBy != "admin" || d.Purged.Sub(d.Deleted) != 7*24*time.Hour || d.ImageSize < 5 {
		t.Errorf("the young one is %+v", d)
	}

	// As `az acr manifest list-deleted-tags` and `restore` do it: it takes
	// the last of the list that has the tag.
	_, body := b.send("admin", adminPassword, "GET", "/acr/v1/_deleted/team/app/_tags?n=100", "")
	var doc struct{ Tags []map[string]string }
	if err := json.Unmarshal([]byte(body), &doc); err != nil {
		t.Fatal(err)
	}
	var tags []string
	for _, tag := range doc.Tags {
		tags = append(tags, tag["tag"]+"@"+tag["digest"])
		if _, err := time.Parse(time.RFC3339, tag["deletedAt"]); err != nil {
			t.Error(err)
		}
	}
	if want := []string{"v1@" + old.String(), "v1@" + young.String(), "v2@" + young.String()}; !slices.Equal(tags, want) {
		t.Errorf("deleted tags are %v", tags)
	}
	resp, body := b.send("admin", adminPassword, "POST", "/acr/v1/_deleted/team/app/_manifests/"+young.String()+"?force=False", `{"tag": "v1"}`)
	if want := fmt.Sprintf(`{"digest":%q,"tag":"v1"}`, young); resp.StatusCode != http.StatusOK || body != want {
		t.Errorf("restored: %s, %s", resp.Status, body)
	}
	if tag, err := client.Tag(ctx, "team/app", "v1"); err != nil || tag.Digest != young {
		t.Errorf("v1 is %+v, %v", tag, err)
	}
	if _, err := client.Tag(ctx, "team/app", "v2"); !errors.Is(err, acr.ErrTagUnknown) {
		t.Errorf("v2, which wasn't asked for, is there: %v", err)
	}
	if _, err := client.Restore(ctx, "team/app", young, "", false); !errors.Is(err, oci.ErrManifestUnknown) {
		t.Errorf("it is restored again: %v", err)
	}

	// A tag that names another one by now.
	if _, err := client.Restore(ctx, "team/app", old, "v1", false); !errors.Is(err, acr.ErrConflict) {
		t.Errorf("a tag is moved: %v", err)
	}
	if _, err := client.Restore(ctx, "team/app", old, "v1", true); err != nil {
		t.Error(err)
	}
	if tag, err := client.Tag(ctx, "team/app", "v1"); err != nil || tag.Digest != old {
		t.Errorf("v1 is %+v, %v", tag, err)
	}
	if deleted, err := client.DeletedManifests(ctx, "team/app"); err != nil || len(deleted) != 0 {
		t.Errorf("still deleted are %+v, %v", deleted, err)
	}
}

func TestDeletedRepositories(t *testing.T) {
	b := newBench(t, stored.Options{SoftDelete: time.Hour})
	ctx, client := t.Context(), b.admin()
	for _, repo := range []string{"b", "a/b", "c", "d"} {
		push(t, b.reg, repo, "one"+repo, "v1")
		push(t, b.reg, repo, "two"+repo, "v2")
	}
	kept := push(t, b.reg, "kept", "three", "v1")
	push(t, b.reg, "kept", "four", "v1")
	if err := client.DeleteManifest(ctx, "kept", kept); err != nil {
		t.Fatal(err)
	}
	for _, repo := range []string{"b", "c", "a/b"} {
		if _, err := client.DeleteRepository(ctx, repo); err != nil {
			t.Fatal(err)
		}
	}
	list, err := client.DeletedRepositories(ctx)
	var names []string
	for _, d := range list {
		names = append(names, d.Name)
		if time.Since(d.Deleted).Abs() > time.Minute {
			t.Errorf("%s was deleted at %v", d.Name, d.Deleted)
		}
	}
	if err != nil || !slices.Equal(names, []string{"a/b", "b", "c"}) {
		t.Errorf("there are %v, %v", names, err)
	}
	resp, body := b.send("admin", adminPassword, "GET", "/acr/v1/_deleted/_catalog?n=2", "")
	if next := linked(t, resp); next != "/acr/v1/_deleted/_catalog?last=b&n=2" {
		t.Errorf("%s: %s, then %q", resp.Status, body, next)
	}
	// With what it had, it is there again.
	deleted, err := client.DeletedManifests(ctx, "a/b")
	if err != nil || len(deleted) != 2 {
		t.Fatal(deleted, err)
	}
	for _, d := range deleted {
		if _, err := client.Restore(ctx, "a/b", d.Digest, "", false); err != nil {
			t.Error(err)
		}
	}
	if tags, err := client.Tags(ctx, "a/b", acr.ListOptions{}); err != nil || len(tags) != 2 {
		t.Errorf("it has the tags %v, %v", tags, err)
	}
	if list, err := client.DeletedRepositories(ctx); err != nil || len(list) != 2 {
		t.Errorf("there are %v, %v", list, err)
	}
}

func TestUsageAndCollection(t *testing.T) {
	b := newBench(t, stored.Options{})
	ctx, client := t.Context(), b.admin()
	push(t, b.reg, "a", "shared layer", "v1")
	mine := push(t, b.reg, "a", "a layer of a's own", "v2")
	push(t, b.reg, "b", "shared layer", "v1")
	a, err := client.Usage(ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	bs, err := client.Usage(ctx, "b")
	if err != nil {
		t.Fatal(err)
	}
	total, err := client.Usage(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	if a.Repository != "a" || a.Manifests != 2 || a.Blobs != 3 || a.Shared == 0 || a.Shared >= a.Size || bs.Blobs != 2 || a.Size != total.Size {
		t.Errorf("a %+v, b %+v, total %+v", a, bs, total)
	}
	if err := client.DeleteManifest(ctx, "a", mine); err != nil {
		t.Fatal(err)
	}
	// A HEAD may be as young as the index's resolution of time, and the grace
	// is a nanosecond here.
	got, err := client.Collect(ctx)
	if err != nil {
		t.Fatal(err)
	}
	after, err := client.Usage(ctx, "a")
	if err != nil || got.Blobs != 1 || got.Bytes != int64(len("a layer of a's own")) || after.Blobs != 2 {
		t.Errorf("collected %+v, then a %+v, %v", got, after, err)
	}
}
