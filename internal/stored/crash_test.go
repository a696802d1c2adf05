package stored_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"sluice/internal/remote"
	"sluice/oci"
)

const (
	kills   = 25
	pushers = 4
)

// TestKill kills a registry that is being pushed to, again and again. After each
// restart, what was acknowledged must be there and nothing visible be half.
func TestKill(t *testing.T) {
	if testing.Short() {
		t.Skip("starts the real program many times")
	}
	program := filepath.Join(t.TempDir(), "sluice")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, "sluice/cmd/sluice").CombinedOutput(); err != nil {
		t.Fatalf("build the program: %v\n%s", err, out)
	}
	data := t.TempDir()
	all := newLedger()
	// On a loaded machine little is pushed between two kills.
	round := 0
	for ; round < kills || !all.proves() && round < 4*kills; round++ {
		p := start(t, program, data)
		fresh := newLedger()
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for i := range pushers {
			wg.Go(func() {
				w := &pusher{reg: p.client(t), ledger: fresh, rng: rand.New(rand.NewPCG(uint64(round), uint64(i))), repo: fmt.Sprintf("r%d/x", i%2), n: round*1000 + i*100_000}
				w.run(ctx)
			})
		}
		time.Sleep(time.Duration(20+rand.IntN(180)) * time.Millisecond)
		p.kill(t)
		cancel()
		wg.Wait()

		p = start(t, program, data)
		fresh.check(t, p.client(t))
		checkVisible(t, p.client(t))
		p.kill(t)
		checkFiles(t, data)
		all.merge(fresh)
		if t.Failed() {
			t.Fatalf("after %d kills", round+1)
		}
	}
	p := start(t, program, data)
	all.check(t, p.client(t))
	p.kill(t)
	t.Logf("%d kills: %d blobs, %d manifests, %d tags, %d deletions acknowledged, %d uploads resumed",
		round, len(all.blobs), len(all.manifests), len(all.tags), len(all.deleted), all.resumed)
	if !all.proves() {
		t.Error("too little was pushed to prove anything")
	}
}

// proves reports whether so much was acknowledged that a kill met something.
func (l *ledger) proves() bool {
	return len(l.blobs) >= kills && len(l.manifests) >= kills && l.resumed > 0
}

// process is a running registry.
type process struct {
	cmd  *exec.Cmd
	addr string
}

func start(t *testing.T, program, data string) *process {
	t.Helper()
	cmd := exec.Command(program, "registry", "--data", data, "--listen", "127.0.0.1:0", "--quiet")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	line, err := bufio.NewReader(stdout).ReadString('\n')
	m := regexp.MustCompile(`^listening on ([^ ,]+),`).FindStringSubmatch(line)
	if m == nil {
		cmd.Process.Kill()
		cmd.Wait()
		t.Fatalf("the registry said %q (%v): %s", line, err, stderr.String())
	}
	return &process{cmd, m[1]}
}

func (p *process) kill(t *testing.T) {
	t.Helper()
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	p.cmd.Wait()
}

func (p *process) client(t *testing.T) oci.Registry {
	t.Helper()
	transport := remote.NewTransport()
	t.Cleanup(transport.CloseIdleConnections)
	reg, err := remote.New(p.addr, remote.Options{Transport: transport, Credentials: remote.Anonymous, Retries: -1})
	if err != nil {
		t.Fatal(err)
	}
	return reg
}

// at is a name in a repository.
type at struct{ repo, name string }

// ledger is what the registry has acknowledged.
type ledger struct {
	mu        sync.Mutex
	blobs     map[at]uint64       // seed of the content
	deleted   map[at]bool         // blobs
	manifests map[at]oci.Manifest // by digest
	referrers map[at]oci.Digest   // by the referrer's digest: the subject
	tags      map[at]string       // the digest acknowledged last
	maybe     map[at][]string     // digests that a tag was pushed with and no answer came
	uploads   map[at]partial      // by ID
	resumed   int
}

type partial struct {
	seed uint64
	size int64
}

func newLedger() *ledger {
	return &ledger{
		blobs: map[at]uint64{}, deleted: map[at]bool{}, manifests: map[at]oci.Manifest{}, referrers: map[at]oci.Digest{},
		tags: map[at]string{}, maybe: map[at][]string{}, uploads: map[at]partial{},
	}
}

func (l *ledger) note(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f()
}

// content returns the bytes of a seed.
func contentOf(seed uint64) []byte {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	b := make([]byte, 100+seed*7919%60_000)
	rand.NewChaCha8(key).Read(b)
	return b
}

// pusher pushes until the registry is gone.
type pusher struct {
	reg    oci.Registry
	ledger *ledger
	rng    *rand.Rand
	repo   string
	n      int
}

