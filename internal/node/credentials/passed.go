package credentials

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/durable"
	"sluice/internal/remote"
	"sluice/oci"
)

// Passed is what came with pulls: what kubelet passed by CRI, from pull secrets
// of pods that may be gone by now, or from its own plugins. Nobody can be asked
// for it again, so it is kept as long as an image of the repository is on the
// node. Use NewPassed.
type Passed struct {
	log  *slog.Logger
	file string // where it is stored; empty: nowhere

	saving sync.Mutex // held while the file is written; taken before mu

	mu   sync.Mutex // guards what follows
	kept []passed   // newest last
}

// passed is a credential that came with a pull.
type passed struct {
	Host       string            `json:"host"`
	Repository string            `json:"repository"`
	Credential remote.Credential `json:"credential"`
	// At is when it came, and Seen when an image of the repository was last
	// seen on the node.
	At   time.Time `json:"at"`
	Seen time.Time `json:"seen"`
	// Proven: a pull with it succeeded.
	Proven bool `json:"proven"`
}

func (p passed) is(host, repository string) bool { return p.Host == host && p.Repository == repository }

const (
	// maxPassed bounds how many are kept, maxPassedOf of one repository:
	// pods of several tenants may use an image, each with a secret of its own.
	maxPassed, maxPassedOf = 2048, 4

	// maxPassedFile bounds the file, in bytes, and maxPassedText each part of
	// a credential.
	maxPassedFile, maxPassedText = 64 << 20, 16 << 10

	// pullTime is how long after a pull an image may be missing in lists.
	pullTime = time.Hour

	// passedAge is how long one is kept when nobody ever lists images.
	passedAge = 90 * 24 * time.Hour
)

// NewPassed returns what was passed to an earlier daemon, as far as it was
// stored. The file, if its name isn't empty, keeps it for the next daemon,
// readable by its owner alone, and only on a file system in memory (tmpfs,
// ramfs). That it can't be read is only logged: a daemon must start. A nil log
// discards.
func NewPassed(file string, log *slog.Logger) *Passed {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	p := &Passed{log: log}
	if file == "" {
		return p
	}
	if err := inMemory(filepath.Dir(file)); err != nil {
		log.Warn("what CRI passes is lost when this daemon ends", "file", file, "error", err)
		return p
	}
	p.file = file
	if err := p.load(); err != nil {
		log.Warn("what CRI passed with earlier pulls is lost", "file", file, "error", err)
	}
	return p
}

// Name implements Source.
func (*Passed) Name() string { return "CRI" }

// Credential implements Source: the newest that a pull succeeded with, or is
// just being tried with; one that isn't refused if there's any.
func (p *Passed) Credential(_ context.Context, req Request) (remote.Credential, time.Time, error) {
	req = req.ofImage()
	p.mu.Lock()
	defer p.mu.Unlock()
	found, err := remote.Credential{}, ErrNone
	for _, one := range slices.Backward(p.kept) {
		if !one.is(req.Host, req.Repository) {
			continue
		}
		if !req.refused(one.Credential) {
			return one.Credential, time.Time{}, nil
		}
		found, err = one.Credential, nil
	}
	return found, time.Time{}, err
}

// version implements versioned. It tells nobody the credentials, nor in which
// order they came.
func (p *Passed) version(req Request) string {
	req = req.ofImage()
	p.mu.Lock()
	defer p.mu.Unlock()
	var sums []string
	for _, one := range p.kept {
		if one.is(req.Host, req.Repository) {
			c := one.Credential
			sums = append(sums, fmt.Sprintf("%x", sha256.Sum256(fmt.Appendf(nil, "%q", []string{c.Username, c.Password, c.RefreshToken, c.AccessToken}))))
		}
	}
	slices.Sort(sums)
	return strings.Join(sums, " ")
}

// Pull notes the credential of a pull that begins, for the repository that ref
// names, and returns what is to be called with the pull's error when it ends. A
// credential of a failed pull is forgotten, unless it has proven right before.
func (p *Passed) Pull(ref string, c remote.Credential) (end func(error)) {
	nothing := func(error) {}
	r, err := oci.ParseReference(ref)
	if err != nil || c == (remote.Credential{}) {
		return nothing
	}
	for _, s := range []string{c.Username, c.Password, c.RefreshToken, c.AccessToken} {
		if len(s) > maxPassedText {
			p.log.Warn("the credential that came with a pull is too long to be kept", "image", r.String(), "bytes", len(s))
			return nothing
		}
	}
	one := passed{Host: r.Registry, Repository: r.Repository, Credential: c, At: time.Now(), Seen: time.Now()}
	p.add(one)
	return func(err error) { p.end(one, err == nil) }
}

