package mount

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"sluice/internal/durable"
	"sluice/internal/node/plane"
	"sluice/oci"
)

// Claim is a mount that somebody asked for by Mount. It survives restarts and
// reboots, unless it belongs to a process.
type Claim struct {
	ID        string     `json:"id"`
	Image     oci.Digest `json:"image"`
	Reference string     `json:"reference"`
	Created   time.Time  `json:"created"`

	// Dir is where the image is mounted for the claimant; empty if Path is
	// all that was asked for. Writable: changes are kept aside, and thrown
	// away by Unmount.
	Dir      string `json:"dir,omitempty"`
	Writable bool   `json:"writable,omitempty"`

	// PID and Started name the process with which the claim ends; 0: none.
	PID     int    `json:"pid,omitempty"`
	Started uint64 `json:"started,omitempty"` // clock ticks since boot, from /proc

	// Path is the image's own mount, shared by all who use it.
	Path string `json:"path"`
}

// claim is a Claim and its lock.
type claim struct {
	Claim
	lock chan struct{} // holds a token while nobody mounts or unmounts it
}

// Request says what Mount should mount.
type Request struct {
	Reference string
	Dir       string // an existing directory, absolute; may be empty
	Writable  bool   // needs Dir
	PID       int    // the claim ends with this process; 0: with Unmount
}

// Mount makes the image that a reference names visible in a directory. The
// layers' diff IDs are checked against the image's own config, which is
// returned.
func (m *Manager) Mount(ctx context.Context, req Request) (Claim, []byte, error) {
	c, err := newClaim(req)
	if err != nil {
		return Claim{}, nil, err
	}
	img, config, err := m.PullChecked(ctx, req.Reference)
	if err != nil {
		return Claim{}, nil, err
	}
	c.Image, c.Reference = img.ID, img.Reference
	if c.Path, err = m.Attach(ctx, img.ID, Merged, c.owner()); err != nil {
		return Claim{}, nil, err
	}
	if err = m.makeClaim(c); err != nil {
		err = errors.Join(err, m.Release(context.WithoutCancel(ctx), c.owner()))
		return Claim{}, nil, err
	}
	return c.Claim, config, nil
}

func newClaim(req Request) (*claim, error) {
	var id [6]byte
	if _, err := rand.Read(id[:]); err != nil {
		return nil, err
	}
	c := &claim{
		Claim: Claim{
			ID: hex.EncodeToString(id[:]), Created: time.Now(),
			Dir: req.Dir, Writable: req.Writable, PID: req.PID,
		},
		lock: make(chan struct{}, 1),
	}
	c.lock <- struct{}{}
	if req.Dir == "" {
		if req.Writable {
			return nil, errors.New("a writable mount needs a directory")
		}
	} else if err := c.checkDir(); err != nil {
		return nil, err
	}
	if req.PID != 0 {
		started, err := ProcessStart(req.PID)
		if err != nil {
			return nil, fmt.Errorf("process %d: %w", req.PID, err)
		}
		c.Started = started
	}
	return c, nil
}

// checkDir checks that something can be mounted on the claim's directory, and
// gives it the form that the mount table has.
func (c *claim) checkDir() error {
	if !filepath.IsAbs(c.Dir) {
		return fmt.Errorf("%q isn't an absolute path", c.Dir)
	}
	fi, err := os.Stat(c.Dir)
	if err != nil {
		return err
	}
	if !fi.IsDir() {
		return fmt.Errorf("%s isn't a directory", c.Dir)
	}
	if c.Dir, err = plane.CleanDir(c.Dir); err != nil {
		return err
	}
	if at, err := plane.MountAt(c.Dir); err != nil {
		return err
	} else if at != nil {
		return fmt.Errorf("something is mounted on %s already: unmount it first, or use another directory", c.Dir)
	}
	return nil
}

func (c *claim) owner() string { return "claim/" + c.ID }

// makeClaim records a claim, then mounts it: what a crash leaves of it is
// found at the next start.
func (m *Manager) makeClaim(c *claim) error {
	content, err := json.MarshalIndent(c.Claim, "", "  ")
	if err != nil {
		return err
	}
	file := filepath.Join(m.claimsDir(), c.ID+".json")
	if err := durable.WriteFile(file, content, 0o600); err != nil {
		return fmt.Errorf("record the mount: %w", err)
	}
	if err := m.show(c); err != nil {
		return errors.Join(err, durable.Remove(file), os.RemoveAll(m.scratch(c)))
	}
	m.addClaim(c)
	return nil
}

func (m *Manager) addClaim(c *claim) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.claims[c.ID] = c
}

// scratch is where a writable claim's changes go.
func (m *Manager) scratch(c *claim) string { return filepath.Join(m.claimsDir(), c.ID) }

