package stored_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/index"
	"sluice/internal/storage"
	"sluice/internal/stored"
	"sluice/oci"
)

// sluggish is a store that is far away: what is put arrives when it likes.
type sluggish struct{ *storage.Memory }

func (s sluggish) Put(ctx context.Context, key string, data []byte) error {
	time.Sleep(rand.N(300 * time.Microsecond))
	err := s.Memory.Put(ctx, key, data)
	time.Sleep(rand.N(300 * time.Microsecond))
	return err
}

// Replicas that push the same tags, and delete, at once: afterwards index and
// tree say the same, whoever came last.
func TestReplicasAgree(t *testing.T) {
	db, store := openIndex(t), sluggish{&storage.Memory{}}
	ctx := t.Context()
	var contents [][]byte
	for i := range 3 {
		contents = append(contents, indexDoc(t, "", fmt.Sprint(i)))
	}
	for range 20 {
		var wg sync.WaitGroup
		for i := range 6 {
			reg := stored.New(store, db, stored.Options{SoftDelete: time.Hour})
			who := oci.WithActor(ctx, oci.Actor{Name: fmt.Sprint("replica", i)})
			wg.Go(func() {
				for n := range 4 {
					content := contents[(i+n)%3]
					if _, err := reg.PushManifest(who, "a", fmt.Sprint("v", n%2), oci.MediaTypeIndex, content); err != nil {
						t.Error(err)
					}
				}
				if i == 0 {
					reg.DeleteManifest(who, "a", oci.DigestOf(contents[0])) // or it isn't there yet
				}
			})
		}
		wg.Wait()
		compareIndexes(t, store, db)
		if t.Failed() {
			return
		}
	}
}

// compareIndexes compares an index with one that is made of the tree.
func compareIndexes(t *testing.T, store storage.Store, db *index.DB) {
	t.Helper()
	fresh := openIndex(t)
	if err := stored.New(store, fresh, stored.Options{}).Rebuild(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	var dumps [2][]index.RepositoryContent
	for i, db := range []*index.DB{fresh, db} {
		for c, err := range db.Dump(t.Context()) {
			if err != nil {
				t.Fatal(err)
			}
			dumps[i] = append(dumps[i], c)
		}
	}
	if diff := cmp.Diff(dumps[0], dumps[1]); diff != "" {
		t.Errorf("the index differs from one made of the tree (-made +there):\n%s", diff)
	}
}

// A client that goes away doesn't stop a change that has begun.
func TestGoneClient(t *testing.T) {
	db, store := openIndex(t), &storage.Memory{}
	ctx, cancel := context.WithCancel(t.Context())
	reg := stored.New(leaving{store, cancel}, db, stored.Options{})
	pushBlob(t, reg, "a", "blob")
	if _, err := reg.PushManifest(ctx, "a", "v1", oci.MediaTypeIndex, indexDoc(t, "", "x")); err != nil && ctx.Err() == nil {
		t.Fatal(err)
	}
	if ctx.Err() == nil {
		t.Fatal("the client didn't leave")
	}
	if stale, err := db.Stale(t.Context(), -time.Hour); err != nil || len(stale) > 0 {
		t.Errorf("changes that didn't end: %v, %v", stale, err)
	}
	if _, err := reg.GetManifest(t.Context(), "a", "v1"); err != nil {
		t.Error(err)
	}
	compareIndexes(t, store, db)
}

// leaving is a store whose client goes away when a manifest is put.
type leaving struct {
	*storage.Memory
	leave func()
}

func (l leaving) Put(ctx context.Context, key string, data []byte) error {
	if strings.Contains(key, "/_manifests/") {
		l.leave()
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return l.Memory.Put(ctx, key, data)
}
