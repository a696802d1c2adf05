package artifact

import (
	"bytes"
	"crypto/sha256"
	"math/rand/v2"
	"os/exec"
	"runtime"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// words returns n bytes that compress somewhat, as files do.
func words(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 2))
	dict := make([][]byte, 500)
	for i := range dict {
		dict[i] = make([]byte, 2+r.IntN(12))
		for j := range dict[i] {
			dict[i][j] = byte(r.Uint32())
		}
	}
	var b []byte
	for len(b) < n {
		b = append(b, dict[int(r.ExpFloat64()*60)%len(dict)]...)
	}
	return b[:n]
}

// frameOf compresses content and returns the chunk that it is.
func frameOf(t testing.TB, content []byte) (Chunk, []byte) {
	t.Helper()
	enc, err := newEncoder()
	if err != nil {
		t.Fatal(err)
	}
	frame := enc.EncodeAll(content, nil)
	return chunkOf(content, frame), frame
}

func chunkOf(content, frame []byte) Chunk {
	return Chunk{Length: uint32(len(content)), BlobLength: uint32(len(frame)), Digest: sha256.Sum256(frame)}
}

func TestChunkDecodesToWhatWasEncoded(t *testing.T) {
	random := make([]byte, MaxChunkLength)
	for i := range random {
		random[i] = byte(rand.Uint32())
	}
	for what, content := range map[string][]byte{
		"one byte": {7}, "zeros": make([]byte, MaxChunkLength), "random": random, "words": words(1, 200_000), "a block": words(2, 128<<10),
	} {
		c, frame := frameOf(t, content)
		if len(frame) > MaxFrameLength {
			t.Errorf("%s: frame has %d bytes", what, len(frame))
		}
		for _, dst := range [][]byte{nil, make([]byte, 3), make([]byte, MaxChunkLength)} {
			got, err := c.Decode(dst, frame)
			if err != nil || !bytes.Equal(got, content) {
				t.Fatalf("%s: %d bytes, %v", what, len(got), err)
			}
			if cap(dst) >= len(content) && &got[0] != &dst[0] {
				t.Errorf("%s: the memory given wasn't used", what)
			}
		}
	}
}

func TestChunkNoticesEveryBit(t *testing.T) {
	c, frame := frameOf(t, words(3, 300))
	for i := range len(frame) * 8 {
		bad := bytes.Clone(frame)
		bad[i/8] ^= 1 << (i % 8)
		if _, err := c.Decode(nil, bad); err == nil {
			t.Fatalf("bit %d is wrong, and nobody noticed", i)
		}
	}
	for i := range frame {
		if _, err := c.Decode(nil, frame[:i]); err == nil {
			t.Fatalf("decoded %d of %d bytes", i, len(frame))
		}
	}
}

// A frame can have the digest that a liar's table says, and still not be a chunk.
func TestChunkBoundsWhatALiarSays(t *testing.T) {
	bombEncoder, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	bomb := bombEncoder.EncodeAll(make([]byte, 256<<20), nil)
	content := words(4, 1000)
	_, frame := frameOf(t, content)
	for what, c := range map[string]struct {
		length uint32
		frame  []byte
	}{
		"too long":   {999, frame},
		"too short":  {1001, frame},
		"no length":  {0, frame},
		"too large":  {MaxChunkLength + 1, frame},
		"bomb":       {MaxChunkLength, bomb},
		"no frame":   {5, nil},
		"no zstd":    {5, []byte("hello")},
		"two frames": {1000, append(bytes.Clone(frame), frame...)},
		"cut":        {1000, frame[:len(frame)-1]},
	} {
		chunk := chunkOf(nil, c.frame)
		chunk.Length = c.length
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		if out, err := chunk.Decode(nil, c.frame); err == nil {
			t.Errorf("%s: decoded to %d bytes", what, len(out))
		}
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > 64*MaxChunkLength {
			t.Errorf("%s: %d bytes were allocated", what, n)
		}
	}
}

// What EncodeAll makes of a chunk must not depend on what the encoder has seen
// before, else blobs would depend on which worker got which chunk.
func TestEncoderForgets(t *testing.T) {
	fresh := func(content []byte) []byte {
		_, frame := frameOf(t, content)
		return frame
	}
	var contents, want [][]byte
	for i := range 40 {
		contents = append(contents, words(uint64(i%30), 1+i*6500))
		want = append(want, fresh(contents[i]))
	}
	enc, err := newEncoder()
	if err != nil {
		t.Fatal(err)
	}
	for range 400 {
		i := rand.IntN(len(contents))
		if got := enc.EncodeAll(contents[i], nil); !bytes.Equal(got, want[i]) {
			t.Fatalf("chunk %d of %d bytes was encoded differently by an encoder that had been used", i, len(contents[i]))
		}
	}
}

func zstdProgram(t *testing.T) string {
	path, err := exec.LookPath("zstd")
	if err != nil {
		t.Skip("the zstd program isn't installed (apt-get install zstd)")
	}
	return path
}

func FuzzChunkDecode(f *testing.F) {
	for _, content := range [][]byte{{1}, words(5, 5000), make([]byte, 100_000)} {
		c, frame := frameOf(f, content)
		f.Add(frame, c.Length)
	}
	f.Fuzz(func(t *testing.T, frame []byte, length uint32) {
		c := chunkOf(nil, frame)
		c.Length = length
		out, err := c.Decode(nil, frame)
		if err == nil && len(out) != int(length) {
			t.Fatalf("decoded to %d bytes instead of %d", len(out), length)
		}
	})
}