// show mounts the image's own mount on the claim's directory.
func (m *Manager) show(c *claim) error {
	if c.Dir == "" {
		return nil
	}
	if !c.Writable {
		return plane.BindRestricted(c.Path, c.Dir)
	}
	if err := os.Mkdir(m.scratch(c), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return plane.MountOverlayRestricted([]string{c.Path}, m.scratch(c), c.Dir)
}

// ErrUnknownClaim: nothing was mounted under this name.
var ErrUnknownClaim = errors.New("not mounted by this daemon")

// Unmount ends a claim, named by its ID or directory. It fails with
// plane.ErrBusy, and changes nothing, when the directory is in use.
func (m *Manager) Unmount(ctx context.Context, name string) error {
	c, err := m.findClaim(name)
	if err != nil {
		return err
	}
	select {
	case <-c.lock:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { c.lock <- struct{}{} }()
	return m.endClaim(ctx, c)
}

// endClaim unmounts a claim and forgets it, or does neither. The caller has the
// claim's lock.
func (m *Manager) endClaim(ctx context.Context, c *claim) error {
	if c.Dir != "" {
		if err := plane.Unmount(c.Dir, false); err != nil && !errors.Is(err, plane.ErrNotAttached) {
			return err
		}
	}
	return m.dropClaim(ctx, c)
}

func (m *Manager) findClaim(name string) (*claim, error) {
	dir := name
	if filepath.IsAbs(name) {
		if clean, err := plane.CleanDir(name); err == nil {
			dir = clean
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range m.claims {
		if c.ID == name || c.Dir != "" && c.Dir == dir {
			return c, nil
		}
	}
	return nil, fmt.Errorf("%s: %w", name, ErrUnknownClaim)
}

// dropClaim forgets a claim that isn't mounted any more.
func (m *Manager) dropClaim(ctx context.Context, c *claim) error {
	m.mu.Lock()
	delete(m.claims, c.ID)
	m.mu.Unlock()
	err := durable.Remove(filepath.Join(m.claimsDir(), c.ID+".json"))
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, os.RemoveAll(m.scratch(c)), m.Release(context.WithoutCancel(ctx), c.owner()))
}

// Claims lists what is mounted by Mount, in no order.
func (m *Manager) Claims() []Claim {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := make([]Claim, 0, len(m.claims))
	for _, c := range m.claims {
		list = append(list, c.Claim)
	}
	return list
}

// restoreTimeout bounds how long a start waits for mounts that people asked for:
// what the disk lost of their images comes from registries, which may be away.
// restoreAtOnce is how many are made at the same time.
const (
	restoreTimeout = 10 * time.Second
	restoreAtOnce  = 8
)

// loadClaims mounts again, after a start, what was claimed. What can't be mounted
// now is tried at the next start.
func (m *Manager) loadClaims(ctx context.Context) {
	ctx, cancel := context.WithTimeoutCause(ctx, restoreTimeout, fmt.Errorf("not restored within %v", restoreTimeout))
	defer cancel()
	entries, err := os.ReadDir(m.claimsDir())
	if err != nil {
		m.log.ErrorContext(ctx, "the record of mounts can't be read", "error", err)
		return
	}
	var group errgroup.Group
	group.SetLimit(restoreAtOnce)
	var showing sync.Mutex
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".json") || durable.IsTemp(e.Name()) {
			continue
		}
		group.Go(func() error {
			if err := m.loadClaim(ctx, filepath.Join(m.claimsDir(), e.Name()), &showing); err != nil {
				m.log.ErrorContext(ctx, "a mount can't be restored", "record", e.Name(), "error", err)
			}
			return nil
		})
	}
	_ = group.Wait() // none fails
}

// loadClaim mounts one claim again. showing is held while something is mounted on
// claims' directories: two may have the same, when one couldn't be mounted at the
// last start.
func (m *Manager) loadClaim(ctx context.Context, file string, showing *sync.Mutex) error {
	content, err := durable.ReadFile(file, oci.MaxManifestSize)
	if err != nil {
		return err
	}
	c := &claim{lock: make(chan struct{}, 1)}
	c.lock <- struct{}{}
	if err := json.Unmarshal(content, &c.Claim); err != nil {
		return err
	}
	if c.ID+".json" != filepath.Base(file) {
		return fmt.Errorf("it belongs to claim %q", c.ID)
	}
	if c.gone() {
		if err := m.endClaim(ctx, c); !errors.Is(err, plane.ErrBusy) {
			return err
		}
		m.addClaim(c) // the sweep tries again
		return nil
	}
	if c.Path, err = m.Attach(ctx, c.Image, Merged, c.owner()); err != nil {
		return err
	}
	showing.Lock()
	defer showing.Unlock()
	if err := m.showAgain(c); err != nil {
		return err
	}
	m.addClaim(c)
	return nil
}

// showAgain mounts a claim after a start, unless its mount is still there and
// still good.
func (m *Manager) showAgain(c *claim) error {
	if c.Dir == "" {
		return nil
	}
	at, err := plane.MountAt(c.Dir)
	if err != nil {
		return err
	}
	own, err := plane.MountAt(c.Path)
	if err != nil {
		return err
	}
	if at != nil && (c.Writable || own != nil && at.Major == own.Major && at.Minor == own.Minor) {
		return nil
	}
	if at != nil { // of a mount that lost its content
		if err := plane.Unmount(c.Dir, true); err != nil {
			return err
		}
	}
	return m.show(c)
}

// gone reports whether the process to which a claim belongs has ended.
func (c *claim) gone() bool {
	if c.PID == 0 {
		return false
	}
	started, err := ProcessStart(c.PID)
	return err != nil || started != c.Started
}

// sweepClaims ends the claims whose process or mount has gone.
func (m *Manager) sweepClaims(ctx context.Context) {
	m.mu.Lock()
	var list []*claim
	for _, c := range m.claims {
		list = append(list, c)
	}
	m.mu.Unlock()
	for _, c := range list {
		select {
		case <-c.lock:
		default:
			continue
		}
		if err := m.sweepClaim(ctx, c); err != nil {
			m.log.WarnContext(ctx, "an abandoned mount stays", "claim", c.ID, "directory", c.Dir, "error", err)
		}
		c.lock <- struct{}{}
	}
}

func (m *Manager) sweepClaim(ctx context.Context, c *claim) error {
	if c.gone() {
		return m.endClaim(ctx, c)
	}
	if c.Dir == "" {
		return nil
	}
	at, err := plane.MountAt(c.Dir)
	if err != nil || at != nil {
		return err
	}
	return m.dropClaim(ctx, c) // somebody used umount(8)
}
