package layer_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"sluice/internal/layer"
)

func gzipped(t testing.TB, data []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func zstded(t testing.TB, data []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(data, nil)
}

func decompress(data []byte) ([]byte, error) {
	r, err := layer.Decompress(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

// noise is content that compresses badly.
func noise(n int) []byte {
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{}).Read(p)
	return p
}

func TestDecompress(t *testing.T) {
	plain := tarOf(t, file("a", 3000), file("b", 100000))
	skippable := append([]byte{0x53, 0x2a, 0x4d, 0x18, 3, 0, 0, 0}, "abc"...)
	tests := map[string]struct{ in, want []byte }{
		"plain":                 {plain, plain},
		"empty":                 {nil, nil},
		"short":                 {[]byte{0x1f}, []byte{0x1f}},
		"gzip":                  {gzipped(t, plain), plain},
		"gzip of members":       {append(gzipped(t, plain[:1000]), gzipped(t, plain[1000:])...), plain},
		"zstd":                  {zstded(t, plain), plain},
		"zstd of frames":        {append(zstded(t, plain[:1000]), zstded(t, plain[1000:])...), plain},
		"zstd after a skipped":  {append(skippable, zstded(t, plain)...), plain},
		"a tar named like gzip": {append([]byte{0x1f, 0x8b, 'x'}, plain...), append([]byte{0x1f, 0x8b, 'x'}, plain...)},
		"a tar named BZh":       {tarOf(t, file("BZh9", 0)), tarOf(t, file("BZh9", 0))},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := decompress(test.in)
			if err != nil || !bytes.Equal(got, test.want) {
				t.Errorf("%d bytes, want %d, error %v", len(got), len(test.want), err)
			}
		})
	}
}

func TestDecompressRefuses(t *testing.T) {
	data := noise(300000)
	gz, zs := gzipped(t, data), zstded(t, data)
	flipped := func(p []byte, at int) []byte {
		p = bytes.Clone(p)
		p[at] ^= 0x10
		return p
	}
	// A frame of a 256 MiB window, single segment off: RFC 8878 section 3.1.1.
	window := append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 18 << 3}, 1, 0, 0)
	tests := map[string]struct {
		in   []byte
		want string
	}{
		"gzip cut":         {gz[:200000], "gzip layer: at compressed offset 200000, decoded offset "},
		"gzip cut in head": {gz[:5], "gzip layer: header: unexpected EOF"},
		"gzip cut in tail": {gz[:len(gz)-4], "gzip layer: at compressed offset"},
		"gzip checksum":    {flipped(gz, len(gz)-6), "gzip layer: at compressed offset"},
		"gzip and garbage": {append(bytes.Clone(gz), "garbage garbage"...), "gzip layer: at compressed offset"},
		"zstd cut":         {zs[:200000], "zstd layer: at compressed offset 200000, decoded offset "},
		"zstd cut in head": {zs[:5], "zstd layer"},
		"zstd checksum":    {flipped(zs, len(zs)-2), "zstd layer: at compressed offset"},
		"zstd window":      {window, "window size exceeded"},
		"xz":               {[]byte("\xfd7zXZ\x00\x00\x04"), "compressed with xz"},
		"bzip2":            {[]byte("BZh91AY&SY"), "compressed with bzip2"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := decompress(test.in)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %q", err, test.want)
			}
			if strings.Contains(name, "cut") && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("error %v is not an unexpected end", err)
			}
		})
	}
}

// TestBombsTakeNoMemory decodes a GiB of zeros from a MiB and from 32 KiB.
func TestBombsTakeNoMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("decodes a GiB twice")
	}
	part := make([]byte, 64<<20)
	for name, p := range map[string][]byte{"gzip": gzipped(t, part), "zstd": zstded(t, part)} {
		t.Run(name, func(t *testing.T) {
			r, err := layer.Decompress(bytes.NewReader(bytes.Repeat(p, 16)))
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			n, err := io.Copy(io.Discard, struct{ io.Reader }{r})
			runtime.ReadMemStats(&after)
			if err != nil || n != 1<<30 {
				t.Errorf("%d bytes, error %v", n, err)
			}
			if used := after.TotalAlloc - before.TotalAlloc; used > 64<<20 {
				t.Errorf("allocated %d bytes", used)
			}
		})
	}
}

// TestReadCompressed: an error of the decoder comes through Read with both
// places in it.
func TestReadCompressed(t *testing.T) {
	gz := gzipped(t, tarOf(t, file("a", 100), file("b", 5000)))
	r, err := layer.Decompress(bytes.NewReader(gz[:100]))
	if err != nil {
		t.Fatal(err)
	}
	_, err = layer.Read(t.Context(), r, layer.Options{})
	if !errors.Is(err, io.ErrUnexpectedEOF) || !strings.Contains(fmt.Sprint(err), "compressed offset 100") || !strings.Contains(fmt.Sprint(err), "layer entry at offset") {
		t.Errorf("error %v", err)
	}
}