func (w *pusher) run(ctx context.Context) {
	for ctx.Err() == nil {
		w.n++
		seed := uint64(w.n)
		var err error
		switch w.rng.IntN(5) {
		case 0:
			err = w.blob(ctx, seed)
		case 1:
			err = w.upload(ctx, seed)
		case 2:
			err = w.image(ctx, seed, nil)
		case 3:
			err = w.image(ctx, seed, &oci.Descriptor{MediaType: oci.MediaTypeImageManifest, Digest: oci.DigestOf([]byte(fmt.Sprint("subject", seed%5))), Size: 8})
		case 4:
			err = w.delete(ctx, seed)
		}
		if err != nil {
			return
		}
	}
}

func (w *pusher) blob(ctx context.Context, seed uint64) error {
	content := contentOf(seed)
	desc := oci.Descriptor{MediaType: oci.MediaTypeLayer, Digest: oci.DigestOf(content), Size: int64(len(content))}
	_, err := w.reg.PushBlob(ctx, w.repo, desc, bytes.NewReader(content))
	if err == nil {
		w.ledger.note(func() { w.ledger.blobs[at{w.repo, desc.Digest.String()}] = seed })
	}
	return err
}

// upload pushes a blob in pieces.
func (w *pusher) upload(ctx context.Context, seed uint64) error {
	content := contentOf(seed)
	u, err := w.reg.StartUpload(ctx, w.repo)
	if err != nil {
		return err
	}
	key := at{w.repo, u.ID()}
	for part := range bytes.SplitSeq(content, content[50:51]) {
		rest := content[u.Size():]
		if err := u.Append(ctx, u.Size(), bytes.NewReader(rest[:min(len(part)+500, len(rest))])); err != nil {
			return err
		}
		w.ledger.note(func() { w.ledger.uploads[key] = partial{seed, u.Size()} })
		if u.Size() == int64(len(content)) {
			break
		}
	}
	if err := u.Append(ctx, u.Size(), bytes.NewReader(content[u.Size():])); err != nil {
		return err
	}
	// From here on it may be over without our knowing.
	w.ledger.note(func() { delete(w.ledger.uploads, key) })
	digest := oci.DigestOf(content)
	if _, err = u.Commit(ctx, digest); err == nil {
		w.ledger.note(func() { w.ledger.blobs[at{w.repo, digest.String()}] = seed })
	}
	return err
}

func (w *pusher) image(ctx context.Context, seed uint64, subject *oci.Descriptor) error {
	if err := w.blob(ctx, seed); err != nil {
		return err
	}
	layer := contentOf(seed)
	m := oci.ImageManifest{
		Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageManifest, Subject: subject,
		Config: oci.Descriptor{MediaType: oci.MediaTypeImageConfig, Digest: oci.DigestOf(layer), Size: int64(len(layer))},
		Layers: []oci.Descriptor{},
	}
	content, err := json.Marshal(m)
	if err != nil {
		return err
	}
	digest := oci.DigestOf(content)
	tag := at{w.repo, fmt.Sprint("t", w.rng.IntN(3), "-", w.n/100_000)} // one pusher's own
	w.ledger.note(func() { w.ledger.maybe[tag] = append(w.ledger.maybe[tag], digest.String()) })
	desc, err := w.reg.PushManifest(ctx, w.repo, tag.name, m.MediaType, content)
	if err != nil {
		return err
	}
	w.ledger.note(func() {
		l := w.ledger
		l.tags[tag], l.maybe[tag] = digest.String(), nil
		l.manifests[at{w.repo, digest.String()}] = oci.Manifest{Descriptor: desc, Content: content}
		if subject != nil {
			l.referrers[at{w.repo, digest.String()}] = subject.Digest
		}
	})
	return nil
}

// delete pushes a blob and deletes it again.
func (w *pusher) delete(ctx context.Context, seed uint64) error {
	seed |= 1 << 40
	if err := w.blob(ctx, seed); err != nil {
		return err
	}
	digest := oci.DigestOf(contentOf(seed))
	key := at{w.repo, digest.String()}
	w.ledger.note(func() { delete(w.ledger.blobs, key) }) // unknown from here on
	err := w.reg.DeleteBlob(ctx, w.repo, digest)
	if err == nil {
		w.ledger.note(func() { w.ledger.deleted[key] = true })
	}
	return err
}

