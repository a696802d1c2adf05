package stored_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/index"
	"sluice/internal/storage"
	"sluice/internal/stored"
	"sluice/oci"
	"sluice/oci/ocitest"
)

func TestStoredInMemory(t *testing.T) {
	ocitest.Run(t, func(t *testing.T) oci.Registry {
		return open(t, &storage.Memory{}, stored.Options{AllowStreamingPush: true})
	})
}

func TestStoredLocally(t *testing.T) {
	ocitest.Run(t, func(t *testing.T) oci.Registry {
		return open(t, openLocal(t, t.TempDir()), stored.Options{AllowStreamingPush: true})
	})
}

// open returns a registry on a store, with an index in memory.
func open(t *testing.T, store storage.Store, opts stored.Options) *stored.Registry {
	t.Helper()
	return stored.New(store, openIndex(t), opts)
}

func openIndex(t *testing.T) *index.DB {
	t.Helper()
	db, err := index.Open(t.Context(), index.Options{URL: "sqlite::memory:"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func openLocal(t *testing.T, dir string) *storage.Local {
	t.Helper()
	store, err := storage.OpenLocal(dir, storage.LocalOptions{Identity: stored.BlobIdentity})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	return store
}

// indexDoc returns an empty index with a subject, if that isn't empty.
func indexDoc(t *testing.T, subject oci.Digest, name string) []byte {
	t.Helper()
	ix := oci.Index{
		Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeIndex,
		Manifests: []oci.Descriptor{}, Annotations: map[string]string{"name": name},
	}
	if subject != "" {
		ix.Subject = &oci.Descriptor{MediaType: oci.MediaTypeIndex, Digest: subject, Size: 1}
	}
	content, err := json.Marshal(ix)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

func pushIndex(t *testing.T, reg oci.Registry, repo, reference string, content []byte) oci.Digest {
	t.Helper()
	if reference == "" {
		reference = oci.DigestOf(content).String()
	}
	desc, err := reg.PushManifest(t.Context(), repo, reference, oci.MediaTypeIndex, content)
	if err != nil {
		t.Fatal(err)
	}
	return desc.Digest
}

func pushBlob(t *testing.T, reg oci.Registry, repo, content string) oci.Digest {
	t.Helper()
	desc := oci.Descriptor{Digest: oci.DigestOf([]byte(content)), Size: int64(len(content))}
	if _, err := reg.PushBlob(t.Context(), repo, desc, strings.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	return desc.Digest
}

// The tree is an interface: other programs read it.
func TestTree(t *testing.T) {
	dir := t.TempDir()
	reg := open(t, openLocal(t, dir), stored.Options{})
	blob := pushBlob(t, reg, "a/b", "blob")
	pushBlob(t, reg, "c", "blob")
	subject := pushIndex(t, reg, "a/b", "v1", indexDoc(t, "", "subject"))
	referrer := pushIndex(t, reg, "a/b", "", indexDoc(t, subject, "referrer"))
	for name, want := range map[string]string{
		"repositories/a/b/_layers/" + blob.String():        "blob",
		"repositories/a/b/_manifests/" + subject.String():  string(indexDoc(t, "", "subject")),
		"repositories/a/b/_manifests/" + referrer.String(): string(indexDoc(t, subject, "referrer")),
		"repositories/a/b/_tags/v1":                        `{"digest":"` + subject.String() + `",`,
	} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !strings.HasPrefix(string(got), want) {
			t.Errorf("%s: %q, %v; want %q", name, got, err, want)
		}
	}
	link, err := os.ReadFile(filepath.Join(dir, "repositories/a/b/_referrers", subject.String(), referrer.String()))
	if err != nil || !strings.Contains(string(link), referrer.String()) {
		t.Errorf("referrer link: %q, %v", link, err)
	}
	a, err := os.Stat(filepath.Join(dir, "repositories/a/b/_layers", blob.String()))
	if err != nil {
		t.Fatal(err)
	}
	if c, err := os.Stat(filepath.Join(dir, "repositories/c/_layers", blob.String())); err != nil || !os.SameFile(a, c) {
		t.Errorf("a blob of two repositories is stored twice (%v)", err)
	}
	for _, d := range []oci.Digest{subject, referrer} {
		if err := reg.DeleteManifest(t.Context(), "a/b", d); err != nil {
			t.Fatal(err)
		}
	}
	for _, repo := range []string{"a/b", "c"} {
		if err := reg.DeleteBlob(t.Context(), repo, blob); err != nil {
			t.Fatal(err)
		}
	}
	var left []string
	filepath.WalkDir(filepath.Join(dir, "repositories"), func(path string, e os.DirEntry, _ error) error {
		if e != nil && !e.IsDir() {
			left = append(left, strings.TrimPrefix(path, dir))
		}
		return nil
	})
	// The attributes of a repository outlive what is in it.
	want := []string{"/repositories/a/b/_attributes/repository", "/repositories/c/_attributes/repository"}
	if diff := cmp.Diff(want, left); diff != "" {
		t.Errorf("after everything was deleted (-want +got):\n%s", diff)
	}
}

// What a crash in the middle of a push or a deletion, or a bad disk, leaves.
func TestDamage(t *testing.T) {
	dir := t.TempDir()
	reg := open(t, openLocal(t, dir), stored.Options{})
	ctx := t.Context()
	subject := pushIndex(t, reg, "a", "v1", indexDoc(t, "", "subject"))
	content := indexDoc(t, subject, "referrer")
	referrer := pushIndex(t, reg, "a", "v2", content)
	file := filepath.Join(dir, "repositories/a/_manifests", referrer.String())
	referrers := func() (n int) {
		for _, err := range reg.Referrers(ctx, "a", subject, "") {
			if err != nil {
				t.Error(err)
			}
			n++
		}
		return n
	}

	// Changed on the disk: an error, and not one that blames the client.
	if err := os.WriteFile(file, bytes.Replace(content, []byte("referrer"), []byte("attacker"), 1), 0o644); err != nil {
		t.Fatal(err)
	}
	var known *oci.Error
	if m, err := reg.GetManifest(ctx, "a", "v2"); err == nil || errors.As(err, &known) {
		t.Errorf("a damaged manifest: %s, %v", m.Content, err)
	}
	pushIndex(t, reg, "a", "v2", content) // heals it
	if _, err := reg.GetManifest(ctx, "a", "v2"); err != nil {
		t.Errorf("a manifest that was pushed again: %v", err)
	}
	if err := os.WriteFile(file, []byte("garbage"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := reg.DeleteManifest(ctx, "a", referrer); err != nil {
		t.Errorf("delete a damaged manifest: %v", err)
	}
	if _, err := reg.GetManifest(ctx, "a", "v2"); !errors.Is(err, oci.ErrManifestUnknown) {
		t.Errorf("a deleted manifest: %v", err)
	}
	// Its link is still there, since nobody knew its subject any more.
	if n := referrers(); n != 0 {
		t.Errorf("%d referrers, want none: the manifest is gone", n)
	}
	pushIndex(t, reg, "a", "v2", content)
	if n := referrers(); n != 1 {
		t.Errorf("%d referrers, want 1", n)
	}
	// A tag without its manifest.
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if _, err := reg.GetManifest(ctx, "a", "v2"); !errors.Is(err, oci.ErrManifestUnknown) {
		t.Errorf("a tag without manifest: %v", err)
	}
	if err := reg.DeleteTag(ctx, "a", "v2"); err != nil {
		t.Error(err)
	}
	// Strange files are nobody's repository.
	for _, name := range []string{"repositories/UPPER/_layers/x", "repositories/a/lost+found/y", "repositories/file"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "repositories/a/_tags/v3"), []byte("rubbish"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := reg.Rebuild(ctx, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := reg.GetManifest(ctx, "a", "v3"); !errors.Is(err, oci.ErrManifestUnknown) {
		t.Errorf("a damaged tag: %v", err)
	}
	var repos []string
	for repo, err := range reg.Repositories(ctx, "") {
		if err != nil {
			t.Fatal(err)
		}
		repos = append(repos, repo)
	}
	if fmt.Sprint(repos) != "[a]" {
		t.Errorf("repositories are %v, want [a]", repos)
	}
}

// Pushes and deletions of one manifest, at once: whatever comes last, a tag that
// was acknowledged after the last deletion works, and no list names what isn't
// there.
func TestPushAndDeleteRace(t *testing.T) {
	reg := open(t, openLocal(t, t.TempDir()), stored.Options{})
	ctx := t.Context()
	subject := pushIndex(t, reg, "a", "keep", indexDoc(t, "", "subject"))
	content := indexDoc(t, subject, "contended")
	digest := oci.DigestOf(content)
	for range 30 {
		var wg sync.WaitGroup
		for i := range 3 {
			wg.Go(func() {
				if _, err := reg.PushManifest(ctx, "a", fmt.Sprint("t", i), oci.MediaTypeIndex, content); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Go(func() {
			if err := reg.DeleteManifest(ctx, "a", digest); err != nil && !errors.Is(err, oci.ErrManifestUnknown) {
				t.Error(err)
			}
		})
		wg.Wait()
		for tag, err := range reg.Tags(ctx, "a", "") {
			if err != nil {
				t.Fatal(err)
			}
			if _, err := reg.GetManifest(ctx, "a", tag); err != nil {
				t.Fatalf("tag %s: %v", tag, err)
			}
		}
		_, err := reg.GetManifest(ctx, "a", digest.String())
		exists, listed := err == nil, false
		for desc, err := range reg.Referrers(ctx, "a", subject, "") {
			if err != nil {
				t.Fatal(err)
			}
			listed = listed || desc.Digest == digest
		}
		if exists != listed {
			t.Fatalf("the manifest exists: %v; it is listed as a referrer: %v", exists, listed)
		}
	}
}

// An upload that is canceled while bytes arrive is gone, and the one who sends
// them learns it.
func TestCancelDuringAppend(t *testing.T) {
	for name, store := range map[string]storage.Store{"memory": &storage.Memory{}, "local": openLocal(t, t.TempDir())} {
		reg := open(t, store, stored.Options{})
		u, err := reg.StartUpload(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		r, w := io.Pipe()
		done := make(chan error, 1)
		go func() {
			err := u.Append(t.Context(), 0, r)
			r.Close() // it may end with what it has, without reading on
			done <- err
		}()
		w.Write([]byte("half"))
		other, err := reg.ResumeUpload(t.Context(), "a", u.ID())
		if err != nil {
			t.Fatalf("%s: look at an upload that is being written: %v", name, err)
		}
		if err := other.Cancel(t.Context()); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		w.Write([]byte("rest"))
		w.Close()
		if err := <-done; !errors.Is(err, oci.ErrBlobUploadUnknown) {
			t.Errorf("%s: Append ended with %v, want ErrBlobUploadUnknown", name, err)
		}
		if _, err := u.Commit(t.Context(), oci.DigestOf([]byte("halfrest"))); !errors.Is(err, oci.ErrBlobUploadUnknown) {
			t.Errorf("%s: Commit ended with %v, want ErrBlobUploadUnknown", name, err)
		}
	}
}

func TestAllowSparse(t *testing.T) {
	ix := oci.Index{
		Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeIndex,
		Manifests: []oci.Descriptor{{MediaType: oci.MediaTypeImageManifest, Digest: oci.DigestOf([]byte("absent")), Size: 6}},
	}
	content, err := json.Marshal(ix)
	if err != nil {
		t.Fatal(err)
	}
	for allow, want := range map[bool]error{false: oci.ErrManifestBlobUnknown, true: nil} {
		reg := open(t, &storage.Memory{}, stored.Options{AllowSparse: allow})
		if _, err := reg.PushManifest(t.Context(), "a", "v1", oci.MediaTypeIndex, content); !errors.Is(err, want) {
			t.Errorf("AllowSparse %v: %v, want %v", allow, err, want)
		}
	}
}

func noTime() time.Time { return time.Time{} }