// add adds one, or makes it the newest if it's there.
func (p *Passed) add(one passed) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := p.index(one); i >= 0 {
		one.Proven = p.kept[i].Proven
		p.kept = slices.Delete(p.kept, i, i+1)
	}
	p.kept = append(p.kept, one)
	p.kept = slices.Delete(p.kept, 0, max(0, len(p.kept)-maxPassed))
}

// index returns where one is kept, or -1; p.mu is held.
func (p *Passed) index(one passed) int {
	return slices.IndexFunc(p.kept, func(k passed) bool {
		return k.is(one.Host, one.Repository) && k.Credential == one.Credential
	})
}

// end notes how a pull with a credential ended.
func (p *Passed) end(one passed, right bool) {
	p.mu.Lock()
	i := p.index(one)
	known := i >= 0 && p.kept[i].Proven
	switch {
	case i < 0 || known:
	case right:
		p.kept[i].Proven = true
		p.trim(one)
	default:
		p.kept = slices.Delete(p.kept, i, i+1)
	}
	p.mu.Unlock()
	if i >= 0 && right && !known {
		p.save()
	}
}

// trim leaves the newest proven ones of one's repository; p.mu is held.
func (p *Passed) trim(one passed) {
	n := 0
	for i := len(p.kept) - 1; i >= 0; i-- {
		if k := p.kept[i]; !k.Proven || !k.is(one.Host, one.Repository) {
			continue
		}
		if n++; n > maxPassedOf {
			p.kept = slices.Delete(p.kept, i, i+1)
		}
	}
}

// Listed tells which images are on the node, by all their names. What was passed
// for others is forgotten, unless it was only lately.
func (p *Passed) Listed(refs []string) {
	type repository struct{ host, name string }
	here := make(map[repository]bool)
	for _, ref := range refs {
		if r, err := oci.ParseReference(ref); err == nil {
			here[repository{r.Registry, r.Repository}] = true
		}
	}
	now := time.Now()
	p.mu.Lock()
	before := len(p.kept)
	p.kept = slices.DeleteFunc(p.kept, func(one passed) bool {
		return !here[repository{one.Host, one.Repository}] && now.Sub(one.At) > pullTime
	})
	for i, one := range p.kept {
		if here[repository{one.Host, one.Repository}] {
			p.kept[i].Seen = now
		}
	}
	changed := len(p.kept) != before
	p.mu.Unlock()
	if changed {
		p.save()
	}
}

// save writes what is proven.
func (p *Passed) save() {
	if p.file == "" {
		return
	}
	p.saving.Lock()
	defer p.saving.Unlock()
	p.mu.Lock()
	all := slices.DeleteFunc(slices.Clone(p.kept), func(one passed) bool { return !one.Proven })
	p.mu.Unlock()
	content, err := json.Marshal(all)
	if err == nil {
		err = durable.WriteFile(p.file, content, 0o600)
	}
	if err != nil {
		p.log.Warn("what CRI passed can't be stored: the next daemon won't have it", "error", err)
	}
}

// load reads the file, if there's one.
func (p *Passed) load() error {
	f, err := os.OpenFile(p.file, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Mode&0o077 != 0 || int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("it has mode %#o and owner %d: only a file that nobody else can read or write is believed", st.Mode, st.Uid)
	}
	content, err := io.ReadAll(io.LimitReader(f, maxPassedFile+1))
	if err != nil {
		return err
	}
	if len(content) > maxPassedFile {
		return fmt.Errorf("it has more than %d bytes", maxPassedFile)
	}
	p.kept, err = parsePassed(content, time.Now())
	return err
}

// parsePassed reads what save wrote.
func parsePassed(content []byte, now time.Time) ([]passed, error) {
	var all []passed
	if json.Unmarshal(content, &all) != nil {
		return nil, errors.New("it isn't what this program writes") // the error may quote a secret
	}
	all = slices.DeleteFunc(all, func(one passed) bool {
		return one.Credential == (remote.Credential{}) || now.Sub(one.Seen) > passedAge && now.Sub(one.At) > passedAge
	})
	return all[max(0, len(all)-maxPassed):], nil
}

// inMemory returns an error unless a directory is on a file system in memory.
func inMemory(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	if st.Type != unix.TMPFS_MAGIC && st.Type != unix.RAMFS_MAGIC {
		return fmt.Errorf("%s isn't on a file system in memory, and secrets aren't stored on disks", dir)
	}
	return nil
}