// check compares a registry with what it has acknowledged.
func (l *ledger) check(t *testing.T, reg oci.Registry) {
	t.Helper()
	ctx := t.Context()
	for key, seed := range l.blobs {
		r, err := reg.GetBlob(ctx, key.repo, oci.Digest(key.name))
		if err != nil {
			t.Errorf("acknowledged blob: %v", err)
			continue
		}
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, contentOf(seed)) {
			t.Errorf("acknowledged blob %s of %s has other content (%v)", key.name, key.repo, err)
		}
		r.Close()
	}
	for key := range l.deleted {
		if _, err := reg.ResolveBlob(ctx, key.repo, oci.Digest(key.name)); !errors.Is(err, oci.ErrBlobUnknown) && !errors.Is(err, oci.ErrNameUnknown) {
			t.Errorf("deleted blob %s of %s: %v", key.name, key.repo, err)
		}
	}
	for key, want := range l.manifests {
		got, err := reg.GetManifest(ctx, key.repo, key.name)
		if err != nil || !bytes.Equal(got.Content, want.Content) || got.Descriptor.MediaType != want.Descriptor.MediaType {
			t.Errorf("acknowledged manifest %s of %s: %v", key.name, key.repo, err)
		}
	}
	for key, subject := range l.referrers {
		found := false
		for desc, err := range reg.Referrers(ctx, key.repo, subject, "") {
			if err != nil {
				t.Fatal(err)
			}
			found = found || desc.Digest.String() == key.name
		}
		if !found {
			t.Errorf("acknowledged referrer %s of %s is not listed", key.name, key.repo)
		}
	}
	for key, want := range l.tags {
		got, err := reg.ResolveManifest(ctx, key.repo, key.name)
		ok := err == nil && got.Digest.String() == want
		for _, maybe := range l.maybe[key] {
			ok = ok || err == nil && got.Digest.String() == maybe
		}
		if !ok {
			t.Errorf("acknowledged tag %s of %s is %s (%v), want %s", key.name, key.repo, got.Digest, err, want)
		}
	}
	l.resume(t, reg)
}

// resume finishes the uploads that were under way.
func (l *ledger) resume(t *testing.T, reg oci.Registry) {
	t.Helper()
	for key, p := range l.uploads {
		content := contentOf(p.seed)
		u, err := reg.ResumeUpload(t.Context(), key.repo, key.name)
		if err != nil {
			t.Errorf("upload with %d acknowledged bytes: %v", p.size, err)
			continue
		}
		if u.Size() < p.size {
			t.Errorf("upload has %d bytes, and %d were acknowledged", u.Size(), p.size)
		}
		if err := u.Append(t.Context(), u.Size(), bytes.NewReader(content[u.Size():])); err != nil {
			t.Errorf("resumed upload: %v", err)
		}
		if _, err := u.Commit(t.Context(), oci.DigestOf(content)); err != nil {
			t.Errorf("resumed upload: %v", err)
		}
		l.resumed++
		delete(l.uploads, key)
		l.blobs[at{key.repo, oci.DigestOf(content).String()}] = p.seed
	}
}

// merge adds what another, later ledger has.
func (l *ledger) merge(o *ledger) {
	for k, v := range o.blobs {
		l.blobs[k] = v
	}
	for k := range o.deleted {
		l.deleted[k] = true
	}
	for k, v := range o.manifests {
		l.manifests[k] = v
	}
	for k, v := range o.referrers {
		l.referrers[k] = v
	}
	for k, v := range o.tags {
		l.tags[k], l.maybe[k] = v, o.maybe[k]
	}
	for k, v := range o.maybe {
		if _, ok := o.tags[k]; !ok {
			l.maybe[k] = append(l.maybe[k], v...)
		}
	}
	l.resumed += o.resumed
}

// checkVisible reads everything that the registry lists.
func checkVisible(t *testing.T, reg oci.Registry) {
	t.Helper()
	ctx := t.Context()
	for repo, err := range reg.Repositories(ctx, "") {
		if err != nil {
			t.Fatal(err)
		}
		for tag, err := range reg.Tags(ctx, repo, "") {
			if err != nil {
				t.Fatal(err)
			}
			if _, err := reg.GetManifest(ctx, repo, tag); err != nil {
				t.Errorf("listed tag %s of %s: %v", tag, repo, err)
			}
		}
		for i := range 5 {
			for desc, err := range reg.Referrers(ctx, repo, oci.DigestOf([]byte(fmt.Sprint("subject", i))), "") {
				if err != nil {
					t.Fatal(err)
				}
				if _, err := reg.GetManifest(ctx, repo, desc.Digest.String()); err != nil {
					t.Errorf("listed referrer: %v", err)
				}
			}
		}
	}
}

// checkFiles checks that each manifest and blob in the tree is what its name
// says, and that no manifest lacks a blob.
func checkFiles(t *testing.T, data string) {
	t.Helper()
	err := filepath.WalkDir(filepath.Join(data, "repositories"), func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		content, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		part := filepath.Base(filepath.Dir(name))
		if part != "_layers" && part != "_manifests" {
			return nil
		}
		if got := fmt.Sprintf("sha256:%x", sha256.Sum256(content)); got != e.Name() {
			t.Errorf("%s: content has the digest %s", name, got)
		}
		if part == "_manifests" {
			var m oci.ImageManifest
			if err := json.Unmarshal(content, &m); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			config := filepath.Join(strings.TrimSuffix(filepath.Dir(name), part), "_layers", m.Config.Digest.String())
			if info, err := os.Stat(config); err != nil || info.Size() != m.Config.Size {
				t.Errorf("%s refers to what isn't there: %v", name, err)
			}
		}
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
}
