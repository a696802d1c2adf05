package stored_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"sluice/internal/index"
	"sluice/internal/storage"
	"sluice/internal/stored"
	"sluice/oci"
)

var errDead = errors.New("the process was killed")

// mortal is a store whose process is killed after some more changes.
type mortal struct {
	storage.Store
	left int // changes until the end; negative: immortal
	die  func()
}

// change makes a change, unless the end was before it.
func (m *mortal) change(f func() error) error {
	if m.left == 0 {
		return errDead
	}
	err := f()
	if m.left--; m.left == 0 {
		m.die()
	}
	return err
}

func (m *mortal) Put(ctx context.Context, key string, data []byte) error {
	return m.change(func() error { return m.Store.Put(ctx, key, data) })
}

func (m *mortal) Link(ctx context.Context, from, to string) error {
	return m.change(func() error { return m.Store.Link(ctx, from, to) })
}

func (m *mortal) Delete(ctx context.Context, key string) error {
	return m.change(func() error { return m.Store.Delete(ctx, key) })
}

func (m *mortal) StartUpload(ctx context.Context) (storage.Upload, error) {
	u, err := m.Store.StartUpload(ctx)
	return mortalUpload{u, m}, err
}

type mortalUpload struct {
	storage.Upload
	m *mortal
}

func (u mortalUpload) Commit(ctx context.Context, key string) error {
	return u.m.change(func() error { return u.Upload.Commit(ctx, key) })
}

// history is a registry that things happen to, and what it must have.
type history struct {
	t     *rapid.T
	file  string
	store *mortal
	db    *index.DB
	reg   *stored.Registry
	opts  stored.Options

	images map[at]image  // by repository and digest; acknowledged
	tags   map[at]string // digest; acknowledged
	gone   map[at]bool   // manifests whose deletion was acknowledged
	unsure map[string]bool

	dying []at // manifests and tags that a deletion was about when the end came
}

type image struct {
	content []byte
	layer   string
	subject oci.Digest
	typ     string
}

func (h *history) open() {
	var err error
	if h.db, err = index.Open(context.Background(), index.Options{URL: "sqlite:" + h.file}); err != nil {
		h.t.Fatal(err)
	}
	h.reg = stored.New(h.store, h.db, h.opts)
}

// The histories draw from few names, so that things meet.
func (h *history) repo() string { return rapid.SampledFrom([]string{"a", "a/b"}).Draw(h.t, "repo") }
func (h *history) tag() string {
	return rapid.SampledFrom([]string{"", "v1", "v2"}).Draw(h.t, "tag")
}

// known draws a manifest of a repository that is there.
func (h *history) known(repo string) (oci.Digest, bool) {
	var all []string
	for k := range h.images {
		if k.repo == repo {
			all = append(all, k.name)
		}
	}
	if len(all) == 0 {
		return "", false
	}
	slices.Sort(all)
	return oci.Digest(rapid.SampledFrom(all).Draw(h.t, "manifest")), true
}

// step does one thing and returns its error.
func (h *history) step(ctx context.Context) error {
	repo := h.repo()
	switch rapid.SampledFrom([]string{"push", "push", "push", "artifact", "delete", "untag", "restore", "lock", "mount", "collect", "purge", "drop"}).Draw(h.t, "step") {
	case "push":
		return h.push(ctx, repo, "", "")
	case "artifact":
		if subject, ok := h.known(repo); ok {
			return h.push(ctx, repo, subject, rapid.SampledFrom([]string{oci.ArtifactTypeStreaming, "application/vnd.example"}).Draw(h.t, "type"))
		}
	case "delete":
		if digest, ok := h.known(repo); ok {
			return h.delete(ctx, repo, digest)
		}
	case "untag":
		if tag := h.tag(); tag != "" {
			return h.untag(ctx, repo, tag)
		}
	case "restore":
		return h.restore(ctx, repo)
	case "lock":
		if digest, ok := h.known(repo); ok {
			_, err := h.reg.SetManifestAttributes(ctx, repo, digest, func(a *index.Attributes) error { a.ListEnabled = !a.ListEnabled; return nil })
			return err
		}
		_, err := h.reg.SetRepositoryAttributes(ctx, repo, func(a *index.Attributes) error { a.StreamingEnabled = !a.StreamingEnabled; return nil })
		return err
	case "mount":
		_, err := h.reg.MountBlob(ctx, repo, h.repo(), oci.DigestOf([]byte(fmt.Sprint("layer", rapid.IntRange(0, 3).Draw(h.t, "layer")))))
		return err
	case "collect":
		_, err := h.reg.Collect(ctx, -1<<40)
		return err
	case "purge":
		_, err := h.reg.Purge(ctx)
		return err
	case "drop":
		if rapid.IntRange(0, 3).Draw(h.t, "really") == 0 {
			return h.drop(ctx, repo)
		}
	}
	return nil
}

