package credentials

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"sluice/internal/remote"
)

// ErrNone is what a Source returns that has nothing for a request.
var ErrNone = errors.New("none")

// Request says what a credential is wanted for.
type Request struct {
	// Host is who asks for it, spelled as in references: "docker.io",
	// "127.0.0.1:5000". Of a mirror it is the mirror's own.
	Host string

	// Registry is the one in the image's name; empty: Host. It is another if
	// Host is its mirror or the server that it was moved to.
	Registry string

	// Repository has no host in it: "library/debian".
	Repository string

	// Refused are those that the registry refused in the last minute. A source
	// that can should return, or get, another one, and otherwise one of these.
	Refused []remote.Credential
}

// Image is the repository as kubelet and its plugins write it.
func (r Request) Image() string { return cmp.Or(r.Registry, r.Host) + "/" + r.Repository }

// ofImage is the request to a source of kubelet's: those go by the image's name,
// and containerd passes what they have to whatever host stands for its registry.
func (r Request) ofImage() Request {
	r.Host = cmp.Or(r.Registry, r.Host)
	return r
}

func (r Request) refused(c remote.Credential) bool { return slices.Contains(r.Refused, c) }

// Source is somebody who has credentials. Its methods may be called
// concurrently.
type Source interface {
	// Name is how people call it: "docker's configuration".
	Name() string

	// Credential returns what proves who we are, and until when it is good;
	// the zero time if that isn't known. The error is ErrNone if the source has
	// nothing for the request. It answers within a few seconds.
	Credential(ctx context.Context, req Request) (c remote.Credential, until time.Time, err error)
}

// renewer is a Source that can renew what it holds ahead of time.
type renewer interface {
	// run renews until ctx ends, and returns when nothing of it runs any more.
	run(ctx context.Context)
}

// versioned is a Source that can tell, without asking anybody, whether what it
// has for a request may be something else than before.
type versioned interface {
	// version returns a value that changes then.
	version(req Request) string
}

const (
	// refusedFor is how long a refused credential isn't tried again.
	refusedFor = time.Minute

	// maxUses bounds how many repositories the chain remembers.
	maxUses = 4096

	// maxRefused bounds how many refused credentials of one repository.
	maxRefused = 16
)

// Chain asks sources in turn. Use New.
type Chain struct {
	log     *slog.Logger
	sources []Source

	mu   sync.Mutex // guards what follows; nothing is waited for under it
	uses map[use]*state
}

// use is what a credential is used for.
type use struct{ host, repository string }

// state is what is known of a use.
type state struct {
	status  Status
	refused []refusal // newest last
	bare    bool      // a request was just told to go on without credentials
	asked   time.Time
	logged  string // what the log said last
}

// refusal is that a registry didn't accept a credential of a source.
type refusal struct {
	credential remote.Credential
	reason     string
	at         time.Time
}

// Status is how a node proves who it is to a registry, for one repository. There
// are no secrets in it.
type Status struct {
	Host       string `json:"host"`
	Repository string `json:"repository"`

	// Source is whose credential is used; empty: none, requests are anonymous.
	Source string `json:"source,omitempty"`

	// Until is when it expires, if that is known, and Since when it was first
	// used.
	Until time.Time `json:"until,omitzero"`
	Since time.Time `json:"since,omitzero"`

	// Error is what the registry says to a request without credentials, if it
	// was tried because nothing else was left.
	Error string `json:"error,omitempty"`

	// Passed are the sources that were asked before, and why their
	// credentials aren't used; of those that have none there's no mention.
	// Source itself is among them if it was refused and is tried once more.
	Passed []Outcome `json:"passed,omitempty"`
}

// Outcome is why a source's credential isn't used.
type Outcome struct {
	Source string `json:"source"`
	Reason string `json:"reason"`
}

// New returns a chain of sources, the first one first. A nil log discards.
func New(log *slog.Logger, sources ...Source) *Chain {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Chain{log: log, sources: sources, uses: make(map[use]*state)}
}

// Run renews what the sources hold ahead of its end, until ctx ends. Without it
// credentials are renewed when they are next asked for.
func (c *Chain) Run(ctx context.Context) {
	var wg sync.WaitGroup
	for _, s := range c.sources {
		if r, ok := s.(renewer); ok {
			wg.Go(func() { r.run(ctx) })
		}
	}
	wg.Wait()
}

// For returns the credentials for a repository of a registry, for a client of
// that or of another host that stands for it.
func (c *Chain) For(registry, repository string) remote.CredentialFunc {
	return func(ctx context.Context, host string) (remote.Credential, error) {
		return c.credential(ctx, Request{Host: host, Registry: registry, Repository: repository})
	}
}

// Version returns a value that changes when there may be other credentials for a
// repository of a registry than before: others came with a pull, or files were
// changed. Whom else a source would have to ask isn't looked at.
func (c *Chain) Version(registry, repository string) string {
	var all []string
	for _, s := range c.sources {
		if v, ok := s.(versioned); ok {
			all = append(all, v.version(Request{Host: registry, Registry: registry, Repository: repository}))
		}
	}
	return strings.Join(all, "\n")
}

