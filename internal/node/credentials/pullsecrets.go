package credentials

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"sluice/internal/remote"
)

// PullSecrets are Kubernetes pull secrets as files: each path is a file in one
// of docker's formats (of secrets of type kubernetes.io/dockerconfigjson and
// kubernetes.io/dockercfg), a secret mounted as a directory, or a directory of
// such directories. They are read anew each time, so a changed secret counts at
// once.
type PullSecrets struct {
	paths []string
}

// NewPullSecrets returns the secrets at some paths as a source. They need not be
// there yet.
func NewPullSecrets(paths ...string) *PullSecrets { return &PullSecrets{paths} }

// Name implements Source.
func (*PullSecrets) Name() string { return "pull secrets" }

// maxSecrets bounds how many files are read for one request.
const maxSecrets = 256

// The keys of secrets with credentials, which are the names of files where one
// is mounted.
var secretKeys = [...]string{".dockerconfigjson", ".dockercfg"}

// Credential implements Source: of several secrets that match, it's the first
// that isn't refused.
func (p *PullSecrets) Credential(_ context.Context, req Request) (remote.Credential, time.Time, error) {
	req = req.ofImage()
	found, worst := remote.Credential{}, ErrNone
	for i, name := range p.files() {
		if i == maxSecrets {
			worst = fmt.Errorf("there are more than %d files", maxSecrets)
			break
		}
		c, err := fileAuths(name, req)
		switch {
		case err == nil && !req.refused(c):
			return c, time.Time{}, nil
		case err == nil:
			found = c
		case !errors.Is(err, ErrNone):
			worst = err
		}
	}
	if found != (remote.Credential{}) {
		worst = nil
	}
	return found, time.Time{}, worst
}

// version implements versioned.
func (p *PullSecrets) version(Request) string {
	var all strings.Builder
	for i, name := range p.files() {
		if i == maxSecrets {
			break
		}
		all.WriteString(fileVersion(name) + "\n")
	}
	return all.String()
}

// files returns the files of all secrets, those of each path by name.
func (p *PullSecrets) files() []string {
	var all []string
	for _, path := range p.paths {
		if fi, err := os.Stat(path); err == nil && !fi.IsDir() {
			all = append(all, path)
			continue
		}
		all = append(all, secretFiles(path)...)
		entries, err := os.ReadDir(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			all = append(all, path) // reading it tells why
		}
		for _, e := range entries {
			if len(all) > maxSecrets {
				return all
			}
			if e.Name()[0] != '.' { // those that begin with two points are Kubernetes' own
				all = append(all, secretFiles(filepath.Join(path, e.Name()))...)
			}
		}
	}
	return all
}

// secretFiles returns the files of a mounted secret.
func secretFiles(dir string) []string {
	var files []string
	for _, key := range secretKeys {
		if name := filepath.Join(dir, key); exists(name) {
			files = append(files, name)
		}
	}
	return files
}

func exists(name string) bool {
	fi, err := os.Stat(name)
	return err == nil && fi.Mode().IsRegular()
}
