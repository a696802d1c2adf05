package registry

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// certificateAge is how long a certificate is used before its files are looked
// at again.
const certificateAge = 5 * time.Second

// Certificate is a TLS certificate that follows its files: when they change,
// connections that begin afterwards get the new one, and those that are open
// keep the old. While the files are broken, or a new certificate stands beside
// an old key, the old pair stays in use. Use LoadCertificate. Its methods may be
// called concurrently.
type Certificate struct {
	certFile, keyFile string
	log               *slog.Logger

	mu      sync.Mutex
	pair    *tls.Certificate
	state   [2]fileState // of the files when they were last read, even in vain
	checked time.Time
}

// fileState tells one version of a file from the next.
type fileState struct {
	modified time.Time
	size     int64
	inode    os.FileInfo // for os.SameFile: a secret of Kubernetes is replaced, not written
}

// LoadCertificate reads a certificate chain and its key, both PEM. A nil log
// discards what is said of later changes.
func LoadCertificate(certFile, keyFile string, log *slog.Logger) (*Certificate, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	c := &Certificate{certFile: certFile, keyFile: keyFile, log: log}
	if err := c.Reload(); err != nil {
		return nil, err
	}
	return c, nil
}

// Reload reads the files now, as on SIGHUP. After an error the old pair is used
// on.
func (c *Certificate) Reload() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.read(c.look())
}

// TLSConfig returns the configuration of a server with this certificate: TLS
// 1.2 or newer, HTTP/2 where the client speaks it.
func (c *Certificate) TLSConfig() *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS12,
		NextProtos:     []string{"h2", "http/1.1"},
		GetCertificate: c.get,
	}
}

func (c *Certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.checked) < certificateAge {
		return c.pair, nil
	}
	if state := c.look(); !same(state, c.state) {
		if err := c.read(state); err != nil {
			c.log.Error("the TLS certificate has changed and can't be used: the old one stays", "error", err)
		} else {
			c.log.Info("the TLS certificate has changed", "file", c.certFile, "until", c.pair.Leaf.NotAfter)
		}
	}
	return c.pair, nil
}

// look returns the state of both files; of one that can't be looked at, none.
func (c *Certificate) look() (state [2]fileState) {
	c.checked = time.Now()
	for i, name := range []string{c.certFile, c.keyFile} {
		if info, err := os.Stat(name); err == nil {
			state[i] = fileState{info.ModTime(), info.Size(), info}
		}
	}
	return state
}

func same(a, b [2]fileState) bool {
	for i := range a {
		if !a[i].modified.Equal(b[i].modified) || a[i].size != b[i].size ||
			(a[i].inode == nil) != (b[i].inode == nil) || a[i].inode != nil && !os.SameFile(a[i].inode, b[i].inode) {
			return false
		}
	}
	return true
}

// read reads the files, whose state was looked at before. A pair that doesn't
// match, as while the two are being replaced, is an error.
func (c *Certificate) read(state [2]fileState) error {
	c.state = state
	pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		return fmt.Errorf("TLS certificate %s with key %s: %w", c.certFile, c.keyFile, err)
	}
	if c.pair != nil && time.Now().After(pair.Leaf.NotAfter) {
		return fmt.Errorf("TLS certificate %s ran out on %v", c.certFile, pair.Leaf.NotAfter)
	}
	c.pair = &pair
	return nil
}
