package hosts

import (
	"context"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"

	"sluice/internal/blob"
	"sluice/internal/remote"
	"sluice/oci"
)

// Registry reads one repository at the hosts of its registry, which are asked in
// the order of their file until one has the answer. Hosts that failed lately,
// and those that lack what is asked for, come last. The word of the last host of
// the file, the registry itself, is final; its error is what is returned, with
// those of the others in its text.
//
// A context of blob.Doubt says that what came was wrong: the host that it came
// from isn't asked for it again for some minutes, unless no other host works.
//
// It may be used concurrently. The repository that methods are given must be the
// one that Hosts.Registry was called with.
type Registry struct {
	name   string // of the registry, as in references
	places []*place
	log    *slog.Logger
	probe  func(endpoint)

	mu     sync.Mutex            // guards served
	served map[oci.Digest]answer // that a blob was last read from
}

// answer is one that began.
type answer struct {
	place *place
	asked time.Time
}

var (
	_ oci.Reader = (*Registry)(nil)
	_ oci.Lister = (*Registry)(nil)
)

// Capabilities that an answer needs (containerd's docs/hosts.md).
const (
	pull      = docker.HostCapabilityPull
	resolve   = docker.HostCapabilityPull | docker.HostCapabilityResolve
	referrers = docker.HostCapabilityReferrers
)

// Itself returns the registry without its mirrors.
func (r *Registry) Itself() *remote.Registry { return r.places[len(r.places)-1].reader }

// able returns the places that have a capability, in the file's order.
func (r *Registry) able(c docker.HostCapabilities) []*place {
	var able []*place
	for _, p := range r.places {
		if p.endpoint.Capabilities.Has(c) {
			able = append(able, p)
		}
	}
	return able
}

// order returns places in the order in which to ask for a thing: the first n are
// worth asking before the others. They are followed by those of spare that work.
func (r *Registry) order(ctx context.Context, able, spare []*place, thing string) (order []*place, n int) {
	if len(r.places) == 1 {
		return able, len(able)
	}
	ready, rest := r.sift(able, thing)
	if blob.Doubted(ctx) { // the registry itself is least likely to be wrong
		slices.Reverse(ready)
	}
	readySpare, restSpare := r.sift(spare, thing)
	return slices.Concat(ready, readySpare, rest, restSpare), len(ready)
}

// sift tells which places to ask for a thing, and which only if these don't work.
func (r *Registry) sift(places []*place, thing string) (ready, rest []*place) {
	now := time.Now()
	for _, p := range places {
		out, probe := p.endpoint.health.state(now)
		if probe {
			r.probe(p.endpoint)
		}
		if out || p.without(thing, now) {
			rest = append(rest, p)
		} else {
			ready = append(ready, p)
		}
	}
	return ready, rest
}

// ask asks places for a thing, one after another; those of spare only if none of
// the others works.
func ask[T any](ctx context.Context, r *Registry, able, spare []*place, thing string, get func(*place) (T, error)) (T, error) {
	var none T
	if len(able) == 0 {
		return none, oci.ErrUnsupported.Withf("no host of registry %s may be asked for %s: see \"capabilities\" in its hosts.toml", r.name, thing)
	}
	self := able[len(able)-1]
	order, n := r.order(ctx, able, spare, thing)
	var final error // what the registry itself says
	var others []string
	for i, p := range order {
		if i >= n && final != nil && !isBroken(final) {
			break
		}
		began := time.Now()
		v, err := get(p)
		if err == nil {
			r.note(p, thing, began, nil)
			return v, nil
		}
		if gaveUp(ctx, began) {
			return none, err
		}
		r.note(p, thing, began, err)
		if p == self {
			final = err
		} else {
			others = append(others, err.Error())
		}
		if ctx.Err() != nil {
			break
		}
	}
	switch {
	case final == nil:
		return none, fmt.Errorf("%w: %s", context.Cause(ctx), strings.Join(others, "; "))
	case len(others) == 0:
		return none, final
	}
	return none, fmt.Errorf("%w; its mirrors: %s", final, strings.Join(others, "; "))
}

// GetBlob implements oci.Reader.
func (r *Registry) GetBlob(ctx context.Context, repo string, digest oci.Digest) (oci.BlobReader, error) {
	return r.read(ctx, digest, func(p *place) (oci.BlobReader, error) { return p.reader.GetBlob(ctx, repo, digest) })
}

// GetBlobRange implements oci.Reader.
func (r *Registry) GetBlobRange(ctx context.Context, repo string, digest oci.Digest, offset, length int64) (oci.BlobReader, error) {
	return r.read(ctx, digest, func(p *place) (oci.BlobReader, error) {
		return p.reader.GetBlobRange(ctx, repo, digest, offset, length)
	})
}

// read opens a blob, or a range of one.
func (r *Registry) read(ctx context.Context, digest oci.Digest, open func(*place) (oci.BlobReader, error)) (oci.BlobReader, error) {
	thing := "blob " + digest.String()
	if before, ok := blob.DoubtedBefore(ctx); ok {
		r.doubt(digest, thing, before)
	}
	return ask(ctx, r, r.able(pull), nil, thing, func(p *place) (oci.BlobReader, error) {
		began := time.Now()
		body, err := open(p)
		if err != nil || len(r.places) == 1 {
			return body, err
		}
		r.remember(digest, answer{p, began})
		return &blobReader{BlobReader: body, failed: func(err error) {
			if !gaveUp(ctx, began) {
				r.note(p, thing, began, err)
			}
		}}, nil
	})
}

