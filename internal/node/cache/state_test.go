package cache

import (
	"bytes"
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"sluice/oci"
)

func testShape(n int) shape {
	return shape{key: oci.DigestOf([]byte{byte(n)}), size: int64(n) * 1024, length: int64(n)*1024 - 5, count: n}
}

func TestStateRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := testShape(rapid.IntRange(1, 200).Draw(t, "chunks"))
		file := s.emptyState()
		want := map[int]uint32{}
		for _, i := range rapid.SliceOfDistinct(rapid.IntRange(0, s.count-1), rapid.ID).Draw(t, "present") {
			want[i] = rapid.Uint32().Draw(t, "crc")
			e := s.entry(i, want[i])
			copy(file[stateHeaderSize+i*stateEntrySize:], e[:])
		}
		got, damaged, err := s.parse(file)
		if err != nil || damaged != 0 || len(got) != len(want) {
			t.Fatalf("%d of %d chunks, %d damaged, error %v", len(got), len(want), damaged, err)
		}
		for _, r := range got {
			if crc, ok := want[r.chunk]; !ok || crc != r.crc {
				t.Fatalf("chunk %d has CRC %x, want %x (%v)", r.chunk, r.crc, crc, ok)
			}
		}
		// Any one byte damaged costs one chunk or the file, and invents none.
		at := rapid.IntRange(0, len(file)-1).Draw(t, "at")
		file[at] ^= byte(rapid.IntRange(1, 255).Draw(t, "flip"))
		got, damaged, err = s.parse(file)
		if err == nil && (damaged > 1 || at < stateHeaderSize) {
			t.Fatalf("damaged byte %d: %d damaged entries, no error", at, damaged)
		}
		for _, r := range got {
			if crc, ok := want[r.chunk]; !ok || crc != r.crc {
				t.Fatalf("damaged byte %d made chunk %d present", at, r.chunk)
			}
		}
	})
}

func TestStateOfAnother(t *testing.T) {
	s := testShape(10)
	for name, other := range map[string]shape{
		"key":    {key: oci.DigestOf([]byte("x")), size: s.size, length: s.length, count: s.count},
		"size":   {key: s.key, size: s.size + 512, length: s.length, count: s.count},
		"length": {key: s.key, size: s.size, length: s.length + 1, count: s.count},
		"count":  {key: s.key, size: s.size, length: s.length, count: s.count + 1},
	} {
		if _, _, err := s.parse(other.emptyState()); err == nil {
			t.Errorf("accepted the state of a layer with another %s", name)
		}
	}
}

func FuzzState(f *testing.F) {
	s := testShape(20)
	file := s.emptyState()
	f.Add(bytes.Clone(file))
	for i := range 10 {
		e := s.entry(i, uint32(i)*0x1234567)
		copy(file[stateHeaderSize+i*stateEntrySize:], e[:])
	}
	f.Add(bytes.Clone(file))
	f.Add(file[:100])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		present, damaged, err := s.parse(b)
		if err != nil {
			if len(present) > 0 {
				t.Fatal("an error, and chunks all the same")
			}
			return
		}
		// What it says is present, written again, is in the file.
		zero := [stateEntrySize]byte{}
		known := map[int]bool{}
		for _, r := range present {
			e := s.entry(r.chunk, r.crc)
			if known[r.chunk] || !bytes.Equal(b[stateHeaderSize+r.chunk*stateEntrySize:][:stateEntrySize], e[:]) {
				t.Fatalf("chunk %d was read from something else", r.chunk)
			}
			known[r.chunk] = true
		}
		for i := range s.count {
			if e := b[stateHeaderSize+i*stateEntrySize:][:stateEntrySize]; !known[i] && !bytes.Equal(e, zero[:]) {
				damaged--
			}
		}
		if damaged != 0 {
			t.Fatal(fmt.Sprint("entries are neither present, absent nor damaged: ", damaged))
		}
	})
}