func (h *history) push(ctx context.Context, repo string, subject oci.Digest, artifactType string) error {
	layer := fmt.Sprint("layer", rapid.IntRange(0, 3).Draw(h.t, "layer"))
	config := `{"os":"linux","architecture":"amd64"}`
	m := oci.ImageManifest{
		Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageManifest, ArtifactType: artifactType,
		Config:      oci.Descriptor{MediaType: oci.MediaTypeImageConfig, Digest: oci.DigestOf([]byte(config)), Size: int64(len(config))},
		Layers:      []oci.Descriptor{{MediaType: oci.MediaTypeLayer, Digest: oci.DigestOf([]byte(layer)), Size: int64(len(layer))}},
		Annotations: map[string]string{"n": fmt.Sprint(rapid.IntRange(0, 1).Draw(h.t, "n"))},
	}
	if subject != "" {
		m.Subject = &oci.Descriptor{MediaType: oci.MediaTypeImageManifest, Digest: subject, Size: int64(len(h.images[at{repo, subject.String()}].content))}
	}
	content, err := json.Marshal(m)
	if err != nil {
		return err
	}
	for _, blob := range []string{config, layer} {
		desc := oci.Descriptor{Digest: oci.DigestOf([]byte(blob)), Size: int64(len(blob))}
		if _, err := h.reg.PushBlob(ctx, repo, desc, strings.NewReader(blob)); err != nil {
			return err
		}
	}
	tag, digest := h.tag(), oci.DigestOf(content).String()
	reference := tag
	if tag == "" {
		reference = digest
	}
	h.unsure[repo+"@"+digest], h.unsure[repo+":"+tag] = true, true
	if _, err := h.reg.PushManifest(ctx, repo, reference, m.MediaType, content); err != nil {
		return err
	}
	delete(h.unsure, repo+"@"+digest)
	delete(h.unsure, repo+":"+tag)
	h.images[at{repo, digest}] = image{content, layer, subject, artifactType}
	delete(h.gone, at{repo, digest})
	if tag != "" {
		h.tags[at{repo, tag}] = digest
	}
	return nil
}

// forget takes a manifest, its tags and its artifacts out of what must be there.
func (h *history) forget(repo string, digest oci.Digest) (all []oci.Digest) {
	all = []oci.Digest{digest}
	delete(h.images, at{repo, digest.String()})
	for k, d := range h.tags {
		// One that the end came to while it was moved may have been this manifest's.
		if unsure := repo + ":" + k.name; k.repo == repo && (d == digest.String() || h.unsure[unsure]) {
			delete(h.tags, k)
			h.unsure[unsure] = true
		}
	}
	for k, i := range h.images {
		if k.repo == repo && i.subject == digest && i.typ == oci.ArtifactTypeStreaming {
			all = append(all, h.forget(repo, oci.Digest(k.name))...)
		}
	}
	return all
}

