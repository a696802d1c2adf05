package faults

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sluice/oci"
	"sluice/test/bed"
)

// truth is every regular file of an image, by absolute path.
type truth map[string][]byte

// probe is the image's program.
const probe = "/bin/probe"

// layers are the image's: what each adds. An empty file is a whiteout.
func layers(program []byte, seed uint64) []truth {
	rng := rand.New(rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}))
	random := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		return b
	}
	words := bytes.Repeat([]byte("the quick brown fox jumps over the lazy dog\n"), 10_000)
	return []truth{
		{probe: program},
		{"/data/a/big": random(900_000), "/data/a/page": random(4096), "/data/a/odd": random(70_001), "/data/a/replaced": random(5000), "/data/a/.wh.never": nil},
		{"/data/b/text": words, "/data/b/one": random(1), "/data/b/gone": random(3000)},
		{"/data/a/replaced": random(6000), "/data/b/.wh.gone": nil, "/data/c/last": random(300_000)},
	}
}

// merge is what a container sees of layers.
func merge(layers []truth) truth {
	all := make(truth)
	for _, l := range layers {
		for name, content := range l {
			if dir, base := filepath.Split(name); strings.HasPrefix(base, ".wh.") {
				delete(all, filepath.Join(dir, strings.TrimPrefix(base, ".wh.")))
			} else {
				all[name] = content
			}
		}
	}
	return all
}

// writeTar writes a layer.
func writeTar(name string, l truth) error {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	dirs := make(map[string]bool)
	made := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	for _, file := range slices.Sorted(func(yield func(string) bool) {
		for n := range l {
			if !yield(n) {
				return
			}
		}
	}) {
		for i, c := range file {
			if dir := file[:i]; c == '/' && i > 0 && !dirs[dir] {
				dirs[dir] = true
				if err := w.WriteHeader(&tar.Header{Name: dir[1:] + "/", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: made}); err != nil {
					return err
				}
			}
		}
		h := &tar.Header{Name: file[1:], Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(l[file])), ModTime: made}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if _, err := w.Write(l[file]); err != nil {
			return err
		}
	}
	return errors.Join(w.Close(), os.WriteFile(name, b.Bytes(), 0o600))
}

// image is an image in the registry with its streaming artifact.
type image struct {
	name  string // repository:tag
	files truth
	kinds map[oci.Digest]Kind
}

// pushImage makes an image, pushes it and has it converted. Images of different
// seeds have only the program in common.
func (s *stage) pushImage(ctx context.Context, program []byte, name string, seed uint64, convert bool) (*image, error) {
	dir, err := os.MkdirTemp(s.Work, "image-")
	if err != nil {
		return nil, err
	}
	all := layers(program, seed)
	var tars []string
	for i, l := range all {
		file := filepath.Join(dir, fmt.Sprintf("%d.tar", i))
		if err := writeTar(file, l); err != nil {
			return nil, err
		}
		tars = append(tars, file)
	}
	if err := bed.WriteLayout(filepath.Join(dir, "layout"), []string{probe, "/data"}, tars); err != nil {
		return nil, err
	}
	if err := s.Push(ctx, filepath.Join(dir, "layout"), name); err != nil {
		return nil, err
	}
	img := &image{name: name, files: merge(all)}
	if !convert {
		return img, nil
	}
	if err := s.Convert(ctx, s.Ref(name)); err != nil {
		return nil, err
	}
	img.kinds, err = s.kinds(ctx, name)
	return img, err
}

