package stored_test

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"sluice/internal/index"
	"sluice/internal/storage"
	"sluice/internal/stored"
	"sluice/oci"
)

// What each lock forbids, and what it leaves alone.
func TestLocks(t *testing.T) {
	type place string
	const repo, manifest, tag place = "repository", "manifest", "tag"
	lock := map[string]func(*index.Attributes) error{
		"read":   func(a *index.Attributes) error { a.ReadEnabled = false; return nil },
		"write":  func(a *index.Attributes) error { a.WriteEnabled = false; return nil },
		"delete": func(a *index.Attributes) error { a.DeleteEnabled = false; return nil },
	}
	for _, test := range []struct {
		place
		lock   string
		denied string // operations, separated by spaces; the others work
	}{
		{repo, "read", "get-tag get-digest get-blob head-blob mount-from"},
		{repo, "write", "push-tag push-digest push-other push-blob upload mount-to attach"},
		{repo, "delete", "delete-tag delete-blob delete-other-blob delete-manifest delete-repository"},
		{manifest, "read", "get-tag get-digest"},
		{manifest, "write", "push-tag push-digest"},
		{manifest, "delete", "delete-blob delete-manifest delete-repository"},
		{tag, "read", "get-tag"},
		{tag, "write", "push-tag"},
		{tag, "delete", "delete-tag delete-manifest delete-repository"},
	} {
		t.Run(string(test.place)+"/"+test.lock, func(t *testing.T) {
			for name := range (&locked{}).operations(t) {
				reg := open(t, &storage.Memory{}, stored.Options{})
				l := &locked{reg: reg, image: pushImage(t, reg, "a", "v1", "layer")}
				l.content = must(reg.GetManifest(t.Context(), "a", "v1"))(t).Content
				l.other = pushBlob(t, reg, "a", "other")
				pushBlob(t, reg, "b", "mine")
				var err error
				switch test.place {
				case repo:
					_, err = reg.SetRepositoryAttributes(t.Context(), "a", lock[test.lock])
				case manifest:
					_, err = reg.SetManifestAttributes(t.Context(), "a", l.image.Digest, lock[test.lock])
				case tag:
					_, err = reg.SetTagAttributes(t.Context(), "a", "v1", lock[test.lock])
				}
				if err != nil {
					t.Fatal(err)
				}
				err = l.operations(t)[name]()
				denied := slices.Contains(strings.Fields(test.denied), name)
				if denied && (!errors.Is(err, oci.ErrDenied) || !strings.Contains(err.Error(), test.lock+"Enabled") || !strings.Contains(err.Error(), "PATCH /acr/v1/a")) {
					t.Errorf("%s: %v, want an ErrDenied that tells how to unlock", name, err)
				}
				if !denied && err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
		})
	}
}

// locked is a repository "a" in which something is locked.
type locked struct {
	reg     *stored.Registry
	image   index.Manifest // a:v1
	content []byte         // of the image
	other   oci.Digest     // a blob that nothing needs
}

func (l *locked) operations(t *testing.T) map[string]func() error {
	ctx := t.Context()
	pushManifest := func(reference string, content []byte) error {
		_, err := l.reg.PushManifest(ctx, "a", reference, oci.MediaTypeImageManifest, content)
		return err
	}
	again := bytes.Replace(l.content, []byte(`{"schemaVersion"`), []byte(`{ "schemaVersion"`), 1)
	return map[string]func() error{
		"get-tag":    func() error { _, err := l.reg.GetManifest(ctx, "a", "v1"); return err },
		"get-digest": func() error { _, err := l.reg.GetManifest(ctx, "a", l.image.Digest.String()); return err },
		"get-blob": func() error {
			r, err := l.reg.GetBlob(ctx, "a", l.other)
			if err == nil {
				r.Close()
			}
			return err
		},
		"head-blob":   func() error { _, err := l.reg.ResolveBlob(ctx, "a", l.other); return err },
		"mount-from":  func() error { _, err := l.reg.MountBlob(ctx, "a", "b", l.other); return err },
		"mount-to":    func() error { _, err := l.reg.MountBlob(ctx, "b", "a", oci.DigestOf([]byte("mine"))); return err },
		"push-tag":    func() error { return pushManifest("v1", l.content) },
		"push-digest": func() error { return pushManifest(l.image.Digest.String(), l.content) },
		"push-other":  func() error { return pushManifest("v2", again) },
		"push-blob": func() error {
			_, err := l.reg.PushBlob(ctx, "a", oci.Descriptor{Digest: oci.DigestOf([]byte("x")), Size: 1}, strings.NewReader("x"))
			return err
		},
		"upload": func() error { _, err := l.reg.StartUpload(ctx, "a"); return err },
		"attach": func() error {
			_, err := l.reg.Generator().PushManifest(ctx, "a", "v3", oci.MediaTypeIndex, indexDoc(t, l.image.Digest, "attached"))
			return err
		},
		"delete-tag":        func() error { return l.reg.DeleteTag(ctx, "a", "v1") },
		"delete-blob":       func() error { return l.reg.DeleteBlob(ctx, "a", l.image.Blobs[1].Digest) },
		"delete-other-blob": func() error { return l.reg.DeleteBlob(ctx, "a", l.other) },
		"delete-manifest":   func() error { return l.reg.DeleteManifest(ctx, "a", l.image.Digest) },
		"delete-repository": func() error { return l.reg.DeleteRepository(ctx, "a") },
	}
}

// must returns a function that returns v, or ends the test.
func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// What is hidden is in no list, and can be pulled all the same.
func TestHidden(t *testing.T) {
	reg := open(t, &storage.Memory{}, stored.Options{})
	ctx := t.Context()
	hide := func(a *index.Attributes) error { a.ListEnabled = false; return nil }
	image := pushImage(t, reg, "a", "v1", "one")
	pushImage(t, reg, "a", "v2", "two")
	pushImage(t, reg, "b", "v1", "one")
	artifact := pushArtifact(t, reg, "a", "artifact", image)
	must(reg.SetTagAttributes(ctx, "a", "v1", hide))(t)
	must(reg.SetManifestAttributes(ctx, "a", artifact.Digest, hide))(t)
	must(reg.SetRepositoryAttributes(ctx, "b", hide))(t)
	for repo := range reg.Repositories(ctx, "") {
		if repo != "a" {
			t.Errorf("repository %s is listed", repo)
		}
	}
	for tag := range reg.Tags(ctx, "a", "") {
		if tag != "v2" {
			t.Errorf("tag %s is listed", tag)
		}
	}
	for desc := range reg.Referrers(ctx, "a", image.Digest, "") {
		t.Errorf("referrer %s is listed", desc.Digest)
	}
	if page := must(reg.ManifestsPage(ctx, index.ManifestQuery{Repo: "a", N: 2}))(t); len(page) != 2 {
		t.Errorf("a page of 2 manifests has %d", len(page))
	}
	must(reg.GetManifest(ctx, "b", "v1"))(t)
	must(reg.GetManifest(ctx, "a", "v1"))(t)
}

func TestReservedType(t *testing.T) {
	ctx := t.Context()
	reg := open(t, &storage.Memory{}, stored.Options{})
	image := pushImage(t, reg, "a", "v1", "layer")
	artifact := pushArtifact(t, reg, "a", "artifact", image)
	content := must(reg.GetManifest(ctx, "a", artifact.Digest.String()))(t).Content
	asConfig := bytes.Replace(content, []byte(oci.MediaTypeImageConfig), []byte(oci.ArtifactTypeStreaming), 1)
	asConfig = bytes.Replace(asConfig, []byte(`"artifactType":"`+oci.ArtifactTypeStreaming+`",`), nil, 1)
	for name, content := range map[string][]byte{"as artifact type": content, "as config": asConfig} {
		if _, err := reg.PushManifest(ctx, "a", "v2", oci.MediaTypeImageManifest, content); !errors.Is(err, oci.ErrDenied) {
			t.Errorf("%s: %v, want ErrDenied", name, err)
		}
		if _, err := reg.Generator().PushManifest(ctx, "a", "v2", oci.MediaTypeImageManifest, content); err != nil {
			t.Errorf("%s by the generator: %v", name, err)
		}
	}
}

func TestLimits(t *testing.T) {
	ctx := t.Context()
	reg := open(t, &storage.Memory{}, stored.Options{MaxBlob: 10, RepositoryQuota: 25})
	tooLarge := oci.Descriptor{Digest: oci.DigestOf([]byte("01234567890")), Size: 11}
	if _, err := reg.PushBlob(ctx, "a", tooLarge, strings.NewReader("01234567890")); !errors.Is(err, oci.ErrSizeInvalid) {
		t.Errorf("a blob that is too large: %v", err)
	}
	u := must(reg.StartUpload(ctx, "a"))(t)
	if err := u.Append(ctx, 0, strings.NewReader("0123456789")); err != nil {
		t.Errorf("an upload that is just small enough: %v", err)
	}
	if err := u.Append(ctx, 10, strings.NewReader("x")); !errors.Is(err, oci.ErrSizeInvalid) || u.Size() != 10 {
		t.Errorf("an upload that is too large: %v, %d bytes", err, u.Size())
	}
	must(u.Commit(ctx, oci.DigestOf([]byte("0123456789"))))(t)
	pushBlob(t, reg, "a", "abcdefghij")
	push := func(repo, content string) error {
		_, err := reg.PushBlob(ctx, repo, oci.Descriptor{Digest: oci.DigestOf([]byte(content)), Size: int64(len(content))}, strings.NewReader(content))
		return err
	}
	for name, err := range map[string]error{
		"a blob over the quota":   push("a", "ABCDEF"),
		"an image over the quota": second(reg.PushManifest(ctx, "a", "v1", oci.MediaTypeIndex, indexDoc(t, "", "x"))),
		"a mount over the quota":  second(reg.MountBlob(ctx, "b", "a", pushBlob(t, reg, "b", "ABCDEF"))),
		"an upload over the quota": func() error {
			u := must(reg.StartUpload(ctx, "a"))(t)
			u.Append(ctx, 0, strings.NewReader("ABCDEF"))
			return second(u.Commit(ctx, oci.DigestOf([]byte("ABCDEF"))))
		}(),
	} {
		if !errors.Is(err, oci.ErrDenied) || !strings.Contains(err.Error(), "quota") {
			t.Errorf("%s: %v, want ErrDenied", name, err)
		}
	}
	if err := push("a", "abcdefghij"); err != nil {
		t.Errorf("a blob that is there: %v", err)
	}
	if err := push("a", "ABCDE"); err != nil {
		t.Errorf("a blob that just fits: %v", err)
	}
	if u := must(reg.Usage(ctx, "a"))(t); u.Size != 25 || u.Blobs != 3 {
		t.Errorf("usage is %+v", u)
	}
}

func second[T any](_ T, err error) error { return err }

// signing is a store that gives out URLs.
type signing struct{ *storage.Memory }

func (s signing) SignedURL(ctx context.Context, key string, _ time.Duration) (string, error) {
	_, err := s.Stat(ctx, key)
	return "https://store/" + key, err
}

func TestBlobURL(t *testing.T) {
	ctx := t.Context()
	reg := open(t, signing{&storage.Memory{}}, stored.Options{})
	blob := pushBlob(t, reg, "a", "blob")
	url, err := reg.BlobURL(ctx, "a", blob, time.Minute)
	if want := "https://store/repositories/a/_layers/" + blob.String(); url != want || err != nil {
		t.Errorf("%q, %v; want %q", url, err, want)
	}
	if _, err := reg.BlobURL(ctx, "a", oci.DigestOf(nil), time.Minute); !errors.Is(err, oci.ErrBlobUnknown) {
		t.Errorf("an unknown blob: %v", err)
	}
	must(reg.SetRepositoryAttributes(ctx, "a", func(a *index.Attributes) error { a.ReadEnabled = false; return nil }))(t)
	if _, err := reg.BlobURL(ctx, "a", blob, time.Minute); !errors.Is(err, oci.ErrDenied) {
		t.Errorf("a locked repository: %v", err)
	}
	plain := open(t, &storage.Memory{}, stored.Options{})
	if url, err := plain.BlobURL(ctx, "a", pushBlob(t, plain, "a", "blob"), time.Minute); url != "" || err != nil {
		t.Errorf("of a store that gives out none: %q, %v", url, err)
	}
}
