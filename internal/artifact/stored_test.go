package artifact

import (
	"bytes"
	"crypto/sha256"
	"math"
	"slices"
	"testing"

	"sluice/oci"
)

// sumsOf returns the SHA-256 of each block of content.
func sumsOf(content []byte, blockSize int) (sums []byte) {
	for block := range slices.Chunk(content, blockSize) {
		sum := sha256.Sum256(block)
		sums = append(sums, sum[:]...)
	}
	return sums
}

func TestStoredDevice(t *testing.T) {
	for size, blockSize := range map[int]int{
		1: 4096, 511: 4096, 512: 512, 4096: 4096, 4097: 4096, 3*MaxChunkLength + 5: MaxChunkLength,
		(ChunksPerPage+1)*512 + 1: 512, // more than a page
	} {
		content := words(uint64(size), size)
		d, err := StoredDevice(int64(size), oci.DigestOf(content), int64(blockSize), sumsOf(content, blockSize))
		if err != nil {
			t.Fatal(err)
		}
		if d.DiffID != oci.DigestOf(content) || d.Blob.Digest != d.DiffID || d.Blob.Size != int64(size) ||
			d.ContentSize != int64(size) || d.Size != deviceSize(int64(size)) || !d.Loaded() {
			t.Errorf("%d bytes: %+v", size, d)
		}
		var got []byte
		for i := range d.Chunks {
			c, err := d.Chunk(t.Context(), i)
			if err != nil {
				t.Fatal(err)
			}
			for _, off := range []int64{c.Offset, c.Offset + int64(c.Length) - 1} {
				if n, err := d.Find(t.Context(), off); err != nil || n != i {
					t.Errorf("%d bytes: offset %d is in chunk %d, not %d: %v", size, off, n, i, err)
				}
			}
			frame := content[c.BlobOffset:][:c.BlobLength]
			b, err := c.Decode(nil, frame)
			if err != nil || len(b) != int(c.Length) || c.Offset != int64(len(got)) {
				t.Fatalf("%d bytes: chunk %d, %+v: %v", size, i, c, err)
			}
			got = append(got, b...)
			bad := slices.Clone(frame)
			bad[len(bad)/2] ^= 1
			if _, err := c.Decode(nil, bad); err == nil {
				t.Errorf("%d bytes: chunk %d decodes although it was altered", size, i)
			}
			if _, err := c.Decode(nil, frame[:len(frame)-1]); err == nil {
				t.Errorf("%d bytes: chunk %d decodes although it was cut", size, i)
			}
		}
		if !bytes.Equal(got, content) {
			t.Errorf("%d bytes: the chunks aren't the content", size)
		}
	}
}

// A stored chunk is handed out in the reader's memory, not in the frame's, which is
// used again.
func TestStoredChunkIsCopied(t *testing.T) {
	frame := words(1, 1000)
	c := chunkOf(frame, frame)
	c.Stored = true
	dst := make([]byte, MaxChunkLength)
	got, err := c.Decode(dst, frame)
	if err != nil || &got[0] != &dst[0] || &got[0] == &frame[0] {
		t.Fatalf("%v", err)
	}
	if allocs := testing.AllocsPerRun(1000, func() { _, _ = c.Decode(dst, frame) }); allocs > 0 {
		t.Errorf("%v allocations", allocs)
	}
	c.Length++
	if _, err := c.Decode(dst, frame); err == nil {
		t.Error("a stored chunk that is longer than its frame")
	}
}

func TestStoredDeviceKey(t *testing.T) {
	content := words(1, 8192)
	key := func(size int64, digest oci.Digest, blockSize int, sums []byte) oci.Digest {
		d, err := StoredDevice(size, digest, int64(blockSize), sums)
		if err != nil {
			t.Fatal(err)
		}
		return d.Key
	}
	digest, sums := oci.DigestOf(content), sumsOf(content, 4096)
	want := key(8192, digest, 4096, sums)
	if got := key(8192, digest, 4096, sums); got != want {
		t.Errorf("%s, and then %s", want, got)
	}
	other := slices.Clone(sums)
	other[40] ^= 1
	for what, got := range map[string]oci.Digest{
		"another size":   key(8191, digest, 4096, sums),
		"another digest": key(8192, oci.DigestOf(nil), 4096, sums),
		"another sum":    key(8192, digest, 4096, other),
		"another form":   key(8192, digest, 8192, sumsOf(content, 8192)),
		"other blocks":   key(8192, digest, 4608, sums),
	} {
		if got == want {
			t.Errorf("%s has the same key", what)
		}
	}
}

func TestStoredDeviceRefuses(t *testing.T) {
	sums := make([]byte, 2*sha256.Size)
	digest := oci.DigestOf(nil)
	for what, c := range map[string]struct {
		size      int64
		digest    oci.Digest
		blockSize int64
		sums      []byte
	}{
		"nothing":                 {0, digest, 4096, nil},
		"a negative size":         {-1, digest, 4096, sums},
		"a size beyond all":       {math.MaxInt64, digest, 4096, sums},
		"more chunks than may be": {MaxChunks*512 + 1, digest, 512, sums},
		"no block size":           {8192, digest, 0, sums},
		"a negative block size":   {8192, digest, -4096, sums},
		"blocks too large":        {8192, digest, MaxChunkLength + 512, sums},
		"blocks beyond all":       {8192, digest, math.MaxInt64 &^ 511, sums},
		"odd blocks":              {8192, digest, 4097, sums},
		"no sums":                 {8192, digest, 4096, nil},
		"sums too short":          {8192, digest, 4096, sums[:63]},
		"sums too long":           {8192, digest, 4096, make([]byte, 3*sha256.Size)},
		"a sum too few":           {8193, digest, 4096, sums},
		"no digest":               {8192, "", 4096, sums},
		"another hash":            {8192, oci.SHA512.FromBytes(nil), 4096, sums},
		"a digest that isn't one": {8192, "sha256:../../etc/passwd", 4096, sums},
	} {
		if d, err := StoredDevice(c.size, c.digest, c.blockSize, c.sums); err == nil {
			t.Errorf("%s: %+v", what, d)
		}
	}
	if _, err := StoredDevice(8192, digest, 4096, sums); err != nil {
		t.Error(err)
	}
}

func FuzzStoredDevice(f *testing.F) {
	f.Add(int64(8192), int64(4096), []byte("x"), 64)
	f.Add(int64(math.MaxInt64), int64(512), []byte("x"), 0)
	f.Fuzz(func(t *testing.T, size, blockSize int64, of []byte, sums int) {
		d, err := StoredDevice(size, oci.DigestOf(of), blockSize, make([]byte, max(0, min(sums, 1<<20))))
		if err != nil {
			return
		}
		for _, i := range []int{0, d.Chunks / 2, d.Chunks - 1} {
			c, err := d.Chunk(t.Context(), i)
			if err != nil || c.Length == 0 || c.Offset+int64(c.Length) > size || c.Length != c.BlobLength || c.Offset != c.BlobOffset {
				t.Fatalf("chunk %d of %d: %+v, %v", i, d.Chunks, c, err)
			}
		}
	})
}
