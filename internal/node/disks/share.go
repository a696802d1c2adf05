package disks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	"sluice/internal/blob"
	"sluice/internal/node/smb"
	"sluice/internal/teleport/mountapi"
	"sluice/oci"
)

// repoName names a repository of a registry, spelled as in references.
type repoName struct{ registry, repository string }

// repo is a repository that images come from. It has one share, whatever that is
// called and wherever it is: the registry says so with each credential.
type repo struct {
	repoName
	share smb.Share
	pulls map[oci.Digest]int // under way, by the image's manifest; guarded by Manager.mu

	// mu guards what follows. It's a leaf lock.
	mu      sync.Mutex
	given   *smb.Login // by the registry, and not yet passed on
	expires time.Time  // of the last
	server  string     // and where it was for, HOST/SHARE
	problem error      // of the last time that the registry was asked, or the share
}

// repoOf returns a repository, making it known. The caller has m.mu.
func (m *Manager) repoOf(name repoName) *repo {
	r := m.repos[name]
	if r == nil {
		r = &repo{repoName: name, pulls: make(map[oci.Digest]int)}
		r.share = m.opts.Share(func(ctx context.Context, refused string) (smb.Login, error) { return m.login(ctx, r, refused) })
		m.repos[name] = r
	}
	return r
}

// give has the share's next login be that of an answer.
func (r *repo) give(s *mountapi.SMB) {
	l := r.noteLogin(s)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.given = &l
}

// noteLogin returns the login of an answer, and remembers where it is for.
func (r *repo) noteLogin(s *mountapi.SMB) smb.Login {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.given, r.expires, r.server = nil, s.Expires, s.Server+"/"+s.Share
	return smb.Login{Server: s.Server, Share: s.Share, Username: s.Username, Password: s.Password, Expires: s.Expires}
}

// take returns the login that was given last, if nobody had it yet and it's of use.
func (r *repo) take(refused string) (smb.Login, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.given
	r.given = nil
	if l == nil || refused != "" && l.Password == refused || !l.Expires.IsZero() && !time.Now().Before(l.Expires) {
		return smb.Login{}, false
	}
	return *l, true
}

// noteProblem remembers what the registry or the share answered last.
func (r *repo) noteProblem(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.problem = err
}

// trouble is 1 if there's a problem, 0 otherwise.
func (r *repo) trouble() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.problem != nil {
		return 1
	}
	return 0
}

// maxAsked bounds the images that a registry is asked for, for one login.
const maxAsked = 3

// login returns what the repository's share is reached with: from the last answer, or
// else the registry is asked once more where the disks are, of any image there.
func (m *Manager) login(ctx context.Context, r *repo, refused string) (smb.Login, error) {
	if l, ok := r.take(refused); ok {
		return l, nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, m.opts.Decide, fmt.Errorf("registry %s didn't give a credential within %v", r.registry, m.opts.Decide))
	defer cancel()
	var errs []error
	for _, manifest := range m.manifests(r) {
		answer, err := m.ask(ctx, r.repoName, manifest.String())
		if err == nil && answer.SMB == nil {
			err = errElsewhere
		}
		if err == nil {
			// Whether it has expired isn't looked at: the clocks may differ.
			l := r.noteLogin(answer.SMB)
			if refused == "" || l.Password != refused {
				r.noteProblem(nil)
				return l, nil
			}
			err = fmt.Errorf("%w; registry %s has no others", smb.ErrRefused, r.registry)
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	err := errors.Join(errs...)
	if len(errs) == 0 {
		err = fmt.Errorf("no image of %s/%s is here any more", r.registry, r.repository)
	}
	err = fmt.Errorf("credential for the disks of %s/%s: %w", r.registry, r.repository, err)
	r.noteProblem(err)
	return smb.Login{}, err
}

// manifests returns some images that came from a repository, or are coming, by their
// manifests, the latest used first.
func (m *Manager) manifests(r *repo) []oci.Digest {
	m.mu.Lock()
	defer m.mu.Unlock()
	var found []*image
	for _, img := range m.images {
		if slices.ContainsFunc(img.origins, func(o origin) bool { return o.repo() == r.repoName }) {
			found = append(found, img)
		}
	}
	slices.SortFunc(found, func(a, b *image) int { return b.used.Compare(a.used) })
	all := slices.Collect(maps.Keys(r.pulls))
	for _, img := range found {
		if !slices.Contains(all, img.record.Manifest) {
			all = append(all, img.record.Manifest)
		}
	}
	return all[:min(len(all), maxAsked)]
}

// source returns a disk's file, wherever it is, for reading what the cache lacks.
func (m *Manager) source(d *disk) blob.Source {
	return blob.Retry(blob.Count(&places{m, d}, &m.counter), m.opts.Retry)
}

// places is a disk's file in the shares that have it. Those that failed last are asked
// last.
type places struct {
	m *Manager
	d *disk
}

// Size implements blob.Source.
func (s *places) Size() int64 { return s.d.Size }

// ReadRange implements blob.Source.
func (s *places) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	s.m.mu.Lock()
	list := slices.Clone(s.d.places)
	s.m.mu.Unlock()
	slices.SortStableFunc(list, func(a, b place) int { return a.repo.trouble() - b.repo.trouble() })
	if blob.Doubted(ctx) && len(list) > 1 { // the first sent something else
		list = slices.Concat(list[1:], list[:1])
	}
	var errs []error
	for _, p := range list {
		r, err := p.repo.share.Open(p.path, s.d.Size, s.d.Digest).ReadRange(ctx, off, n)
		if err == nil {
			return &noted{ReadCloser: r, repo: p.repo, given: func() bool { return ctx.Err() == nil }}, nil
		}
		if ctx.Err() == nil {
			p.repo.noteProblem(err)
		}
		errs = append(errs, fmt.Errorf("share of %s/%s: %w", p.repo.registry, p.repo.repository, err))
		if ctx.Err() != nil {
			break
		}
	}
	if len(errs) == 0 {
		return nil, fmt.Errorf("disk %s is nowhere to be read from", s.d.Digest)
	}
	return nil, errors.Join(errs...)
}

// noted is a stream whose end, good or bad, is remembered of where it comes from.
type noted struct {
	io.ReadCloser
	repo  *repo
	given func() bool // somebody still waits for it
}

// Read implements io.Reader.
func (r *noted) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	switch {
	case err == io.EOF:
		r.repo.noteProblem(nil)
	case err != nil && r.given():
		r.repo.noteProblem(err)
	}
	return n, err
}

// dropRepos forgets the repositories of which no disk is here, and returns them to be
// closed. The caller has m.mu.
func (m *Manager) dropRepos() map[repoName]*repo {
	used := make(map[*repo]bool)
	for _, d := range m.disks {
		for _, p := range d.places {
			used[p.repo] = true
		}
	}
	gone := make(map[repoName]*repo)
	for name, r := range m.repos {
		if !used[r] && len(r.pulls) == 0 {
			gone[name] = r
			delete(m.repos, name)
		}
	}
	return gone
}

// closeAll disconnects from the shares of repositories.
func closeAll(repos map[repoName]*repo) error {
	var errs []error
	for name, r := range repos {
		if err := r.share.Close(); err != nil {
			errs = append(errs, fmt.Errorf("share of %s/%s: %w", name.registry, name.repository, err))
		}
	}
	return errors.Join(errs...)
}
