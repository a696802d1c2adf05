package cache

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
)

// recentFile records chunks that are in the data file but perhaps only in the
// kernel's page cache yet. It is written with every chunk and never synced:
// that outlives the process, and nothing more is asked of it, because it
// counts only while the machine has not been booted again. So a daemon that is
// killed every second still makes progress, and what containers have read is
// there for the next daemon even if the registry is not.
//
// It is a state file (see state.go) behind the ID of the boot it belongs to.
const recentFile = "recent"

// bootIDSize is the length of a boot ID, a UUID in text form.
const bootIDSize = 36

// bootID identifies this boot of the machine (random(4)). It is empty where
// that can't be told; nothing is recorded as recent then.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil || len(strings.TrimSpace(string(b))) != bootIDSize {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// openRecent takes over what a process that ended in this boot had recorded,
// or begins the file. The cache works without it, so errors only cost.
func (c *content) openRecent() {
	if c.boot == "" || c.complete.Load() {
		return
	}
	name := filepath.Join(c.dir, recentFile)
	if f, known := c.readRecent(name); f != nil {
		c.takeOver(known)
		c.recent = f
		return
	}
	if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
		c.noteRecent(err)
		return
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		_, err = f.Write(append([]byte(c.boot), c.emptyState()...))
		if err != nil {
			f.Close()
			f = nil
		}
	}
	c.recent = f
	c.noteRecent(err)
}

// readRecent opens the file and returns what it records, or nil if it isn't
// one of this boot.
func (c *content) readRecent(name string) (*os.File, []recorded) {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return nil, nil
	}
	file := make([]byte, bootIDSize+c.fileSize())
	info, err := f.Stat()
	if err == nil && info.Size() == int64(len(file)) {
		if _, err = f.ReadAt(file, 0); err == nil && bytes.HasPrefix(file, []byte(c.boot)) {
			if known, _, err := c.parse(file[bootIDSize:]); err == nil {
				return f, known
			}
		}
	}
	f.Close()
	return nil, nil
}

// noteRecent tells that a restart will cost.
func (c *content) noteRecent(err error) {
	if err != nil {
		c.log.Warn("chunks are not recorded until they are on disk: a killed daemon will fetch the last ones again", "error", err)
	}
}

// takeOver claims chunks that the state file doesn't know yet, and has the
// next flush record them. Like all that is claimed they are checked before
// they are served. Nobody else has c.
func (c *content) takeOver(known []recorded) {
	for _, k := range known {
		if c.chunks[k.chunk].Load() != 0 {
			continue
		}
		c.crcs[k.chunk].Store(k.crc)
		c.chunks[k.chunk].Store(claimed)
		c.pending = append(c.pending, k.chunk)
	}
}

// remember records a chunk that has just been written to data.
func (c *content) remember(i int) {
	if c.recent == nil {
		return
	}
	e := c.entry(i, c.crcs[i].Load())
	// Not recorded is merely fetched again after a restart.
	_, _ = c.recent.WriteAt(e[:], bootIDSize+stateHeaderSize+int64(i)*stateEntrySize)
}
