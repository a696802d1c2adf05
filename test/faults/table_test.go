package faults

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"sluice/test/bed"
)

// ranged are the requests for ranges of blobs.
var ranged = []Kind{Metadata, Table, Page, Boot, Layer}

// essential are the requests without whose answer an image can't be mounted.
var essential = []Kind{Token, Manifest, Config, Referrers, Artifact, Metadata, Table}

// requests are all that mounting an image and reading it at once need.
var requests = []Kind{Token, Resolve, Manifest, Config, Referrers, Artifact, Metadata, Table, Boot, Layer}

// happens reports whether a fault can happen to a kind of request.
func (f Fault) happens(k Kind) bool {
	switch {
	case f.Spreads && k == Token:
		return false
	case f.Range:
		return slices.Contains(ranged, k)
	case f.Body:
		return k != Resolve
	}
	return true
}

// usual reports whether a case is among those of every run: all faults to
// layers, whose bytes a container reads; and of the others each with every
// third fault, another third for each.
func usual(i int, k Kind, times int) bool {
	if k == Layer {
		return true
	}
	at := slices.Index(requests, k)
	return times < 0 && (i+at)%4 == 0
}

// TestFaults is the table: each fault happens to each request of the protocol,
// once, and until it is over.
func TestFaults(t *testing.T) {
	s := theStage(t)
	for i, f := range Catalog() {
		t.Run(f.Name, func(t *testing.T) {
			t.Parallel()
			for _, k := range requests {
				if !f.happens(k) {
					continue
				}
				for name, times := range map[string]int{"once": 1, "always": -1} {
					if !everything() && !usual(i, k, times) {
						continue
					}
					t.Run(string(k)+"/"+name, func(t *testing.T) {
						t.Parallel()
						runCase(t, s, f, k, times)
					})
				}
			}
		})
	}
}

// TestPagedTables is the table for chunk tables that come page by page, as those
// of images of several gigabytes do: here all of them.
func TestPagedTables(t *testing.T) {
	s := theStage(t)
	paged := s.with(s.pagedTables(t))
	for i, f := range Catalog() {
		for _, times := range []int{1, -1} {
			if !everything() && (i+max(times, 0))%2 == 0 || !f.happens(Page) {
				continue
			}
			t.Run(fmt.Sprintf("%s/%d", f.Name, times), func(t *testing.T) {
				t.Parallel()
				runCase(t, paged, f, Page, times)
			})
		}
	}
}

// pagedTables builds a sluice for which every chunk table is big: the real
// program with other constants.
func (s *stage) pagedTables(t *testing.T) string {
	t.Helper()
	files := map[string][]byte{}
	for file, size := range map[string]string{"node/mount/fetch.go": "wholeTableSize = 512 << 10", "artifact/table.go": "wholeTable = 512 << 10"} {
		name, err := filepath.Abs(filepath.Join("../../internal", file))
		if err != nil {
			t.Fatal(err)
		}
		source, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(source, []byte(size)) {
			t.Fatalf("%s has no more %q", name, size)
		}
		files[name] = bytes.Replace(source, []byte(size), []byte(strings.Replace(size, "512 << 10", "1", 1)), 1)
	}
	return s.overlaid(t, "sluice-paged", files)
}

// overlaid builds a sluice of which some files are others, by their names.
func (s *stage) overlaid(t *testing.T, name string, files map[string][]byte) string {
	t.Helper()
	dir, replace := t.TempDir(), map[string]string{}
	for file, content := range files {
		replace[file] = filepath.Join(dir, filepath.Base(file))
		if err := os.WriteFile(replace[file], content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	overlay, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "overlay.json"), overlay, 0o600); err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(s.Work, name)
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-overlay", filepath.Join(dir, "overlay.json"), "-o", bin, "./cmd/sluice")
	cmd.Dir, cmd.Env = filepath.Join("..", ".."), append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return bin
}

// maxRequests is how many requests of one kind the readers of one case may cause
// for each second that they wait: each of thirty pieces is asked for by the kernel
// up to three times, and each of these a few times by the node.
const maxRequests = 200 * int(readTimeout/time.Second)

