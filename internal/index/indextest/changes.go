package indextest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"sluice/internal/index"
	"sluice/oci"
)

func changes() map[string]func(*testing.T, *index.DB) {
	return map[string]func(*testing.T, *index.DB){
		"Intents":           testIntents,
		"StaleByAge":        testStaleByAge,
		"ZeroTimesAreNow":   testZeroTimes,
		"ManyAtOnce":        testManyAtOnce,
		"CrossedOrder":      testCrossedOrder,
		"SeenWhole":         testSeenWhole,
		"EndedContext":      testEndedContext,
		"LastThatIsGone":    testLastThatIsGone,
		"TouchedIsInexact":  testTouched,
		"NoRowsAskedFor":    testNoRows,
		"CheckAfterNothing": func(t *testing.T, db *index.DB) { must(t, db.Check(t.Context())) },
	}
}

func stale(t *testing.T, db *index.DB, age time.Duration, want ...string) {
	t.Helper()
	got, err := db.Stale(t.Context(), age)
	must(t, err)
	if !slices.Equal(got, want) {
		t.Fatalf("stale repositories: got %q, want %q", got, want)
	}
}

func testIntents(t *testing.T, db *index.DB) {
	ctx := soon(t)
	stale(t, db, 0)
	first, err := db.Intend(ctx, "a")
	must(t, err)
	second, err := db.Intend(ctx, "a")
	must(t, err)
	other, err := db.Intend(ctx, "b/c")
	must(t, err)
	stale(t, db, 0, "a", "b/c")

	must(t, first.Commit(ctx, func(tx *index.Tx) error {
		tx.PutTag(index.Tag{Repo: "a", Name: "1", Digest: digests()[0]})
		return nil
	}))
	stale(t, db, 0, "a", "b/c")
	if err := second.Commit(ctx, func(*index.Tx) error { return errGivenUp }); !errors.Is(err, errGivenUp) {
		t.Fatalf("got %v, want the error of the function", err)
	}
	stale(t, db, 0, "a", "b/c")
	must(t, second.Drop(ctx))
	stale(t, db, 0, "b/c")
	must(t, db.ReplaceRepository(ctx, "b/c", index.RepositoryContent{}))
	stale(t, db, 0, "b/c")
	must(t, db.ClearStale(ctx, "b/c", 0))
	stale(t, db, 0)
	// Whoever was thought dead may still be alive.
	must(t, other.Commit(ctx, func(*index.Tx) error { return nil }))
	if _, err := db.Tag(ctx, "a", "1"); err != nil {
		t.Fatal(err)
	}
}

func testStaleByAge(t *testing.T, db *index.DB) {
	_, err := db.Intend(soon(t), "a")
	must(t, err)
	stale(t, db, time.Hour)
	must(t, db.ClearStale(soon(t), "a", time.Hour))
	time.Sleep(20 * time.Millisecond)
	stale(t, db, 10*time.Millisecond, "a")
	must(t, db.ClearStale(soon(t), "a", 10*time.Millisecond))
	stale(t, db, 0)
}

func testZeroTimes(t *testing.T, db *index.DB) {
	ctx := soon(t)
	before := time.Now().Add(-time.Millisecond)
	must(t, db.Update(ctx, func(tx *index.Tx) error {
		tx.PutManifest(index.Manifest{Repo: "a", Digest: digests()[0]})
		tx.PutTag(index.Tag{Repo: "a", Name: "1", Digest: digests()[0]})
		tx.PutBlob(index.Blob{Repo: "a", Digest: digests()[1]})
		return nil
	}))
	r, err := db.Repository(ctx, "a")
	must(t, err)
	tag, err := db.Tag(ctx, "a", "1")
	must(t, err)
	m, err := db.Manifest(ctx, "a", digests()[0])
	must(t, err)
	for what, at := range map[string]time.Time{
		"repository created": r.Created, "repository updated": r.Updated, "tag created": tag.Created,
		"tag updated": tag.Updated, "manifest pushed": m.Pushed, "manifest updated": m.Updated,
	} {
		if at.Before(before) || at.After(time.Now()) || at.Location() != time.UTC {
			t.Errorf("%s at %v, want now in UTC", what, at)
		}
	}
	garbage, err := db.Garbage(ctx, "a", before, "", 9)
	if err != nil || len(garbage) != 0 {
		t.Errorf("what was just put is garbage: %v, %v", garbage, err)
	}
}

