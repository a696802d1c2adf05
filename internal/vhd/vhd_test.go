package vhd

import (
	"bytes"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"sluice/oci"
)

var layerDigest = oci.DigestOf([]byte("a layer"))

// disk is a fixed VHD of at least n bytes.
func disk(t testing.TB, n int64) []byte {
	t.Helper()
	f := Footer{Size: Capacity(n), ID: ID(layerDigest)}
	sector, err := f.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return append(make([]byte, f.Size), sector...)
}

func TestCapacityIsWhatTheGeometrySays(t *testing.T) {
	sizes := []int64{0, 1, 511, 512, 513, 68 * 512, 68*512 + 1, 1 << 20, 16 << 30, 100 << 30, maxGeometry * 512, maxGeometry*512 - 1}
	for _, border := range []int64{longTracks * 512, 1024 * 4 * 17 * 512, 1024 * 16 * 17 * 512, 1024 * 16 * 31 * 512} {
		sizes = append(sizes, border-512, border, border+512)
	}
	r := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		sizes = append(sizes, r.Int64N(1<<(10+r.IntN(27))))
	}
	for _, n := range sizes {
		c := Capacity(n)
		g := geometryOf(c / SectorSize)
		if c < n || c-n > 16*255*512+SectorSize || c%SectorSize != 0 || g.total()*SectorSize != c {
			t.Errorf("for %d bytes: a disk of %d, geometry %+v", n, c, g)
		}
		if g.cylinders > maxCylinders || g.heads > 16 || g.sectors > 255 || Capacity(c) != c {
			t.Errorf("for %d bytes: geometry %+v", n, g)
		}
	}
	if n := int64(200<<30 + 1); Capacity(n) != 200<<30+512 {
		t.Errorf("beyond geometries, %d bytes take %d", n, Capacity(n))
	}
}

func TestFooter(t *testing.T) {
	file := disk(t, 100_000)
	f, err := Read(bytes.NewReader(file), int64(len(file)))
	if err != nil || f.Size != int64(len(file)-512) || f.ID != ID(layerDigest) {
		t.Errorf("%+v, %v", f, err)
	}
	if f.ID[6]>>4 != 8 || f.ID[8]>>6 != 2 {
		t.Errorf("%x is no UUID of version 8", f.ID)
	}
	if ID(oci.DigestOf(nil)) == f.ID {
		t.Error("two layers have the same ID")
	}
	if !bytes.Equal(file, disk(t, 100_000)) {
		t.Error("the same layer gave two disks")
	}
	if _, err := (Footer{Size: f.Size + 512}).Encode(); err == nil {
		t.Error("a footer for a disk whose geometry says another size")
	}
}

// Whatever bit of a footer changes, or how much of a file is missing, it is
// noticed.
func TestDamageIsNoticed(t *testing.T) {
	file := disk(t, 5000)
	sector := file[len(file)-512:]
	for i := range sector {
		for bit := range 8 {
			sector[i] ^= 1 << bit
			if f, err := Parse(sector); !errors.Is(err, ErrInvalid) {
				t.Errorf("byte %d, bit %d: %+v, %v", i, bit, f, err)
			}
			sector[i] ^= 1 << bit
		}
	}
	for _, n := range []int{0, 1, 511, 512, 1023, 1024, len(file) - 512, len(file) - 1} {
		if _, err := Read(bytes.NewReader(file[:n]), int64(n)); !errors.Is(err, ErrInvalid) {
			t.Errorf("%d of %d bytes: %v", n, len(file), err)
		}
	}
	shorter := append(bytes.Clone(file[512:len(file)-512]), sector...)
	if _, err := Read(bytes.NewReader(shorter), int64(len(shorter))); !errors.Is(err, ErrInvalid) {
		t.Errorf("a sector of the disk is missing: %v", err)
	}
	if _, err := Read(bytes.NewReader(file[:1024]), int64(len(file))); err == nil || errors.Is(err, ErrInvalid) {
		t.Errorf("the file can't be read to its end: %v", err)
	}
}

// QEMU's reader finds the disk as large as it is, and its writer makes footers that
// ours understands.
func TestQEMUAgrees(t *testing.T) {
	qemu, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Skip("SKIPPED: there is no qemu-img (Debian: qemu-utils)")
	}
	dir := t.TempDir()
	for _, n := range []int64{1, 1 << 20, 600 << 20, 5 << 30, 40 << 30} {
		f := Footer{Size: Capacity(n), ID: ID(layerDigest)}
		sector, err := f.Encode()
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Join(dir, "our.vhd")
		file, err := os.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		_, err = file.WriteAt(sector, f.Size)
		if err := errors.Join(err, file.Close()); err != nil {
			t.Fatal(err)
		}
		// Without -f, it looks at a file's beginning only, which has no footer.
		out, err := exec.CommandContext(t.Context(), qemu, "info", "-f", "vpc", "--output=json", name).CombinedOutput()
		var info struct {
			Format      string `json:"format"`
			VirtualSize int64  `json:"virtual-size"`
		}
		if err == nil {
			err = json.Unmarshal(out, &info)
		}
		if err != nil || info.Format != "vpc" || info.VirtualSize != f.Size {
			t.Errorf("a disk of %d bytes: %+v, %v\n%s", f.Size, info, err, out)
		}
	}
	name := filepath.Join(dir, "theirs.vhd")
	if out, err := exec.CommandContext(t.Context(), qemu, "create", "-f", "vpc", "-o", "subformat=fixed", name, "10M").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	file, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		t.Fatal(err)
	}
	f, err := Read(file, info.Size())
	if err != nil || f.Size < 10<<20 || f.Size != Capacity(10<<20) {
		t.Errorf("QEMU's disk of at least 10 MiB: %+v, %v; ours would have %d bytes", f, err, Capacity(10<<20))
	}
}

func FuzzParse(f *testing.F) {
	sector, err := Footer{Size: Capacity(1 << 20), ID: ID(layerDigest)}.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sector)
	f.Add(sector[:100])
	f.Add(make([]byte, FooterSize))
	f.Fuzz(func(t *testing.T, sector []byte) {
		footer, err := Parse(sector)
		if err != nil {
			if !errors.Is(err, ErrInvalid) || footer != (Footer{}) {
				t.Errorf("%+v, %v", footer, err)
			}
			return
		}
		if footer.Size <= 0 || footer.Size > MaxSize || footer.Size%SectorSize != 0 {
			t.Errorf("a disk of %d bytes was accepted", footer.Size)
		}
		again, err := footer.Encode()
		if err != nil {
			return // a disk of others, who believe the footer and not the geometry
		}
		if got, err := Parse(again); err != nil || got != footer {
			t.Errorf("%+v became %+v, %v", footer, got, err)
		}
	})
}
