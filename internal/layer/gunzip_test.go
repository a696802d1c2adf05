package layer_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"sluice/internal/layer"
)

// decoders returns every gunzip of this machine.
func decoders(t *testing.T) map[string]layer.Gunzip {
	t.Helper()
	found := map[string]layer.Gunzip{"go": {}}
	for _, name := range []string{"igzip", "unpigz"} {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Logf("%s isn't installed", name)
			continue
		}
		dir := t.TempDir()
		if err := os.Symlink(path, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		found[name] = only(t, dir)
	}
	return found
}

// only returns the gunzip that is found if PATH is a directory.
func only(t *testing.T, dir string) layer.Gunzip {
	t.Helper()
	before := os.Getenv("PATH")
	defer os.Setenv("PATH", before)
	os.Setenv("PATH", dir)
	return layer.FindGunzip()
}

// script returns the gunzip that a shell script pretends to be.
func script(t *testing.T, text string) layer.Gunzip {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "igzip"), []byte("#!/bin/sh\nPATH=/usr/bin:/bin\n"+text), 0o755); err != nil {
		t.Fatal(err)
	}
	return only(t, dir)
}

func gunzip(ctx context.Context, g layer.Gunzip, r io.Reader) ([]byte, error) {
	d, err := g.Decompress(ctx, r)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return io.ReadAll(d)
}

// Whatever decodes: what a file holds is the same, and what is wrong with one
// is noticed.
func TestGunzipsAgree(t *testing.T) {
	data := append(noise(300_000), bytes.Repeat([]byte("again and "), 100_000)...)
	gz := gzipped(t, data)
	checksum := bytes.Clone(gz)
	checksum[len(gz)-6] ^= 1
	for name, g := range decoders(t) {
		t.Run(name, func(t *testing.T) {
			if g.String() != name {
				t.Errorf("it is named %s", g)
			}
			for what, in := range map[string][]byte{"one member": gz, "two members": append(gzipped(t, data[:9]), gzipped(t, data[9:])...), "no gzip": data} {
				if got, err := gunzip(t.Context(), g, bytes.NewReader(in)); err != nil || !bytes.Equal(got, data) {
					t.Errorf("%s: %d bytes, want %d, error %v", what, len(got), len(data), err)
				}
			}
			for what, in := range map[string][]byte{"cut": gz[:len(gz)/2], "cut in the tail": gz[:len(gz)-4], "checksum": checksum} {
				if got, err := gunzip(t.Context(), g, bytes.NewReader(in)); err == nil {
					t.Errorf("%s: %d bytes and no error", what, len(got))
				}
			}
			lost := errors.New("the line is dead")
			in := io.MultiReader(bytes.NewReader(gz[:len(gz)/2]), iotest.ErrReader(lost))
			if _, err := gunzip(t.Context(), g, in); !errors.Is(err, lost) {
				t.Errorf("the input's error became %v", err)
			}
		})
	}
}

func TestGunzipThatIsNoGunzip(t *testing.T) {
	gz := gzipped(t, noise(1<<20))
	for text, want := range map[string]string{
		"head -c 10 >/dev/null; echo all well":    "stopped before the end of its input",
		"cat >/dev/null; echo no >&2; exit 3":     `exit status 3 (it says "no")`,
		"cat >/dev/null; kill -9 $$":              "signal: killed",
		"cat >/dev/null; yes no | head -c 1M >&2": "", // it talks, and that's all
	} {
		_, err := gunzip(t.Context(), script(t, text), bytes.NewReader(gz))
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: error %v, want %q", text, err, want)
		}
	}
	if err := os.WriteFile(filepath.Join(t.TempDir(), "igzip"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if g := only(t, t.TempDir()); g != (layer.Gunzip{}) {
		t.Errorf("in an empty directory it found %s", g)
	}
}

// Giving up, by the context or by Close, ends the program.
func TestGunzipEndsWithItsCaller(t *testing.T) {
	gz := gzipped(t, noise(8<<20))
	ctx, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	d, err := script(t, "exec sleep 600").Decompress(ctx, bytes.NewReader(gz))
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(50*time.Millisecond, func() { cancel(enough) })
	start := time.Now()
	if _, err := io.ReadAll(d); !errors.Is(err, enough) {
		t.Errorf("canceled: %v", err)
	}
	d.Close()
	for name, g := range decoders(t) {
		d, err := g.Decompress(t.Context(), bytes.NewReader(gz))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(d, make([]byte, 1000)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := d.Close(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if took := time.Since(start); took > 5*time.Minute {
		t.Errorf("it took %v", took)
	}
}
