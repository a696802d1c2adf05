package mount

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"sluice/internal/blob"
)

// What has just come and was verified isn't asked for again because an earlier
// answer was doubted: the host that it came from would be blamed for that one. What
// the disk has is.
func TestDoubtedTable(t *testing.T) {
	right, damaged := []byte("the table's blob"), []byte("the disk's own idea")[:16]
	var asked blob.Counter
	src := &tableSource{remote: blob.Count(blob.FromBytes(right), &asked)}
	read := func(doubted bool, want []byte, requests int64) {
		t.Helper()
		ctx := t.Context()
		if doubted {
			ctx = blob.Doubt(ctx)
		}
		got := make([]byte, len(right))
		if err := blob.ReadFull(ctx, src, got, 0); err != nil || !bytes.Equal(got, want) || asked.Requests.Load() != requests {
			t.Errorf("doubted: %t: %q, %v, after %d requests; want %q, %d", doubted, got, err, asked.Requests.Load(), want, requests)
		}
	}
	read(false, right, 1)
	src.local.Store(&localTable{Source: blob.FromBytes(right)})
	read(false, right, 1)
	read(true, right, 1)
	name := filepath.Join(t.TempDir(), "table")
	if err := os.WriteFile(name, damaged, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := src.useFile(name); err != nil {
		t.Fatal(err)
	}
	read(false, damaged, 1)
	read(true, right, 2)
}
