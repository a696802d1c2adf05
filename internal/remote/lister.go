package remote

import (
	"context"
	"encoding/json"
	"iter"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"sluice/oci"
)

// Bounds of a listing. A server that goes on beyond them is not believed.
const (
	maxListing   = 64 << 20 // bytes of all pages
	maxPages     = 10_000
	maxLinkParts = 32 // links per header that are looked at
)

// Repositories implements oci.Lister.
func (r *Registry) Repositories(ctx context.Context, last string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		c := call{
			what:   "listing repositories",
			method: http.MethodGet,
			url:    r.endpoint("_catalog", afterQuery(last)),
			scopes: []string{"registry:catalog:*"},
			again:  true,
		}
		decode := func(page []byte) ([]string, error) {
			var doc struct {
				Repositories []string `json:"repositories"`
			}
			err := json.Unmarshal(page, &doc)
			return doc.Repositories, err
		}
		// The catalog isn't in distribution-spec, and not all registries have it.
		r.names(ctx, c, last, oci.ErrUnsupported, decode, oci.CheckRepository, yield)
	}
}

// Tags implements oci.Lister.
func (r *Registry) Tags(ctx context.Context, repo, last string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		if err := oci.CheckRepository(repo); err != nil {
			yield("", err)
			return
		}
		c := call{
			what:   "listing the tags of " + repo,
			method: http.MethodGet,
			url:    r.endpoint(repo+"/tags/list", afterQuery(last)),
			scopes: pull(repo),
			again:  true,
		}
		decode := func(page []byte) ([]string, error) {
			var doc struct {
				Tags []string `json:"tags"`
			}
			err := json.Unmarshal(page, &doc)
			return doc.Tags, err
		}
		r.names(ctx, c, last, oci.ErrNameUnknown, decode, oci.CheckTag, yield)
	}
}

func afterQuery(last string) url.Values {
	if last == "" {
		return nil
	}
	return url.Values{"last": {last}}
}

// names yields the valid names of all pages after last, in byte order. Servers
// order differently, so all pages are read before anything is yielded.
func (r *Registry) names(ctx context.Context, c call, last string, unknown *oci.Error, decode func([]byte) ([]string, error), check func(string) error, yield func(string, error) bool) {
	found := map[string]bool{}
	err := r.pages(ctx, c, unknown, func(page []byte) error {
		names, err := decode(page)
		if err != nil {
			return err
		}
		for _, name := range names {
			if name > last && check(name) == nil {
				found[name] = true
			}
		}
		return nil
	})
	if err != nil {
		yield("", err)
		return
	}
	for _, name := range slices.Sorted(maps.Keys(found)) {
		if err := ctx.Err(); err != nil {
			yield("", r.errorf(c, "%w", err))
			return
		}
		if !yield(name, nil) {
			return
		}
	}
}

// pages gets all pages of a listing, following Link headers, and gives them to
// use.
func (r *Registry) pages(ctx context.Context, c call, unknown *oci.Error, use func(page []byte) error) error {
	seen := map[oci.Digest]bool{} // digests, because a link may be long
	left := int64(maxListing)
	for {
		page := oci.DigestOf([]byte(c.url.String()))
		if seen[page] || len(seen) == maxPages {
			return r.errorf(c, "the pages link in a circle, or without an end (%d seen)", len(seen))
		}
		seen[page] = true
		resp, err := r.do(ctx, c)
		if err != nil {
			return err
		}
		if resp.StatusCode != http.StatusOK {
			return r.failure(c, resp, unknown)
		}
		content, err := r.readAll(c, resp, left)
		if err != nil {
			return err
		}
		left -= int64(len(content))
		if err := use(content); err != nil {
			return r.errorf(c, "what came (%.100q, %d bytes) is not the list: %w: %s", contentType(resp), len(content), err, snippet(content))
		}
		link := nextLink(resp.Header.Values("Link"))
		if link == "" {
			return nil
		}
		next, err := r.resolve(c.url, link)
		if err != nil || next.Scheme != r.base.Scheme || next.Host != r.base.Host {
			return r.errorf(c, "the next page is linked as %.100q, which is not on this registry", snippet([]byte(link)))
		}
		c.url = next
	}
}

// nextLink returns the target of the first link of relation "next" in Link
// headers (RFC 8288, section 3), or "".
func nextLink(headers []string) string {
	for _, header := range headers {
		for range maxLinkParts {
			_, rest, ok := strings.Cut(header, "<")
			if !ok {
				break
			}
			target, rest, ok := strings.Cut(rest, ">")
			if !ok {
				break
			}
			params, rest := linkParams(rest)
			if hasRelation(params, "next") {
				return strings.TrimSpace(target)
			}
			header = rest
		}
	}
	return ""
}

// linkParams splits what follows a link's target into its parameters and what
// follows the comma after them, which a quoted value may contain as well.
func linkParams(s string) (params []string, rest string) {
	quoted, begin := false, 0
	for i := 0; i < len(s); i++ {
		switch {
		case quoted && s[i] == '\\':
			i++
		case s[i] == '"':
			quoted = !quoted
		case quoted:
		case s[i] == ';':
			params = append(params, s[begin:i])
			begin = i + 1
		case s[i] == ',':
			return append(params, s[begin:i]), s[i+1:]
		}
	}
	return append(params, s[begin:]), ""
}

func hasRelation(params []string, relation string) bool {
	for _, param := range params {
		name, value, _ := strings.Cut(param, "=")
		if !strings.EqualFold(strings.TrimSpace(name), "rel") {
			continue
		}
		for _, r := range strings.Fields(strings.Trim(strings.TrimSpace(value), `"`)) {
			if strings.EqualFold(r, relation) {
				return true
			}
		}
	}
	return false
}
