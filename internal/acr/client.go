package acr

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"sluice/internal/auth"
	"sluice/internal/remote"
	"sluice/oci"
)

// Client is the other end of Handler's API. Use NewClient. Its methods may be
// called concurrently; their errors are as remote.Registry.Call's, so
// errors.Is(err, ErrTagUnknown) works.
type Client struct {
	registry *remote.Registry
}

// NewClient returns a client of the registry at host. It doesn't connect yet.
func NewClient(host string, opts remote.Options) (*Client, error) {
	reg, err := remote.New(host, opts)
	if err != nil {
		return nil, err
	}
	return &Client{reg}, nil
}

// ClientOf returns a client of a registry.
func ClientOf(reg *remote.Registry) *Client { return &Client{reg} }

// Registry returns the registry that the client is of.
func (c *Client) Registry() *remote.Registry { return c.registry }

// ListOptions says what of a list is wanted.
type ListOptions struct {
	// OrderBy is timeasc, timedesc (by the last update) or, if empty, name.
	OrderBy string

	// Top is how many entries are wanted at most; 0: all.
	Top int

	// Digest keeps the tags of one manifest only.
	Digest oci.Digest
}

// Bounds of a list: a server that goes on beyond them is not believed.
const (
	maxPages   = 10_000
	maxEntries = 1_000_000
)

// call sends a request with a document, which may be nil, and reads the answer
// into to, which may be nil.
func (c *Client) call(ctx context.Context, req remote.APIRequest, doc, to any) (http.Header, error) {
	req.Path = prefix + req.Path
	if len(req.Scopes) == 0 {
		req.Scopes = []string{administration().String()}
	}
	if doc != nil {
		body, err := json.Marshal(doc)
		if err != nil {
			return nil, err
		}
		req.Body = body
	}
	answer, err := c.registry.Call(ctx, req)
	if err != nil {
		return nil, explain(err)
	}
	if to != nil {
		if err := json.Unmarshal(answer.Body, to); err != nil {
			return nil, fmt.Errorf("%s at %s: the answer isn't what the management API sends, is it a Sluice registry or Azure's? %w", req.What, c.registry.Host(), err)
		}
	}
	return answer.Header, nil
}

// explain says what a registry without this API answers.
func explain(err error) error {
	var coded *oci.Error
	if errors.As(err, &coded) && coded.Code == errNotFound.Code {
		return fmt.Errorf("%w (does the registry have the management API?)", err)
	}
	return err
}

// list gets the pages of a list until there are enough entries.
func list[Doc, T any](ctx context.Context, c *Client, req remote.APIRequest, opts ListOptions, entries func(Doc) []T) ([]T, error) {
	query := url.Values{}
	if opts.OrderBy != "" {
		query.Set("orderby", opts.OrderBy)
	}
	if opts.Digest != "" {
		query.Set("digest", opts.Digest.String())
	}
	all := []T{}
	for range maxPages {
		query.Set("n", strconv.Itoa(defaultPage))
		if opts.Top > 0 {
			query.Set("n", strconv.Itoa(min(defaultPage, opts.Top-len(all))))
		}
		req.Query = query
		var doc Doc
		header, err := c.call(ctx, req, nil, &doc)
		if err != nil {
			return nil, err
		}
		all = append(all, entries(doc)...)
		if opts.Top > 0 && len(all) >= opts.Top {
			return all[:opts.Top], nil
		}
		last := lastOf(header)
		if last == "" {
			return all, nil
		}
		if len(all) > maxEntries {
			break
		}
		if last == query.Get("last") {
			return nil, fmt.Errorf("%s at %s: the pages link in a circle", req.What, c.registry.Host())
		}
		query.Set("last", last)
	}
	return nil, fmt.Errorf("%s at %s: the list doesn't end", req.What, c.registry.Host())
}

// lastOf returns where the next page begins, as a Link header says it.
func lastOf(h http.Header) string {
	link, _, _ := strings.Cut(h.Get("Link"), ";")
	u, err := url.Parse(strings.Trim(link, " <>"))
	if err != nil {
		return ""
	}
	return u.Query().Get("last")
}

func scope(repo string, actions ...string) []string {
	return []string{auth.ToRepository(repo, actions...).String()}
}

// Repositories lists the repositories' names.
func (c *Client) Repositories(ctx context.Context, opts ListOptions) ([]string, error) {
	return list(ctx, c, remote.APIRequest{What: "listing repositories", Path: "_catalog", Scopes: []string{auth.Catalog().String()}},
		opts, func(d catalogDocument) []string { return d.Repositories })
}

