package index_test

import (
	"path/filepath"
	"testing"

	"sluice/internal/index"
	"sluice/internal/index/indextest"
)

func open(t *testing.T, url string) *index.DB {
	t.Helper()
	db, err := index.Open(t.Context(), index.Options{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	return db
}

func file(t *testing.T) string { return "sqlite:" + filepath.Join(t.TempDir(), "in dex%41?.db") }

func TestFile(t *testing.T) {
	indextest.Run(t, func(t *testing.T) *index.DB { return open(t, file(t)) })
}

func TestMemory(t *testing.T) {
	indextest.Run(t, func(t *testing.T) *index.DB { return open(t, "sqlite::memory:") })
}
