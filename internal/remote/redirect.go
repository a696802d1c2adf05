package remote

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"
)

const (
	// maxRedirects is what package net/http and containerd allow.
	maxRedirects = 10

	// placeLife is how long the place where a registry sent us for a blob is
	// used without asking the registry. Signed URLs of the object stores are
	// good for longer (5 minutes to an hour); one that isn't costs a round trip.
	placeLife = 4 * time.Minute

	maxPlaces = 1024
)

// locations remembers where a registry sent us for blobs, so that a range costs
// one round trip instead of two. The URLs carry signatures: they are good for
// whoever has them, so they stay with the Registry, and so with the credentials,
// that they were given to.
type locations struct {
	mu   sync.Mutex // guards kept
	kept map[string]location
}

type location struct {
	url   *url.URL
	until time.Time
}

func newLocations() *locations { return &locations{kept: make(map[string]location)} }

func (l *locations) get(place string) *url.URL {
	l.mu.Lock()
	defer l.mu.Unlock()
	if at, ok := l.kept[place]; ok && time.Now().Before(at.until) {
		return at.url
	}
	return nil
}

func (l *locations) put(place string, u *url.URL) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.kept) >= maxPlaces {
		clear(l.kept) // the next requests ask the registry again
	}
	l.kept[place] = location{u, time.Now().Add(placeLife)}
}

func (l *locations) forget(place string, u *url.URL) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.kept[place].url == u {
		delete(l.kept, place)
	}
}

// atKnownPlace asks where the registry sent us the last time. If that place is
// unknown, or doesn't give what is asked for, it returns nil: the registry will
// say more.
func (r *Registry) atKnownPlace(ctx context.Context, c call) *http.Response {
	if c.place == "" {
		return nil
	}
	u := r.places.get(c.place)
	if u == nil {
		return nil
	}
	resp, err := r.request(ctx, c, u, func(req *http.Request) (*http.Response, error) {
		req.Header.Set("User-Agent", r.opts.UserAgent)
		return r.plain.Do(req)
	})
	if err == nil && (resp.StatusCode == http.StatusOK || resp.StatusCode == http.StatusPartialContent) {
		return resp
	}
	if ctx.Err() == nil {
		r.places.forget(c.place, u)
	}
	if err == nil {
		r.opts.Log.Debug("a blob isn't where it was: the registry is asked anew", "what", c.what, "host", r.host, "place", u.Host, "status", resp.StatusCode)
		drain(resp)
	}
	return nil
}

// rememberPlace notes where an answer came from, unless the registry forbids it.
func (r *Registry) rememberPlace(c call, resp *http.Response) {
	if c.place == "" || !elsewhere(c, resp) || resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusPartialContent {
		return
	}
	for via := resp.Request.Response; via != nil; via = via.Request.Response {
		if strings.Contains(strings.ToLower(via.Header.Get("Cache-Control")), "no-store") {
			return
		}
	}
	r.places.put(c.place, resp.Request.URL)
}

// elsewhere reports whether an answer is that of another server than the one
// that was asked: where the registry sent us.
func elsewhere(c call, resp *http.Response) bool { return resp.Request.URL.Host != c.url.Host }

// expired reports whether an object store answers so when a signed URL has run
// out: S3 and GCS with 403 or 400, Azure with 403, others with 401, 404 or 410.
func expired(status int) bool {
	switch status {
	case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusGone:
		return true
	}
	return false
}

// checkRedirect returns an http.Client's CheckRedirect that keeps the registry's
// own headers from other servers.
func checkRedirect(private http.Header) func(*http.Request, []*http.Request) error {
	return func(req *http.Request, via []*http.Request) error {
		if len(via) >= maxRedirects {
			return fmt.Errorf("stopped after %d redirects", maxRedirects)
		}
		left := req.URL.Host != via[0].URL.Host
		for _, hop := range via[1:] {
			left = left || hop.URL.Host != via[0].URL.Host
		}
		if left { // net/http takes the first request's headers at each hop
			for name := range private {
				req.Header.Del(name)
			}
		}
		return nil
	}
}