// Repository returns a repository's attributes. Errors: oci.ErrNameUnknown.
func (c *Client) Repository(ctx context.Context, repo string) (r Repository, err error) {
	_, err = c.call(ctx, remote.APIRequest{What: "repository " + repo, Path: repo, Scopes: scope(repo, auth.ActionMetadataRead)}, nil, &r)
	return r, err
}

// UpdateRepository changes a repository's attributes and returns all of them.
// Errors: oci.ErrNameUnknown.
func (c *Client) UpdateRepository(ctx context.Context, repo string, changes AttributeChanges) (r Repository, err error) {
	_, err = c.call(ctx, update("repository "+repo, repo, repo), changes, &r)
	return r, err
}

func update(what, repo, path string) remote.APIRequest {
	return remote.APIRequest{
		What: "updating " + what, Method: http.MethodPatch, Path: path,
		Scopes: scope(repo, auth.ActionMetadataRead, auth.ActionMetadataWrite),
	}
}

func remove(what, repo, path string) remote.APIRequest {
	return remote.APIRequest{What: "deleting " + what, Method: http.MethodDelete, Path: path, Scopes: scope(repo, auth.ActionDelete)}
}

// DeleteRepository deletes a repository with all that is in it.
// Errors: oci.ErrNameUnknown, oci.ErrDenied if something in it is locked.
func (c *Client) DeleteRepository(ctx context.Context, repo string) (d DeletedContent, err error) {
	_, err = c.call(ctx, remove("repository "+repo, repo, repo), nil, &d)
	return d, err
}

// Tags lists a repository's tags. Errors: oci.ErrNameUnknown.
func (c *Client) Tags(ctx context.Context, repo string, opts ListOptions) ([]Tag, error) {
	return list(ctx, c, remote.APIRequest{What: "listing tags of " + repo, Path: repo + "/_tags", Scopes: scope(repo, auth.ActionMetadataRead)},
		opts, func(d tagsDocument) []Tag { return d.Tags })
}

// Tag returns a tag's attributes. Errors: oci.ErrNameUnknown, ErrTagUnknown.
func (c *Client) Tag(ctx context.Context, repo, tag string) (Tag, error) {
	var d tagDocument
	_, err := c.call(ctx, remote.APIRequest{What: "tag " + tag + " of " + repo, Path: repo + "/_tags/" + tag, Scopes: scope(repo, auth.ActionMetadataRead)}, nil, &d)
	return d.Tag, err
}

// UpdateTag changes a tag's attributes and returns all of them.
func (c *Client) UpdateTag(ctx context.Context, repo, tag string, changes AttributeChanges) (Tag, error) {
	var d tagDocument
	_, err := c.call(ctx, update("tag "+tag+" of "+repo, repo, repo+"/_tags/"+tag), changes, &d)
	return d.Tag, err
}

// DeleteTag deletes a tag and leaves the manifest.
func (c *Client) DeleteTag(ctx context.Context, repo, tag string) error {
	_, err := c.call(ctx, remove("tag "+tag+" of "+repo, repo, repo+"/_tags/"+tag), nil, nil)
	return err
}

// Manifests lists a repository's manifests. Errors: oci.ErrNameUnknown.
func (c *Client) Manifests(ctx context.Context, repo string, opts ListOptions) ([]Manifest, error) {
	return list(ctx, c, remote.APIRequest{What: "listing manifests of " + repo, Path: repo + "/_manifests", Scopes: scope(repo, auth.ActionMetadataRead)},
		opts, func(d manifestsDocument) []Manifest { return d.Manifests })
}

// Manifest returns a manifest's attributes. Errors: oci.ErrNameUnknown,
// oci.ErrManifestUnknown.
func (c *Client) Manifest(ctx context.Context, repo string, digest oci.Digest) (Manifest, error) {
	var d manifestDocument
	_, err := c.call(ctx, remote.APIRequest{What: "manifest " + digest.String() + " of " + repo, Path: repo + "/_manifests/" + digest.String(), Scopes: scope(repo, auth.ActionMetadataRead)}, nil, &d)
	return d.Manifest, err
}

// UpdateManifest changes a manifest's attributes and returns all of them.
func (c *Client) UpdateManifest(ctx context.Context, repo string, digest oci.Digest, changes AttributeChanges) (Manifest, error) {
	var d manifestDocument
	_, err := c.call(ctx, update("manifest "+digest.String()+" of "+repo, repo, repo+"/_manifests/"+digest.String()), changes, &d)
	return d.Manifest, err
}