// testManyAtOnce pushes from many clients, of whom some give up.
func testManyAtOnce(t *testing.T, db *index.DB) {
	ctx := soon(t)
	const clients, each = 16, 8
	var group sync.WaitGroup
	for client := range clients {
		group.Go(func() {
			for i := range each {
				i64 := client*each + i
				digest := oci.DigestOf(fmt.Append(nil, i64))
				intent, err := db.Intend(ctx, "busy")
				if err != nil {
					t.Error(err)
					return
				}
				err = intent.Commit(ctx, func(tx *index.Tx) error {
					tx.PutManifest(index.Manifest{Repo: "busy", Digest: digest, Size: 1, Children: []oci.Digest{digest}})
					tx.PutTag(index.Tag{Repo: "busy", Name: fmt.Sprint("t", i64), Digest: digest})
					tx.PutTag(index.Tag{Repo: "busy", Name: "latest", Digest: digest})
					if i == 0 {
						return errGivenUp
					}
					return nil
				})
				if errors.Is(err, errGivenUp) {
					err = intent.Drop(ctx)
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	r, err := db.Repository(ctx, "busy")
	must(t, err)
	if want := clients * (each - 1); r.Manifests != want || r.Tags != want+1 {
		t.Errorf("%d manifests, %d tags; want %d and one more", r.Manifests, r.Tags, want)
	}
	stale(t, db, 0)
}

// testCrossedOrder changes the same rows in different order, which a database
// answers with deadlocks that a caller must not see.
func testCrossedOrder(t *testing.T, db *index.DB) {
	ctx := soon(t)
	repos := []string{"a", "b", "c"}
	var group sync.WaitGroup
	for client := range 6 {
		group.Go(func() {
			for i := range 10 {
				err := db.Update(ctx, func(tx *index.Tx) error {
					for j := range repos {
						repo := repos[(client+j)%len(repos)]
						tx.PutTag(index.Tag{Repo: repo, Name: "1", Digest: digests()[i%3]})
					}
					return nil
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
}

// testSeenWhole reads while transactions run that put ever two tags at once.
func testSeenWhole(t *testing.T, db *index.DB) {
	ctx := soon(t)
	written := make(chan error, 1)
	go func() {
		var err error
		for i := range 60 {
			err = errors.Join(err, db.Update(ctx, func(tx *index.Tx) error {
				for _, half := range []string{"a", "b"} {
					tx.PutTag(index.Tag{Repo: "a", Name: fmt.Sprint(i, half), Digest: digests()[0]})
				}
				return nil
			}))
		}
		written <- err
	}()
	for {
		r, err := db.Repository(ctx, "a")
		if err != nil && !errors.Is(err, index.ErrNotFound) || r.Tags%2 != 0 {
			t.Errorf("%d tags: half of a transaction, or %v", r.Tags, err)
		}
		select {
		case err := <-written:
			must(t, err)
			return
		default:
		}
	}
}

func testEndedContext(t *testing.T, db *index.DB) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := db.Update(ctx, func(tx *index.Tx) error { tx.PutRepository(index.Repository{Name: "a"}); return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("update: got %v, want that the context has ended", err)
	}
	if _, err := db.Repository(ctx, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("query: got %v, want that the context has ended", err)
	}
	if _, err := db.Repository(t.Context(), "a"); !errors.Is(err, index.ErrNotFound) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
}

// testLastThatIsGone deletes what it lists, page by page.
func testLastThatIsGone(t *testing.T, db *index.DB) {
	ctx := soon(t)
	for _, order := range []index.Order{index.ByName, index.TimeAscending, index.TimeDescending} {
		must(t, db.Update(ctx, func(tx *index.Tx) error {
			for i := range 10 {
				tx.PutTag(index.Tag{Repo: "a", Name: fmt.Sprint(i), Digest: digests()[0], Updated: early(i / 3)})
			}
			return nil
		}))
		last := ""
		for {
			page, err := db.Tags(ctx, index.TagQuery{Repo: "a", Last: last, N: 3, Order: order})
			must(t, err)
			if len(page) == 0 {
				break
			}
			last = page[len(page)-1].Name
			must(t, db.Update(ctx, func(tx *index.Tx) error {
				for _, tag := range page {
					tx.DeleteTag("a", tag.Name)
				}
				return nil
			}))
		}
		if r, err := db.Repository(ctx, "a"); err != nil || r.Tags != 0 {
			t.Errorf("order %d: %d tags left over (%v)", order, r.Tags, err)
		}
	}
}

// testTouched: asking for a blob again within a minute is no write.
func testTouched(t *testing.T, db *index.DB) {
	ctx := soon(t)
	lately := time.Now().Add(-20 * time.Second).Truncate(time.Microsecond).UTC()
	must(t, db.Update(ctx, func(tx *index.Tx) error {
		tx.PutBlob(index.Blob{Repo: "a", Digest: digests()[0], Touched: lately})
		return nil
	}))
	must(t, db.Touch(ctx, "a", digests()[0]))
	got, err := db.Garbage(ctx, "a", time.Now(), "", 1)
	if err != nil || len(got) != 1 || !got[0].Touched.Equal(lately) {
		t.Errorf("got %v, %v; want Touched %v", got, err, lately)
	}
}

func testNoRows(t *testing.T, db *index.DB) {
	ctx := soon(t)
	must(t, db.Update(ctx, func(tx *index.Tx) error {
		tx.PutTag(index.Tag{Repo: "a", Name: "1", Digest: digests()[0]})
		tx.PutManifest(index.Manifest{Repo: "a", Digest: digests()[0]})
		return nil
	}))
	for _, n := range []int{0, -1} {
		tags, err := db.Tags(ctx, index.TagQuery{Repo: "a", N: n})
		must(t, err)
		manifests, err := db.Manifests(ctx, index.ManifestQuery{Repo: "a", N: n})
		must(t, err)
		if len(tags)+len(manifests) != 0 {
			t.Errorf("asked for %d, got %v and %v", n, tags, manifests)
		}
	}
	if _, err := db.Tags(ctx, index.TagQuery{Repo: "a", N: 1, Order: 7}); err == nil {
		t.Error("an order that isn't one was accepted")
	}
}