// credential asks the sources in turn. A request that begins gets the first
// refused credential if there are no others: a registry may have refused it by
// mistake.
func (c *Chain) credential(ctx context.Context, req Request) (remote.Credential, error) {
	refused, again := remote.RefusalOf(ctx)
	c.begin(&req, refused, again)
	var spare remote.Credential
	var status, once Status // once more: with spare
	for _, s := range c.sources {
		cred, until, err := s.Credential(ctx, req)
		if ctx.Err() != nil {
			return remote.Credential{}, context.Cause(ctx)
		}
		switch {
		case errors.Is(err, ErrNone) || err == nil && cred == (remote.Credential{}):
		case err != nil:
			status.Passed = append(status.Passed, Outcome{s.Name(), err.Error()})
		case req.refused(cred):
			if spare == (remote.Credential{}) {
				spare, once = cred, Status{Source: s.Name(), Until: until}
			}
			status.Passed = append(status.Passed, Outcome{s.Name(), c.blame(req, cred)})
		case !until.IsZero() && !time.Now().Before(until):
			status.Passed = append(status.Passed, Outcome{s.Name(), fmt.Sprintf("expired at %s", until.UTC().Format(time.RFC3339))})
		default:
			status.Source, status.Until = s.Name(), until
			c.end(req, status, true)
			return cred, nil
		}
	}
	if refused.Credential == (remote.Credential{}) && again {
		status.Error = "refused without credentials: " + refused.Reason
		c.end(req, status, true)
		return remote.Credential{}, errors.New(explain(status.Passed))
	}
	if spare != (remote.Credential{}) && !c.bare(req, again) {
		once.Passed = status.Passed // its own reason, too: it isn't known yet what becomes of it
		c.end(req, once, false)
		return spare, nil
	}
	// That the request goes on without credentials is no news: the registry says
	// what it thinks of that.
	c.end(req, status, false)
	return remote.Credential{}, nil
}

// bare reports whether a request goes on without credentials, since all are
// refused: it was told so when one was (again), and then asks once more.
func (c *Chain) bare(req Request, again bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.state(req, time.Now())
	was := s.bare
	s.bare = again
	return again || was
}

// explain says why no source's credential was of use.
func explain(passed []Outcome) string {
	if len(passed) == 0 {
		return "this node has no credentials for it"
	}
	var parts []string
	for _, o := range passed {
		parts = append(parts, o.Source+": "+o.Reason)
	}
	return strings.Join(parts, "; ")
}

// begin notes a refusal, and fills in which credentials were refused lately.
func (c *Chain) begin(req *Request, r remote.Refusal, again bool) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.state(*req, now)
	s.refused = slices.DeleteFunc(s.refused, func(f refusal) bool {
		return now.Sub(f.at) > refusedFor || again && f.credential == r.Credential
	})
	if again && r.Credential != (remote.Credential{}) {
		s.refused = append(s.refused, refusal{r.Credential, r.Reason, now})
		s.refused = s.refused[max(0, len(s.refused)-maxRefused):]
	}
	for _, f := range s.refused {
		req.Refused = append(req.Refused, f.credential)
	}
}

// state returns the state of a request's use, a new one if need be; c.mu is
// held.
func (c *Chain) state(req Request, now time.Time) *state {
	u := use{req.Host, req.Repository}
	s, ok := c.uses[u]
	if !ok {
		if len(c.uses) >= maxUses {
			c.dropOldest()
		}
		s = &state{status: Status{Host: req.Host, Repository: req.Repository}}
		c.uses[u] = s
	}
	s.asked = now
	return s
}

// dropOldest forgets the use that was asked for longest ago; c.mu is held.
func (c *Chain) dropOldest() {
	var oldest use
	var at time.Time
	for u, s := range c.uses {
		if at.IsZero() || s.asked.Before(at) {
			oldest, at = u, s.asked
		}
	}
	delete(c.uses, oldest)
}

// blame returns what a registry said of a credential.
func (c *Chain) blame(req Request, cred remote.Credential) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.uses[use{req.Host, req.Repository}]; s != nil {
		for _, f := range s.refused {
			if f.credential == cred {
				return "refused: " + f.reason
			}
		}
	}
	return "refused"
}

// end notes what became of a request, and with tell tells the log if that is
// news.
func (c *Chain) end(req Request, status Status, tell bool) {
	now := time.Now()
	status.Host, status.Repository, status.Since = req.Host, req.Repository, now
	news := status.Source + "\n" + status.Error + "\n" + explain(status.Passed)
	c.mu.Lock()
	s := c.state(req, now)
	if s.status.Source == status.Source && s.status.Until.Equal(status.Until) {
		status.Since = cmp.Or(s.status.Since, now)
	}
	s.status = status
	tell = tell && s.logged != news
	if tell {
		s.logged = news
	}
	c.mu.Unlock()
	if tell {
		c.tell(status)
	}
}

// tell writes a status to the log.
func (c *Chain) tell(s Status) {
	log := c.log.With("registry", s.Host, "repository", s.Repository)
	switch {
	case s.Source == "":
		log.Warn("a registry refuses this node", "error", s.Error, "sources", explain(s.Passed))
	case len(s.Passed) > 0:
		log.Warn("credentials of a registry can't be used", "used", s.Source, "instead of", explain(s.Passed))
	default:
		log.Debug("credentials of a registry", "used", s.Source, "until", s.Until)
	}
}

// Status tells of every use of the last time, by host and repository.
func (c *Chain) Status() []Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := make([]Status, 0, len(c.uses))
	for _, s := range c.uses {
		all = append(all, s.status)
	}
	slices.SortFunc(all, func(a, b Status) int {
		return cmp.Or(cmp.Compare(a.Host, b.Host), cmp.Compare(a.Repository, b.Repository))
	})
	return all
}