func (h *history) delete(ctx context.Context, repo string, digest oci.Digest) error {
	h.dying = nil
	for t, d := range h.tags {
		if t.repo == repo && d == digest.String() && !h.unsure[repo+":"+t.name] {
			h.dying = append(h.dying, t)
		}
	}
	all := h.forget(repo, digest)
	for _, d := range all {
		h.dying = append(h.dying, at{repo, d.String()})
	}
	err := h.reg.DeleteManifest(ctx, repo, digest)
	if err == nil {
		h.dying = nil
		for _, d := range all {
			h.gone[at{repo, d.String()}] = true
		}
	}
	return err
}

func (h *history) untag(ctx context.Context, repo, tag string) error {
	delete(h.tags, at{repo, tag})
	return h.reg.DeleteTag(ctx, repo, tag)
}

func (h *history) restore(ctx context.Context, repo string) error {
	deleted, err := h.reg.DeletedManifests(ctx, repo, noTime(), "", 100)
	if err != nil || len(deleted) == 0 {
		return err
	}
	d := rapid.SampledFrom(deleted).Draw(h.t, "deleted")
	for k := range h.gone { // artifacts come with it
		if k.repo == repo {
			delete(h.gone, k)
		}
	}
	if _, err = h.reg.Restore(ctx, repo, d.Digest, ""); err != nil {
		return err
	}
	m, err := h.reg.GetManifest(ctx, repo, d.Digest.String())
	if err == nil {
		h.images[at{repo, d.Digest.String()}] = image{content: m.Content}
	}
	return err
}

func (h *history) drop(ctx context.Context, repo string) error {
	for k := range h.images {
		if k.repo == repo {
			delete(h.images, k)
		}
	}
	for k := range h.tags {
		if k.repo == repo {
			delete(h.tags, k)
		}
	}
	return h.reg.DeleteRepository(ctx, repo)
}

// check compares the registry with what was acknowledged.
func (h *history) check(ctx context.Context) {
	for k, want := range h.images {
		got, err := h.reg.GetManifest(ctx, k.repo, k.name)
		if err != nil || string(got.Content) != string(want.content) {
			h.t.Fatalf("acknowledged manifest %s of %s: %v", k.name, k.repo, err)
		}
		var m oci.ImageManifest
		if err := json.Unmarshal(got.Content, &m); err != nil {
			h.t.Fatal(err)
		}
		for _, d := range append(m.Layers, m.Config) {
			if _, err := h.store.Store.Stat(ctx, "repositories/"+k.repo+"/_layers/"+d.Digest.String()); err != nil {
				h.t.Fatalf("blob of manifest %s of %s: %v", k.name, k.repo, err)
			}
		}
	}
	for k, want := range h.tags {
		got, err := h.reg.ResolveManifest(ctx, k.repo, k.name)
		if h.unsure[k.repo+":"+k.name] && err == nil {
			continue
		}
		if err != nil || got.Digest.String() != want {
			h.t.Fatalf("acknowledged tag %s of %s: %s, %v; want %s", k.name, k.repo, got.Digest, err, want)
		}
	}
	for k := range h.gone {
		if h.unsure[k.repo+"@"+k.name] {
			continue
		}
		if _, err := h.reg.GetManifest(ctx, k.repo, k.name); !errors.Is(err, oci.ErrManifestUnknown) && !errors.Is(err, oci.ErrNameUnknown) {
			h.t.Fatalf("deleted manifest %s of %s: %v", k.name, k.repo, err)
		}
	}
}

// checkDying checks that a deletion that was cut short did all or, since what is
// deleted can be restored, nothing.
func (h *history) checkDying(ctx context.Context) {
	there := 0
	for _, k := range h.dying {
		if _, err := h.reg.GetManifest(ctx, k.repo, k.name); err == nil {
			there++
		}
	}
	if h.opts.SoftDelete > 0 && there != 0 && there != len(h.dying) {
		h.t.Fatalf("of %v there are %d after a deletion that was cut short", h.dying, there)
	}
	h.dying = nil
	deleted, err := h.reg.DeletedManifests(ctx, "", noTime(), "", 1000)
	if err != nil {
		h.t.Fatal(err)
	}
	for _, d := range deleted {
		if _, err := h.reg.GetManifest(ctx, d.Repo, d.Digest.String()); err == nil {
			h.t.Fatalf("%s of %s is deleted and there", d.Digest, d.Repo)
		}
	}
}