// runCase is the check that is the same for all.
func runCase(t *testing.T, s *stage, f Fault, k Kind, times int) {
	n := s.node(t)
	dir := filepath.Join(n.Dir, "mnt")
	n.proxy.Arm(f, k, times)
	harmless := f.Mild || (k == Resolve || k == Boot) && !f.Spreads ||
		times > 0 && !f.Final && (!f.Stalls || slices.Contains(ranged, k))

	began := time.Now()
	merr := n.mount(t, s.app, dir)
	took := time.Since(began)
	var readErrs []seen
	switch {
	case errors.Is(merr, errHangs):
		t.Fatalf("mounting doesn't end within %v", mountBound)
	case merr != nil && (harmless || !f.Spreads && !slices.Contains(essential, k)):
		t.Errorf("mounting failed after %v, which it should not: %v", took, merr)
	case merr != nil:
		checkReason(t, n, s, f, k, merr)
	default:
		wrong, failed, slowest := s.app.files.readAll(dir, readBound)
		readErrs = failed
		checkReads(t, wrong, failed, slowest)
		if len(failed) > 0 && (harmless || !f.Spreads && k != Layer && k != Page) {
			t.Errorf("%d reads failed, the first, of %s: %v", len(failed), failed[0].name, failed[0].err)
		}
	}
	hits := n.proxy.Disarm()
	if hits > maxRequests && f.Name != "redirect-in-circles" { // each is ten
		t.Errorf("the node made %d requests of this kind: it hammers a registry that is in trouble", hits)
	}
	if hits == 0 {
		t.Fatalf("nothing was tested: no %s request came; there were %v", k, n.proxy.Seen())
	}

	// The fault is gone.
	if merr != nil {
		eventually(t, 2*recheck+mountBound, "mounting after the fault", func() error { return n.mount(t, s.app, dir) })
	}
	if t.Failed() {
		return
	}
	eventually(t, slack, fmt.Sprintf("reading after the fault (when mounting: %v, reads that failed: %d)", merr, len(readErrs)), func() error {
		wrong, failed, slowest := s.app.files.readAll(dir, readBound)
		checkReads(t, wrong, failed, slowest)
		if len(failed) > 0 {
			return fmt.Errorf("%s: %w, and %d more", failed[0].name, failed[0].err, len(failed)-1)
		}
		return nil
	})
	checkClean(t, n, dir)
}

// checkReads holds what must be true of all reads.
func checkReads(t *testing.T, wrong, failed []seen, slowest time.Duration) {
	t.Helper()
	if len(wrong) > 0 {
		t.Errorf("WRONG BYTES in %d files, the first is %s", len(wrong), wrong[0].name)
	}
	for _, f := range failed {
		if errors.Is(f.err, errHangs) {
			t.Errorf("reads hang: no end within %v", readBound)
		} else if !errors.Is(f.err, syscall.EIO) {
			t.Errorf("%s: %v, want EIO", f.name, f.err)
		}
	}
	if slowest > readBound {
		t.Errorf("a read took %v, more than %v", slowest, readBound)
	}
}

// checkReason checks that the reason can be seen, and that it is the right one.
func checkReason(t *testing.T, n *node, s *stage, f Fault, k Kind, err error) {
	t.Helper()
	var r *refusal
	if !errors.As(err, &r) {
		t.Errorf("mounting failed with %v, which is no answer", err)
		return
	}
	if k == Manifest || k == Config || k == Token {
		return // it isn't about streaming: the ordinary pull needs them, too
	}
	if r.Reason == "" {
		t.Errorf("mounting failed without a reason: %s", r.Message)
	}
	reason, message := n.status(t).whyNot(n.ref(s.app))
	if reason == "" {
		t.Errorf("sluice node status has no reason; the error was %v", err)
	}
	if f.Reason != "" && reason != f.Reason {
		t.Errorf("sluice node status says %s (%s), want %s", reason, message, f.Reason)
	}
}

// checkClean unmounts and looks for what is left.
func checkClean(t *testing.T, n *node, dir string) {
	t.Helper()
	// A process that another test starts has our files for a moment, and so
	// the mount is busy.
	eventually(t, slack, "umount", func() error { return n.umount(t, dir) })
	left, err := bed.Mounts(filepath.Dir(dir))
	if err != nil {
		t.Fatal(err)
	}
	if slices.Contains(left, dir) {
		t.Errorf("%s is still mounted", dir)
	}
	eventually(t, slack, "the end of all requests", func() error {
		if a := n.proxy.Active(); a > 0 {
			return fmt.Errorf("%d requests are under way", a)
		}
		return nil
	})
	eventually(t, slack, "the removal of temporary files", func() error {
		if l := leftovers(n.Dir); len(l) > 0 {
			return fmt.Errorf("%d are left: %s", len(l), strings.Join(l, ", "))
		}
		return nil
	})
}
