package mount_test

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"

	"sluice/internal/node/mount"
	"sluice/oci"
)

// An image that doesn't stream is this node's business only where streaming is to
// be expected.
func TestJudges(t *testing.T) {
	n, manifest := prepared(t)
	m := n.start()
	if m.Judges(testHost, false) {
		t.Error("a registry of which nothing is known")
	}
	if !m.Judges(testHost, true) {
		t.Error("an image that streams")
	}
	if _, err := m.Pull(t.Context(), "other.test/app:1", ""); err == nil {
		t.Fatal("an image that isn't there streams")
	}
	img, err := m.Pull(t.Context(), testRef, manifest)
	if err != nil {
		t.Fatal(err)
	}
	if !m.Judges(testHost, false) || m.Judges("other.test", false) {
		t.Error("a registry that has given an artifact, and one that hasn't")
	}
	n.stop()
	if m = n.start(); !m.Judges(testHost, false) {
		t.Error("a registry that has given an artifact before the last start")
	}
	got, here, size, err := m.Arrived(t.Context(), img.ID)
	if err != nil || got.ID != img.ID || size <= 0 || here < 0 || here > size {
		t.Errorf("of %+v there are %d bytes of %d, %v", got, here, size, err)
	}
	if _, _, _, err := m.Arrived(t.Context(), oci.DigestOf(nil)); !errors.Is(err, mount.ErrUnknownImage) {
		t.Errorf("of an image that isn't here: %v", err)
	}
}

// With --from it's what that says, whatever streams.
func TestJudgesFrom(t *testing.T) {
	n, manifest := prepared(t)
	n.opts.From = []string{"named.test"}
	m := n.start()
	if _, err := m.Pull(t.Context(), testRef, manifest); mount.ReasonOf(err) != mount.Disabled {
		t.Errorf("pulled from elsewhere: %v", err)
	}
	if !m.Judges("named.test", false) || m.Judges(testHost, false) || m.Judges(testHost, true) {
		t.Error("not what --from says")
	}
}

// A registry that has an artifact which can't be used here has one.
func TestJudgesWhatFails(t *testing.T) {
	n, manifest := prepared(t)
	n.opts.Platform = oci.Platform{OS: "linux", Architecture: "riscv64"}
	m := n.start()
	if _, err := m.Pull(t.Context(), testRef, manifest); mount.ReasonOf(err) != mount.PlatformUnsupported {
		t.Errorf("pulled for another platform: %v", err)
	}
	if !m.Judges(testHost, false) {
		t.Error("a registry that has an artifact for another platform")
	}
}

