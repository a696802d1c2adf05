package index_test

import (
	"fmt"
	"path/filepath"
	"sync/atomic"
	"testing"

	"sluice/internal/index"
	"sluice/oci"
)

func benchDB(b *testing.B) *index.DB {
	db, err := index.Open(b.Context(), index.Options{URL: "sqlite:" + filepath.Join(b.TempDir(), "index.db")})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { db.Close() })
	return db
}

// push is what the index has to do for a push of a manifest: a note before the
// tree changes, the rows after.
func push(b *testing.B, db *index.DB, n int64) {
	digest := oci.DigestOf(fmt.Append(nil, n))
	repo := fmt.Sprint("repo/", n%100)
	intent, err := db.Intend(b.Context(), repo)
	if err != nil {
		b.Fatal(err)
	}
	err = intent.Commit(b.Context(), func(tx *index.Tx) error {
		tx.PutManifest(index.Manifest{
			Repo: repo, Digest: digest, MediaType: oci.MediaTypeImageManifest, Size: 500, Attributes: index.DefaultAttributes(),
			Blobs: []oci.Descriptor{{Digest: digest, Size: 1}, {Digest: oci.DigestOf([]byte("layer")), Size: 2}},
		})
		tx.PutTag(index.Tag{Repo: repo, Name: fmt.Sprint("v", n), Digest: digest, Attributes: index.DefaultAttributes()})
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
}

func BenchmarkPush(b *testing.B) {
	db := benchDB(b)
	var n atomic.Int64
	b.Run("1", func(b *testing.B) {
		for b.Loop() {
			push(b, db, n.Add(1))
		}
	})
	b.Run("64", func(b *testing.B) {
		b.SetParallelism(32) // times 2 processors
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				push(b, db, n.Add(1))
			}
		})
	})
}

func BenchmarkTag(b *testing.B) {
	db := benchDB(b)
	for n := range 1000 {
		push(b, db, int64(n))
	}
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for i := 0; pb.Next(); i++ {
			if _, err := db.Tag(b.Context(), fmt.Sprint("repo/", i%100), fmt.Sprint("v", i%1000)); err != nil {
				b.Error(err)
			}
		}
	})
}

func BenchmarkManifest(b *testing.B) {
	db := benchDB(b)
	for n := range 1000 {
		push(b, db, int64(n))
	}
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for i := int64(0); pb.Next(); i++ {
			if _, err := db.Manifest(b.Context(), fmt.Sprint("repo/", i%100), oci.DigestOf(fmt.Append(nil, i%1000))); err != nil {
				b.Error(err)
			}
		}
	})
}
