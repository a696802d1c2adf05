package mount_test

import (
	"strings"
	"testing"

	"sluice/internal/node/mount"
	"sluice/oci"
)

// Why an image that came the ordinary way isn't streamed is what would become of
// it now, and costs a look-up once.
func TestWhyPresent(t *testing.T) {
	n := newNode(t)
	n.opts.Platform = here
	n.push(testRepo, "none", testLayers(), here)
	n.push(testRepo, "index", testLayers(), here, oci.Platform{OS: "linux", Architecture: "arm64"})
	n.push(testRepo, "foreign", testLayers()[:1], oci.Platform{OS: "linux", Architecture: "riscv64"})
	n.push(testRepo, "v1", testLayers()[:2], here)
	n.push(testRepo, "other-index", testLayers()[1:], here, oci.Platform{OS: "linux", Architecture: "arm64"})
	for _, tag := range []string{"foreign", "v1", "other-index"} {
		n.convert(testRepo, tag)
	}
	m := n.start()
	name := testHost + "/" + testRepo + ":"
	is := func(ref string, want mount.Reason, text string) {
		t.Helper()
		if err := m.WhyPresent(t.Context(), ref); mount.ReasonOf(err) != want || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v; want %s, %q", ref, err, want, text)
		}
	}
	is(name+"none", mount.NoStreamingArtifact, "has no referrer")
	is(name+"index", mount.NoStreamingArtifact, "has no referrer")
	is(name+"foreign", mount.PlatformUnsupported, "linux/riscv64")
	is(name+"v1", mount.AlreadyPresent, "it would now")
	is(name+"other-index", mount.AlreadyPresent, "it would now")
	is("NO REFERENCE", mount.AlreadyPresent, "isn't known")
	if len(m.Status(t.Context()).Images)+len(m.Status(t.Context()).Pulls) > 0 {
		t.Error("something was brought home, or counts as a pull")
	}
	n.reg.down.Store(true)
	requests := n.reg.requests.Load()
	is(name+"v1", mount.AlreadyPresent, "it would now")
	if n.reg.requests.Load() != requests {
		t.Error("the registry is asked again at once")
	}
	is(name+"unknown", mount.AlreadyPresent, "isn't known: RegistryUnavailable: ")
	m.SetSwitch(mount.Switch{Off: true, Why: "the node says so"})
	is(name+"index", mount.NoStreamingArtifact, "has no referrer")
	is(name+"more", mount.Disabled, "the node says so")
}