// blobReader tells when an answer breaks off.
type blobReader struct {
	oci.BlobReader
	failed func(error)
}

func (b *blobReader) Read(p []byte) (int, error) {
	n, err := b.BlobReader.Read(p)
	if err != nil && err != io.EOF {
		b.failed(err)
	}
	return n, err
}

// remember notes where a blob is read.
func (r *Registry) remember(digest oci.Digest, a answer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.served) >= maxLacks {
		clear(r.served)
	}
	r.served[digest] = a
}

// doubt is for a blob whose content was wrong. Who was asked for it since isn't to
// blame: what came from there may have been cut, and is asked for again.
func (r *Registry) doubt(digest oci.Digest, thing string, before time.Time) {
	r.mu.Lock()
	a, ok := r.served[digest]
	if ok = ok && a.asked.Before(before); ok {
		delete(r.served, digest)
	}
	r.mu.Unlock()
	if ok {
		r.lied(a.place, thing)
	}
}

// lied is for a host that sent something else than what it was asked for.
func (r *Registry) lied(p *place, thing string) {
	life := lieLife
	if p.endpoint.last {
		life = time.Second // for the next attempt; others are asked before it anyway
	}
	p.lack(thing, time.Now().Add(life))
	r.log.Warn("a registry host sends wrong content, others are asked for it", "registry", r.name, "host", p.endpoint.url.Host, "content", thing, "for", life)
}

// ResolveBlob implements oci.Reader.
func (r *Registry) ResolveBlob(ctx context.Context, repo string, digest oci.Digest) (oci.Descriptor, error) {
	return ask(ctx, r, r.able(pull), nil, "blob "+digest.String(), func(p *place) (oci.Descriptor, error) {
		return p.reader.ResolveBlob(ctx, repo, digest)
	})
}

// GetManifest implements oci.Reader.
func (r *Registry) GetManifest(ctx context.Context, repo, reference string) (oci.Manifest, error) {
	return ask(ctx, r, r.able(needs(reference)), nil, "manifest "+reference, func(p *place) (oci.Manifest, error) {
		return p.reader.GetManifest(ctx, repo, reference)
	})
}

// ResolveManifest implements oci.Reader.
func (r *Registry) ResolveManifest(ctx context.Context, repo, reference string) (oci.Descriptor, error) {
	return ask(ctx, r, r.able(needs(reference)), nil, "manifest "+reference, func(p *place) (oci.Descriptor, error) {
		return p.reader.ResolveManifest(ctx, repo, reference)
	})
}

// needs is which capability a manifest needs: nothing tells whether the digest
// that a host has for a tag is right.
func needs(reference string) docker.HostCapabilities {
	if strings.Contains(reference, ":") {
		return pull
	}
	return resolve
}

// Referrers implements oci.Lister. A mirror that knows of none is not believed:
// many don't keep referrers. Hosts that may say what a tag is stand in for those
// that may tell of referrers, a capability that older files don't know.
func (r *Registry) Referrers(ctx context.Context, repo string, subject oci.Digest, artifactType string) iter.Seq2[oci.Descriptor, error] {
	able := r.able(referrers)
	spare := slices.DeleteFunc(r.able(resolve), func(p *place) bool { return slices.Contains(able, p) })
	if len(able) == 0 {
		able, spare = spare, nil
	}
	return list(func() ([]oci.Descriptor, error) {
		return ask(ctx, r, able, spare, "referrers of "+subject.String(), func(p *place) ([]oci.Descriptor, error) {
			all, err := collect(p.reader.Referrers(ctx, repo, subject, artifactType))
			if err == nil && len(all) == 0 && p != able[len(able)-1] {
				err = oci.ErrManifestUnknown.Withf("%s knows no referrers of %s", p.endpoint.url.Host, subject)
			}
			return all, err
		})
	})
}

// Tags implements oci.Lister.
func (r *Registry) Tags(ctx context.Context, repo, last string) iter.Seq2[string, error] {
	return list(func() ([]string, error) {
		return ask(ctx, r, r.able(resolve), nil, "the list of tags", func(p *place) ([]string, error) {
			return collect(p.reader.Tags(ctx, repo, last))
		})
	})
}

// Repositories implements oci.Lister.
func (r *Registry) Repositories(ctx context.Context, last string) iter.Seq2[string, error] {
	return list(func() ([]string, error) {
		return ask(ctx, r, r.able(resolve), nil, "the list of repositories", func(p *place) ([]string, error) {
			return collect(p.reader.Repositories(ctx, last))
		})
	})
}

// collect reads a whole sequence. Those of package remote are in memory anyway.
func collect[T any](seq iter.Seq2[T, error]) ([]T, error) {
	var all []T
	for v, err := range seq {
		if err != nil {
			return nil, err
		}
		all = append(all, v)
	}
	return all, nil
}

// list is the sequence of what get returns.
func list[T any](get func() ([]T, error)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		all, err := get()
		if err != nil {
			var none T
			yield(none, err)
			return
		}
		for _, v := range all {
			if !yield(v, nil) {
				return
			}
		}
	}
}