// checkOrphans checks that everything that describes a manifest has one.
func (h *history) checkOrphans(ctx context.Context, prefix string) {
	for key, err := range h.store.List(ctx, prefix, "") {
		if err != nil {
			h.t.Fatal(err)
		}
		if strings.HasSuffix(key, "/") {
			h.checkOrphans(ctx, key)
			continue
		}
		repo, rest, _ := strings.Cut(key, "/_")
		part, _, _ := strings.Cut(rest, "/")
		digest, err := oci.ParseDigest(key[strings.LastIndex(key, "/")+1:])
		if err != nil || part != "attributes" && part != "referrers" {
			continue
		}
		if _, err := h.store.Stat(ctx, repo+"/_manifests/"+digest.String()); err != nil {
			h.t.Fatalf("%s describes what isn't there: %v", key, err)
		}
	}
}

// dump returns what an index has, without blobs whose objects were never put.
func (h *history) dump(ctx context.Context, db *index.DB) []index.RepositoryContent {
	var all []index.RepositoryContent
	for c, err := range db.Dump(ctx) {
		if err != nil {
			h.t.Fatal(err)
		}
		c.Blobs = slices.DeleteFunc(c.Blobs, func(b index.Blob) bool {
			_, err := h.store.Stat(ctx, "repositories/"+c.Name+"/_layers/"+b.Digest.String())
			return errors.Is(err, storage.ErrNotFound)
		})
		if len(c.Blobs) == 0 {
			c.Blobs = nil
		}
		all = append(all, c)
	}
	return all
}

// Whatever happens to a registry, and wherever it is killed while it happens:
// what was acknowledged is there, and an index made of the tree alone is the
// same as the one that was there all the time.
func TestHistories(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ctx := context.Background()
		dir, err := os.MkdirTemp("", "stored")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		h := &history{
			t: t, file: filepath.Join(dir, "index.db"), opts: stored.Options{AllowStreamingPush: true, Events: true},
			store:  &mortal{Store: &storage.Memory{}, left: -1},
			images: map[at]image{}, tags: map[at]string{}, gone: map[at]bool{}, unsure: map[string]bool{},
		}
		if rapid.Bool().Draw(t, "soft") {
			h.opts.SoftDelete = 1 << 50
		}
		h.open()
		defer func() { h.db.Close() }()
		for range rapid.IntRange(1, 3).Draw(t, "lives") {
			h.store.die = func() { h.db.Close() }
			h.store.left = rapid.IntRange(1, 60).Draw(t, "left")
			for range rapid.IntRange(1, 25).Draw(t, "steps") {
				err := h.step(ctx)
				if h.store.left == 0 {
					break
				}
				if known := new(oci.Error); err != nil && !errors.As(err, &known) {
					t.Fatalf("%v", err)
				}
			}
			if h.store.left == 0 {
				h.open()
			}
			h.store.left = -1
			if err := h.reg.Reconcile(ctx); err != nil {
				t.Fatal(err)
			}
			h.check(ctx)
			h.checkDying(ctx)
			h.checkOrphans(ctx, "repositories/")
			h.compare(ctx)
		}
	})
}

// compare compares the index with one that is made anew.
func (h *history) compare(ctx context.Context) {
	fresh, err := index.Open(ctx, index.Options{URL: "sqlite::memory:"})
	if err != nil {
		h.t.Fatal(err)
	}
	defer fresh.Close()
	if err := stored.New(h.store, fresh, h.opts).Rebuild(ctx, nil); err != nil {
		h.t.Fatal(err)
	}
	if diff := cmp.Diff(h.dump(ctx, fresh), h.dump(ctx, h.db)); diff != "" {
		h.t.Fatalf("the index differs from one made of the tree (-made +there):\n%s", diff)
	}
}
