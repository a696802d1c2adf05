package cache

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"slices"
	"sync/atomic"
	"testing"

	"sluice/internal/artifact"
	"sluice/internal/blob"
	"sluice/oci"
)

const storedBlock = 4096

// storedFixture is a file that is a device as it is, in blocks of storedBlock. Its
// chunks and table are of the form that a layer's would have.
func storedFixture(tb testing.TB, seed uint64, size int) (*fixture, *artifact.Device) {
	tb.Helper()
	f := newFixture(tb, seed, size, storedBlock)
	f.blob = f.content
	var sums []byte
	for block := range slices.Chunk(f.content, storedBlock) {
		sum := sha256.Sum256(block)
		sums = append(sums, sum[:]...)
	}
	d, err := artifact.StoredDevice(int64(size), oci.DigestOf(f.content), storedBlock, sums)
	if err != nil {
		tb.Fatal(err)
	}
	return f, d
}

// A file that is a device as it is, is cached as those are whose chunks are
// compressed.
func TestStored(t *testing.T) {
	const size = 40*storedBlock + 100
	f, dev := storedFixture(t, 1, size)
	dir := t.TempDir()
	opts := Options{Dir: dir}
	c := openCache(t, opts)
	var asked atomic.Int64
	src := &source{size: size, open: func(ctx context.Context, off, n int64) (io.ReadCloser, error) {
		asked.Add(1)
		return f.source().ReadRange(ctx, off, n)
	}}
	l, err := c.Acquire(t.Context(), dev, src, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range [][2]int64{{0, 1}, {size - 1, 1}, {storedBlock - 1, 2}, {3 * storedBlock, storedBlock}, {100, 9 * storedBlock}, {size - 50, 1000}} {
		mustRead(t, l, f, r[0], r[1])
	}
	l.Release()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}

	// What was read needs nobody after a restart.
	c = openCache(t, opts)
	l, err = c.Acquire(t.Context(), dev, unreachable(f), nil)
	if err != nil {
		t.Fatal(err)
	}
	mustRead(t, l, f, 100, 9*storedBlock)
	l.Release()
	before := asked.Load()
	if l, err = c.Acquire(t.Context(), dev, src, nil); err != nil {
		t.Fatal(err)
	}
	defer l.Release()
	if err := l.Fill(t.Context()); err != nil || !l.Complete() || asked.Load() == before {
		t.Fatalf("complete: %t, %d requests, %v", l.Complete(), asked.Load(), err)
	}
	mustRead(t, l, f, 0, size)
}

// The same file and the same layer, in the two forms, are two devices in one cache.
func TestStoredBesideCompressed(t *testing.T) {
	const size = 10 * storedBlock
	f, dev := storedFixture(t, 2, size)
	compressed := newFixture(t, 2, size, storedBlock)
	if !bytes.Equal(f.content, compressed.content) || dev.DiffID != compressed.device(t).DiffID || dev.Key == compressed.device(t).Key {
		t.Fatal("the fixtures aren't what the test wants")
	}
	c := openCache(t, Options{})
	l, err := c.Acquire(t.Context(), dev, f.source(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Release()
	mustRead(t, l, f, 0, size)
	other := acquire(t, c, compressed, compressed.source())
	if other.Has(0) {
		t.Error("what came in one form counts as there in the other")
	}
	mustRead(t, other, compressed, 0, size)
	for _, l := range []*Layer{l, other} {
		if err := l.Fill(t.Context()); err != nil || !l.Complete() {
			t.Error(err)
		}
	}
}

// A block that isn't what its sum says is never read, and what is around it is.
func TestStoredAltered(t *testing.T) {
	const size, bad = 20 * storedBlock, 7
	f, dev := storedFixture(t, 3, size)
	altered := bytes.Clone(f.content)
	altered[bad*storedBlock+99] ^= 0x40
	c := openCache(t, Options{ReadAhead: -1})
	l, err := c.Acquire(t.Context(), dev, blob.FromBytes(altered), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Release()
	var ie *IntegrityError
	if err := checkRead(t.Context(), l, f, bad*storedBlock, 10); !errors.As(err, &ie) || ie.Chunk != bad {
		t.Errorf("the altered block: %v", err)
	}
	mustRead(t, l, f, (bad-1)*storedBlock, storedBlock)
	mustRead(t, l, f, (bad+1)*storedBlock, storedBlock)
	if err := l.Fill(t.Context()); err == nil || l.Complete() {
		t.Errorf("filled: %v", err)
	}

	// It heals with the file.
	healed, err := c.Acquire(t.Context(), dev, f.source(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer healed.Release()
	mustRead(t, healed, f, 0, size)
}