// kinds finds out what the blobs of an image and its artifact are.
func (s *stage) kinds(ctx context.Context, name string) (map[oci.Digest]Kind, error) {
	repo, tag, _ := strings.Cut(name, ":")
	var original, made oci.ImageManifest
	var referrers oci.Index
	digest, err := s.get(ctx, "/v2/"+repo+"/manifests/"+tag, &original)
	if err != nil {
		return nil, err
	}
	if _, err := s.get(ctx, "/v2/"+repo+"/referrers/"+digest, &referrers); err != nil {
		return nil, err
	}
	if len(referrers.Manifests) != 1 {
		return nil, fmt.Errorf("%s has %d referrers, want one", name, len(referrers.Manifests))
	}
	id := referrers.Manifests[0].Digest
	if _, err := s.get(ctx, "/v2/"+repo+"/manifests/"+id.String(), &made); err != nil {
		return nil, err
	}
	kinds := map[oci.Digest]Kind{id: Artifact, original.Config.Digest: Config}
	for _, l := range original.Layers {
		kinds[l.Digest] = Original
	}
	small := 0
	for _, l := range made.Layers {
		switch {
		case l.MediaType == oci.MediaTypeLayerZstd:
			kinds[l.Digest] = Layer
		case small == 0:
			kinds[l.Digest] = Metadata
		case small == 1:
			kinds[l.Digest] = Table
		case small == 2:
			kinds[l.Digest] = Boot
		default:
			kinds[l.Digest] = LayerMetadata
		}
		if l.MediaType != oci.MediaTypeLayerZstd {
			small++
		}
	}
	return kinds, nil
}

// get fetches JSON from the registry itself and returns its digest.
func (s *stage) get(ctx context.Context, path string, v any) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.Registry.Addr+path, nil)
	if err != nil {
		return "", err
	}
	req.Header.Set("Accept", oci.MediaTypeImageManifest+", "+oci.MediaTypeIndex)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("GET %s: %s", path, resp.Status)
	}
	return oci.DigestOf(b).String(), json.Unmarshal(b, v)
}

// seen is what reading a file gave.
type seen struct {
	name string
	err  error
	took time.Duration
}

// piece is how much is read at a time: what a system call returns within the
// bound must not be more than the kernel asks the plane for at once.
const piece = 64 << 10

// readAll reads all files of the image beneath dir, all pieces at the same time,
// and returns what isn't right, by kind: bytes that are wrong, and errors. What
// isn't read within bound is an error too.
func (t truth) readAll(dir string, bound time.Duration) (wrong, failed []seen, slowest time.Duration) {
	results := make(chan seen)
	ended := make(chan struct{})
	defer close(ended)
	n := 0
	for name, want := range t {
		for off := 0; off < len(want); off += piece {
			n++
			go func() { // ends when the kernel answers, or with the test's process
				began := time.Now()
				err := readPiece(filepath.Join(dir, name), want[off:min(off+piece, len(want))], int64(off))
				select {
				case results <- seen{fmt.Sprintf("%s at %d", name, off), err, time.Since(began)}:
				case <-ended:
				}
			}()
		}
	}
	timeout := time.After(bound)
	for range n {
		select {
		case s := <-results:
			slowest = max(slowest, s.took)
			switch {
			case errors.Is(s.err, errWrong):
				wrong = append(wrong, s)
			case s.err != nil:
				failed = append(failed, s)
			}
		case <-timeout:
			return wrong, append(failed, seen{"something", errHangs, bound}), bound
		}
	}
	return wrong, failed, slowest
}

// readPiece compares what is in a file with what should be.
func readPiece(name string, want []byte, off int64) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	got := make([]byte, len(want))
	if n, err := f.ReadAt(got, off); err != nil {
		if !bytes.Equal(got[:n], want[:n]) {
			return errWrong
		}
		return err
	}
	if !bytes.Equal(got, want) {
		return errWrong
	}
	return nil
}

var (
	errWrong = errors.New("wrong bytes")
	errHangs = errors.New("no answer within the bound")
)

// listing is what the probe prints of the files beneath /data.
func (t truth) listing() string {
	var b strings.Builder
	names := make([]string, 0, len(t))
	for name := range t {
		if strings.HasPrefix(name, "/data/") {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	b.WriteString("probe\n")
	for _, name := range names {
		fmt.Fprintf(&b, "%s %x\n", name, sha256.Sum256(t[name]))
	}
	return b.String()
}

// leftovers lists files beneath dir whose names say that they are temporary.
func leftovers(dir string) []string {
	var all []string
	_ = filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil // it vanished, which is what we want
		}
		if d.IsDir() && filepath.Base(filepath.Dir(name)) == "m" {
			return fs.SkipDir // mounted images
		}
		base := d.Name()
		if strings.HasPrefix(base, ".tmp") || strings.HasPrefix(base, "new-") || strings.HasSuffix(base, ".tmp") {
			all = append(all, name)
		}
		return nil
	})
	return all
}