func TestConversion(t *testing.T) {
	n := newNode(t)
	n.opts.Platform = here
	descs := n.push(testRepo, "v1", testLayers(), here, oci.Platform{OS: "linux", Architecture: "arm64"})
	index, err := n.reg.Registry.ResolveManifest(t.Context(), testRepo, "v1")
	if err != nil {
		t.Fatal(err)
	}
	var asked atomic.Int32
	var says func(oci.Digest) (mount.Conversion, error)
	n.opts.Conversion = func(_ context.Context, host, repository string, subject oci.Digest) (mount.Conversion, error) {
		asked.Add(1)
		if host != testHost || repository != testRepo {
			t.Errorf("asked %s of %s", host, repository)
		}
		return says(subject)
	}
	n.opts.Remember = 1 // ns
	m := n.start()
	for _, c := range []struct {
		name   string
		says   func(oci.Digest) (mount.Conversion, error)
		want   mount.Reason
		text   string
		asked  int32
		judges bool
	}{
		{"it wasn't asked to", func(oci.Digest) (mount.Conversion, error) { return mount.Conversion{}, nil }, mount.NoStreamingArtifact, "has no referrer", 2, false},
		{"it can't be asked now", func(oci.Digest) (mount.Conversion, error) { return mount.Conversion{}, oci.ErrUnauthorized }, mount.NoStreamingArtifact, "has no referrer", 2, false},
		{"it failed", func(oci.Digest) (mount.Conversion, error) {
			return mount.Conversion{State: "Failed: a layer is bad"}, nil
		}, mount.NoStreamingArtifact, "has no referrer", 2, false},
		{"of the index", func(d oci.Digest) (mount.Conversion, error) {
			return mount.Conversion{Pending: d == index.Digest, State: "Running"}, nil
		}, mount.ConversionPending, "is converting " + index.Digest.String() + ": Running", 2, true},
		{"of the manifest", func(oci.Digest) (mount.Conversion, error) {
			return mount.Conversion{Pending: true, State: "NotStarted"}, nil
		}, mount.ConversionPending, "is converting " + descs[0].Digest.String() + ": NotStarted", 1, true},
		{"it doesn't know the question", func(oci.Digest) (mount.Conversion, error) { return mount.Conversion{}, oci.ErrUnsupported }, mount.NoStreamingArtifact, "has no referrer", 1, true},
		{"it isn't asked again", nil, mount.NoStreamingArtifact, "has no referrer", 0, true},
	} {
		says = c.says
		asked.Store(0)
		_, err := m.Pull(t.Context(), testRef, descs[0].Digest)
		if mount.ReasonOf(err) != c.want || !strings.Contains(err.Error(), c.text) || asked.Load() != c.asked {
			t.Errorf("%s: asked %d times, %v; want %s, %d times, %q", c.name, asked.Load(), err, c.want, c.asked, c.text)
		}
		if c.name == "it failed" && !strings.Contains(err.Error(), "its last conversion: Failed: a layer is bad") {
			t.Errorf("%s: %v", c.name, err)
		}
		if m.Judges(testHost, false) != c.judges {
			t.Errorf("%s: whether it's to be judged", c.name)
		}
	}
	n.convert(testRepo, "v1")
	if _, err := m.Pull(t.Context(), testRef, descs[0].Digest); err != nil {
		t.Errorf("when it's converted: %v", err)
	}
}

// What streams isn't asked about.
func TestConversionOfWhatStreams(t *testing.T) {
	n, manifest := prepared(t)
	n.opts.Conversion = func(context.Context, string, string, oci.Digest) (mount.Conversion, error) {
		t.Error("asked")
		return mount.Conversion{}, nil
	}
	if _, err := n.start().Pull(t.Context(), testRef, manifest); err != nil {
		t.Error(err)
	}
}

// While somebody opts out, pulls of the same name go the ordinary way, and those
// of other names, and later ones, don't.
func TestOptOut(t *testing.T) {
	n, manifest := prepared(t)
	m := n.start()
	refused := func(ref string, want string) {
		t.Helper()
		_, err := m.Pull(t.Context(), ref, manifest)
		if mount.ReasonOf(err) != mount.Disabled || !strings.Contains(err.Error(), want) {
			t.Errorf("pulling %s: %v; want %q", ref, err, want)
		}
	}
	first := m.OptOut(testRef, "pod a opts out")
	refused(testRef, "pod a opts out")
	refused(testRef, "pod a opts out") // of another layer
	second := m.OptOut(testRef, "pod b opts out")
	refused(testRef, "pod b opts out")
	first()
	first()
	refused(testRef, "pod b opts out")
	if _, _, err := m.PullChecked(t.Context(), testRef); err != nil {
		t.Errorf("who mounts it without containerd: %v", err)
	}
	refused(testRef, "pod b opts out") // what is here, too
	digest := testHost + "/" + testRepo + "@" + manifest.String()
	if _, err := m.Pull(t.Context(), digest, manifest); err != nil {
		t.Errorf("by another name: %v", err)
	}
	second()
	if _, err := m.Pull(t.Context(), testRef, manifest); err != nil {
		t.Errorf("when nobody opts out any more: %v", err)
	}
	var disabled int
	for _, p := range m.Status(t.Context()).Pulls {
		if p.Reason == mount.Disabled {
			disabled++
		}
	}
	if disabled != 2 {
		t.Errorf("the status has %d pulls that were opted out of, want 2", disabled)
	}
	if o, ok := m.LastPull(testRef); !ok || o.Reason != "" && o.What() != "pod b opts out" {
		t.Errorf("the last pull is %+v", o)
	}
	m.OptOut("NOT A REFERENCE", "")()
	if _, ok := m.LastPull("NOT A REFERENCE"); ok {
		t.Error("there's a last pull of nonsense")
	}
}
