package registry_test

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"

	"sluice/internal/index"
	"sluice/internal/registry"
	"sluice/internal/stored"
	"sluice/oci"
)

// sink takes a response, at no cost.
type sink struct {
	header http.Header
	status int
	n      int64
}

func (s *sink) Header() http.Header         { return s.header }
func (s *sink) WriteHeader(status int)      { s.status = status }
func (s *sink) Write(p []byte) (int, error) { s.n += int64(len(p)); return len(p), nil }

// ReadFrom is what a socket does, without the bytes.
func (s *sink) ReadFrom(r io.Reader) (int64, error) {
	if l, ok := r.(*io.LimitedReader); ok {
		n := min(l.N, 128<<10)
		l.N -= n
		s.n += n
		return n, nil
	}
	return io.Copy(struct{ io.Writer }{s}, r)
}

// BenchmarkRange is what we add to a range of 128 KiB: everything but the server
// and the kernel that moves the bytes.
func BenchmarkRange(b *testing.B) {
	const blobSize, rangeSize = 64 << 20, 128 << 10
	db, err := index.Open(b.Context(), index.Options{URL: "sqlite::memory:"})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { db.Close() })
	reg := stored.New(openLocal(b, b.TempDir()), db, stored.Options{})
	content := bytes.Repeat([]byte("0123456789abcdef"), blobSize/16)
	desc := oci.Descriptor{Digest: oci.DigestOf(content), Size: blobSize}
	if _, err := reg.PushBlob(b.Context(), "team/app", desc, bytes.NewReader(content)); err != nil {
		b.Fatal(err)
	}
	for name, front := range map[string]registry.FrontOptions{
		"plain": {},
		"all":   {Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Metrics: registry.NewMetrics(), Limits: registry.Limits{Reads: 1 << 30}},
	} {
		b.Run(name, func(b *testing.B) {
			handler := registry.Wrap(registry.NewHandler(reg, registry.Options{}), front)
			r := httptest.NewRequest(http.MethodGet, "/v2/team/app/blobs/"+desc.Digest.String(), nil)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				at := i * rangeSize % blobSize
				r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", at, at+rangeSize-1))
				w := &sink{header: http.Header{}}
				handler.ServeHTTP(w, r)
				if w.status != http.StatusPartialContent || w.n != rangeSize {
					b.Fatalf("status %d, %d bytes", w.status, w.n)
				}
			}
		})
	}
}
