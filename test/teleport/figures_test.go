package teleport

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice/internal/acr"
	"sluice/internal/remote"
	"sluice/internal/teleport/mountapi"
	"sluice/oci"
	"sluice/test/bed"
)

// maxMemory bounds what the registry takes while it expands, in MB.
const maxMemory = 150

// TestExpansionFigures says how fast a registry expands a Debian of 600 MB in one
// layer and in 28, in how much memory, and how that compares with converting it.
func TestExpansionFigures(t *testing.T) {
	ctx := t.Context()
	src, err := filepath.Abs("../..")
	must(t, err)
	tools, err := bed.BuildTools(ctx, src, func(s string) { t.Log(s) })
	must(t, err)
	images, err := bed.Debian(ctx, func(s string) { t.Log(s) })
	if err != nil {
		t.Skip(err)
	}
	sluice, err := bed.BuildSluice(ctx, src, t.TempDir())
	must(t, err)
	for tag, layout := range map[string]string{"1": images.OneLayer, "28": images.ManyLayers} {
		reg, err := bed.StartRegistry(ctx, sluice, t.TempDir(), append(bed.TeleportServer("files.example.com"), "SLUICE_REGISTRY_LOG_LEVEL=warn")...)
		must(t, err)
		t.Cleanup(reg.Stop)
		must(t, reg.Push(ctx, tools, layout, "debian:"+tag))
		expansionFigures(t, reg, tag)
	}
}

// expansionFigures expands and converts an image of the repository debian.
func expansionFigures(t *testing.T, reg *bed.Registry, tag string) {
	t.Helper()
	const repo = "debian"
	ctx := t.Context()
	client, err := remote.New(reg.Addr, remote.Options{})
	must(t, err)
	manage, err := acr.NewClient(reg.Addr, remote.Options{})
	must(t, err)
	on := true
	_, err = manage.UpdateRepository(ctx, repo, acr.AttributeChanges{TeleportEnabled: &on})
	must(t, err)
	image, err := manage.Tag(ctx, repo, tag)
	must(t, err)
	// measure does something with the image that takes long, and returns how long.
	measure := func(begin func(*acr.Client, context.Context, string, oci.Digest) (acr.Operation, error)) (seconds float64, peak int) {
		t.Helper()
		must(t, os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", reg.Pid()), []byte("5"), 0o200)) // forgets the peak
		start := time.Now()
		op, err := begin(manage, ctx, repo, image.Digest)
		for err == nil && !op.Status.Final() {
			time.Sleep(20 * time.Millisecond)
			op, err = manage.ImageOperation(ctx, repo, op.ID)
		}
		seconds = time.Since(start).Seconds()
		if err != nil || op.Status != acr.StatusSucceeded {
			t.Fatalf("%+v, %v", op, err)
		}
		return seconds, peakMemory(t, reg.Pid())
	}
	expansion, expanding := measure((*acr.Client).StartExpansion)
	conversion, converting := measure((*acr.Client).StartStreaming)
	m, err := mountapi.Get(ctx, client, mountapi.Query{Repository: repo, Reference: tag})
	must(t, err)
	size := 0.0
	for _, l := range m.Layers {
		size += float64(l.Size) / 1e6
	}
	t.Logf("FIGURE %.0f MB in %s layers: expanded in %.1f s, %.0f MB/s, with at most %d MB of memory; converted in %.1f s, %.0f MB/s, %d MB",
		size, tag, expansion, size/expansion, expanding, conversion, size/conversion, converting)
	if expanding > maxMemory {
		t.Errorf("the registry took %d MB while it expanded, more than %d", expanding, maxMemory)
	}
}

// peakMemory returns the most memory that a process had resident, in MB.
func peakMemory(t *testing.T, pid int) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	_, rest, _ := strings.Cut(string(status), "VmHWM:")
	kb := 0
	_, err = fmt.Sscan(rest, &kb)
	must(t, err)
	return kb * 1024 / 1e6
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
