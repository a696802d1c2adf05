package hosts

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"

	"sluice/internal/blob"
	"sluice/internal/remote"
	"sluice/oci"
)

const (
	// lackLife is how long a host isn't asked again for what it doesn't have,
	// unless nobody else has it; a host whose content was wrong isn't for
	// lieLife.
	lackLife, lieLife = time.Minute, 10 * time.Minute

	// longEnough is how long a host must be asked to be blamed for the end of
	// somebody's patience.
	longEnough = 500 * time.Millisecond

	maxLacks = 1024 // things that are remembered of one place

	// lacksAll stands for everything: the host doesn't let us in.
	lacksAll = ""
)

// place is one host as the place of a repository.
type place struct {
	endpoint endpoint
	reader   *remote.Registry

	mu    sync.Mutex // guards lacks
	lacks map[string]time.Time
}

// places returns where a repository is, in the order in which to ask.
func (h *Hosts) places(host, repository string, c *config) ([]*place, error) {
	var credentials remote.CredentialFunc
	if h.opts.Credentials != nil {
		credentials = h.opts.Credentials(host, repository)
	}
	var all []*place
	for _, e := range c.hosts {
		opts := remote.Options{
			Transport: e.transport, Endpoint: e.url, Header: e.Header,
			ReferrersAPIOnly: !e.Capabilities.Has(docker.HostCapabilityResolve),
			Credentials:      credentials, Log: h.opts.Log,
		}
		if e.isMirrorOf(host) {
			opts.Namespace = host
		}
		if !e.last { // another host is a better second attempt than this one
			opts.ReadTimeout, opts.Retries = mirrorPatience, -1
		}
		reader, err := remote.New(e.url.Host, opts)
		if err != nil {
			return nil, err
		}
		all = append(all, &place{endpoint: e, reader: reader, lacks: make(map[string]time.Time)})
	}
	return all, nil
}

// isMirrorOf reports whether the host is another one than the registry that
// references name; it is told then which one is meant.
func (e *endpoint) isMirrorOf(registry string) bool {
	return e.Host != registry && (registry != "docker.io" || e.url.Host != dockerHub)
}

// without reports whether the place is known to lack a thing.
func (p *place) without(thing string, now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return now.Before(p.lacks[thing]) || now.Before(p.lacks[lacksAll])
}

// lack notes that the place lacks a thing.
func (p *place) lack(thing string, until time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.lacks) >= maxLacks {
		clear(p.lacks) // they are asked again
	}
	p.lacks[thing] = until
}

// note draws the conclusions of a request that began at a time, for a thing.
func (r *Registry) note(p *place, thing string, began time.Time, err error) {
	now := time.Now()
	if err != nil && isBroken(err) {
		if pause := p.endpoint.health.failed(began, now, err); pause > 0 && len(r.places) > 1 {
			r.log.Warn("a registry host fails and is left out", "registry", r.name, "host", p.endpoint.url.Host, "for", pause, "error", err)
		}
		return
	}
	if p.endpoint.health.worked(now) {
		r.log.Info("a registry host works again", "registry", r.name, "host", p.endpoint.url.Host)
	}
	switch {
	case err == nil || p.endpoint.last:
	case errors.Is(err, oci.ErrUnauthorized), errors.Is(err, oci.ErrDenied):
		p.lack(lacksAll, now.Add(lackLife))
	case errors.Is(err, oci.ErrDigestInvalid):
		r.lied(p, thing)
	default:
		p.lack(thing, now.Add(lackLife))
	}
}

// isBroken reports whether an error is about the host and not about what was
// asked for: no answer, a failure of its own, or nonsense.
func isBroken(err error) bool {
	var answer *oci.Error
	return !errors.As(err, &answer) || errors.Is(err, oci.ErrTooManyRequests)
}

// gaveUp reports whether a request that began at a time failed because nobody
// wants it any more. That whoever waits has no more patience is the host's
// failure, if that was asked long enough.
func gaveUp(ctx context.Context, began time.Time) bool {
	switch {
	case ctx.Err() == nil, errors.Is(context.Cause(ctx), blob.ErrStalled):
		return false
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return time.Since(began) < longEnough
	}
	return true
}

// probe asks a host that was left out whether it's back.
func (h *Hosts) probe(e endpoint) {
	h.background(func(ctx context.Context) {
		e.health.probed(time.Now(), e.ping(ctx))
	})
}

// ping asks for the API's version. Any answer will do, but for a failure.
func (e *endpoint) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, severalDial+mirrorPatience)
	defer cancel()
	u := *e.url
	u.Path = path.Join("/", u.Path) + "/"
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return err
	}
	for name, values := range e.Header {
		req.Header[http.CanonicalHeaderKey(name)] = values
	}
	resp, err := e.transport.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("%s doesn't answer: %w", e.url.Host, err)
	}
	if err := resp.Body.Close(); err != nil {
		return err
	}
	if resp.StatusCode >= http.StatusInternalServerError {
		return fmt.Errorf("%s answers %s", e.url.Host, resp.Status)
	}
	return nil
}