// DeleteManifest deletes a manifest and every tag of it.
func (c *Client) DeleteManifest(ctx context.Context, repo string, digest oci.Digest) error {
	_, err := c.call(ctx, remove("manifest "+digest.String()+" of "+repo, repo, repo+"/_manifests/"+digest.String()), nil, nil)
	return err
}

// DeletedRepositories lists the repositories that are gone and have manifests
// that can be restored.
func (c *Client) DeletedRepositories(ctx context.Context) ([]DeletedRepository, error) {
	return list(ctx, c, remote.APIRequest{What: "listing deleted repositories", Path: "_deleted/_catalog", Scopes: []string{deletedCatalog().String()}},
		ListOptions{}, func(d deletedRepositoriesDocument) []DeletedRepository { return d.Repositories })
}

// DeletedManifests lists the manifests of a repository that can be restored, in
// the order of their deletion.
func (c *Client) DeletedManifests(ctx context.Context, repo string) ([]DeletedManifest, error) {
	var d deletedManifestsDocument
	_, err := c.call(ctx, remote.APIRequest{What: "listing deleted manifests of " + repo, Path: "_deleted/" + repo + "/_manifests", Scopes: scope(repo, auth.ActionMetadataRead)}, nil, &d)
	return d.Manifests, err
}

// Restore brings a deleted manifest back. It gets the tag, or without one the
// tags that named it. A tag that names another manifest now is moved only if
// forced, and is ErrConflict otherwise. Errors: oci.ErrManifestUnknown.
func (c *Client) Restore(ctx context.Context, repo string, digest oci.Digest, tag string, force bool) (r Restored, err error) {
	_, err = c.call(ctx, remote.APIRequest{
		What: "restoring " + digest.String() + " of " + repo, Method: http.MethodPost,
		Path:   "_deleted/" + repo + "/_manifests/" + digest.String(),
		Query:  url.Values{"force": {strconv.FormatBool(force)}},
		Scopes: scope(repo, auth.ActionPush),
	}, restoreRequest{tag}, &r)
	return r, err
}

// Usage returns how much a repository holds; with repo "" the whole registry.
func (c *Client) Usage(ctx context.Context, repo string) (u Usage, err error) {
	req := remote.APIRequest{What: "usage of the registry", Path: "_usage"}
	if repo != "" {
		req = remote.APIRequest{What: "usage of " + repo, Path: repo + "/_usage", Scopes: scope(repo, auth.ActionMetadataRead)}
	}
	_, err = c.call(ctx, req, nil, &u)
	return u, err
}

// Collect removes blobs that nothing needs and soft-deleted manifests whose
// time is over.
func (c *Client) Collect(ctx context.Context) (r Collected, err error) {
	_, err = c.call(ctx, remote.APIRequest{What: "collecting garbage", Method: http.MethodPost, Path: "_gc"}, nil, &r)
	return r, err
}

// Import begins an import. Operation tells what becomes of it.
func (c *Client) Import(ctx context.Context, r ImportRequest) (op Operation, err error) {
	_, target, err := r.parse()
	if err != nil {
		return op, err
	}
	scopes := append(scope(target.repo, auth.ActionPush), administration().String())
	_, err = c.call(ctx, remote.APIRequest{What: "importing " + r.Source, Method: http.MethodPost, Path: "_import", Scopes: scopes}, r, &op)
	return op, err
}

// Operation returns what became of an operation. Errors: ErrOperationUnknown.
func (c *Client) Operation(ctx context.Context, id string) (op Operation, err error) {
	_, err = c.call(ctx, remote.APIRequest{What: "operation " + id, Path: "_operations/" + id}, nil, &op)
	return op, err
}

// CancelOperation ends an operation that hasn't ended yet. Errors:
// ErrOperationUnknown.
func (c *Client) CancelOperation(ctx context.Context, id string) (op Operation, err error) {
	_, err = c.call(ctx, remote.APIRequest{What: "canceling operation " + id, Method: http.MethodPost, Path: "_operations/" + id + ":cancel"}, nil, &op)
	return op, err
}

// Wait asks for an operation every interval until it has ended, and tells
// progress, which may be nil, what each answer was.
func (c *Client) Wait(ctx context.Context, id string, interval time.Duration, progress func(Operation)) (Operation, error) {
	for {
		op, err := c.Operation(ctx, id)
		if err != nil {
			return op, err
		}
		if progress != nil {
			progress(op)
		}
		if op.Status.Final() {
			return op, nil
		}
		select {
		case <-ctx.Done():
			return op, ctx.Err()
		case <-time.After(interval):
		}
	}
}
