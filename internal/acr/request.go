package acr

import (
	"net/http"
	"net/url"
	"slices"
	"strings"

	"sluice/internal/auth"
	"sluice/oci"
)

// prefix is where the API is.
const prefix = "/acr/v1/"

// Request is a request by its path. Names in it have been checked for their
// form, except those of tokens and scope maps, which package auth knows.
type Request struct {
	endpoints endpoints // by method
	lesser    *endpoint // of PATCH, for who lacks its access; may be nil
	kind      string    // of the path, for metrics: "acr_tags"

	Repository string
	Tag        string
	Digest     oci.Digest

	// Name is that of a token, a scope map or an operation; Password is
	// password1 or password2.
	Name, Password string

	Query url.Values
}

// endpoint is what serves a method at a path, and the access that it needs.
type endpoint struct {
	handle func(h *Handler, w http.ResponseWriter, r *http.Request, req Request) error
	need   func(req Request) []auth.Access
}

// endpoints are those of one path by their method.
type endpoints map[string]endpoint

// The access that endpoints need. A caller must have all that one returns.

func readsMetadata(req Request) []auth.Access { return access(req.Repository, auth.ActionMetadataRead) }
func writesMetadata(req Request) []auth.Access {
	return access(req.Repository, auth.ActionMetadataWrite)
}
func deletes(req Request) []auth.Access { return access(req.Repository, auth.ActionDelete) }

// restores puts content back, as a push would.
func restores(req Request) []auth.Access { return access(req.Repository, auth.ActionPush) }

func access(repo, action string) []auth.Access {
	return []auth.Access{auth.ToRepository(repo, action)}
}

func listsCatalog(Request) []auth.Access { return []auth.Access{auth.Catalog()} }

// deletedCatalog is a scope of ACR's.
func deletedCatalog() auth.Access {
	return auth.Access{Type: auth.TypeRegistry, Name: "deleted_catalog", Actions: []string{auth.ActionAll}}
}

func listsDeletedCatalog(Request) []auth.Access { return []auth.Access{deletedCatalog()} }

// administration is what only the admin user has.
func administration() auth.Access {
	return auth.Access{Type: auth.TypeRegistry, Name: "admin", Actions: []string{auth.ActionAll}}
}

func administers(Request) []auth.Access { return []auth.Access{administration()} }

// parseRequest parses the path of a request. An error is a 404, or that of a
// name that isn't one.
func parseRequest(path, rawQuery string) (Request, error) {
	query, err := url.ParseQuery(rawQuery)
	if err != nil {
		return Request{}, badRequest("query of the URL: %v", err)
	}
	req := Request{Query: query}
	rest, ok := strings.CutPrefix(path, prefix)
	if !ok {
		return req, notFound(path)
	}
	segments := strings.Split(rest, "/")
	switch {
	case slices.Contains(segments, ""):
	case segments[0] == "_deleted":
		req.parseDeleted(segments[1:])
	case strings.HasPrefix(segments[0], "_"):
		req.parseRegistry(segments)
	default:
		req.parseRepository(segments)
	}
	if req.endpoints == nil {
		return req, notFound(path)
	}
	return req, req.check()
}

// parseRegistry recognises what isn't of one repository.
func (r *Request) parseRegistry(s []string) {
	switch {
	case len(s) == 1:
		r.kind = "acr" + s[0]
		r.endpoints = map[string]endpoints{
			"_catalog":   {"GET": {(*Handler).listRepositories, listsCatalog}},
			"_usage":     {"GET": {(*Handler).totalUsage, administers}},
			"_gc":        {"POST": {(*Handler).collect, administers}},
			"_import":    {"POST": {(*Handler).startImport, administers}},
			"_tokens":    {"GET": {(*Handler).listTokens, administers}, "POST": {(*Handler).createToken, administers}},
			"_scopeMaps": {"GET": {(*Handler).listScopeMaps, administers}, "POST": {(*Handler).createScopeMap, administers}},
		}[s[0]]
	case len(s) == 2 && s[0] == "_operations":
		r.parseOperation(s[1], endpoints{"POST": {(*Handler).cancelOperation, administers}},
			endpoints{"GET": {(*Handler).getOperation, administers}, "DELETE": {(*Handler).cancelOperation, administers}})
	case len(s) == 2 && s[0] == "_tokens":
		r.kind = "acr_token"
		r.Name = s[1]
		r.endpoints = endpoints{
			"GET":    {(*Handler).getToken, administers},
			"PATCH":  {(*Handler).updateToken, administers},
			"DELETE": {(*Handler).deleteToken, administers},
		}
	case len(s) == 2 && s[0] == "_scopeMaps":
		r.kind = "acr_scopeMap"
		r.Name = s[1]
		r.endpoints = endpoints{
			"GET":    {(*Handler).getScopeMap, administers},
			"PATCH":  {(*Handler).updateScopeMap, administers},
			"DELETE": {(*Handler).deleteScopeMap, administers},
		}
	case len(s) == 3 && s[0] == "_tokens" && s[2] == "passwords":
		r.kind = "acr_passwords"
		r.Name = s[1]
		r.endpoints = endpoints{"POST": {(*Handler).generatePassword, administers}}
	case len(s) == 4 && s[0] == "_tokens" && s[2] == "passwords":
		r.kind = "acr_password"
		r.Name, r.Password = s[1], s[3]
		r.endpoints = endpoints{"DELETE": {(*Handler).deletePassword, administers}}
	}
}

// parseOperation recognises an operation, or its cancelation.
func (r *Request) parseOperation(id string, cancel, other endpoints) {
	var canceled bool
	if r.Name, canceled = strings.CutSuffix(id, ":cancel"); canceled {
		r.kind, r.endpoints = "acr_operation_cancel", cancel
	} else {
		r.kind, r.endpoints = "acr_operation", other
	}
}

// parseDeleted recognises what follows _deleted/.
func (r *Request) parseDeleted(s []string) {
	if len(s) == 1 && s[0] == "_catalog" {
		r.kind = "acr_deleted_catalog"
		r.endpoints = endpoints{"GET": {(*Handler).listDeletedRepositories, listsDeletedCatalog}}
		return
	}
	rest := r.cutRepository(s)
	switch {
	case r.Repository == "":
	case len(rest) == 1 && rest[0] == "_manifests":
		r.kind = "acr_deleted_manifests"
		r.endpoints = endpoints{"GET": {(*Handler).listDeletedManifests, readsMetadata}}
	case len(rest) == 1 && rest[0] == "_tags":
		r.kind = "acr_deleted_tags"
		r.endpoints = endpoints{"GET": {(*Handler).listDeletedTags, readsMetadata}}
	case len(rest) == 2 && rest[0] == "_manifests":
		r.kind, r.Digest = "acr_deleted_manifest", oci.Digest(rest[1])
		r.endpoints = endpoints{"POST": {(*Handler).restoreManifest, restores}}
	}
}

// parseRepository recognises a repository and what follows its name.
func (r *Request) parseRepository(s []string) {
	rest := r.cutRepository(s)
	switch {
	case len(rest) == 0:
		r.kind, r.lesser = "acr_repository", &endpoint{(*Handler).updateTeleport, pushes}
		r.endpoints = endpoints{
			"GET":    {(*Handler).getRepository, readsMetadata},
			"PATCH":  {(*Handler).updateRepository, writesMetadata},
			"DELETE": {(*Handler).deleteRepository, deletes},
		}
	case rest[0] == "_streaming":
		r.parseStreaming(rest)
	case rest[0] == "_teleport":
		r.parseTeleport(rest)
	case rest[0] == "_operations":
		r.parseImageOperations(rest)
	case len(rest) == 1:
		r.kind = "acr_repository" + rest[0]
		r.endpoints = map[string]endpoints{
			"_tags":      {"GET": {(*Handler).listTags, readsMetadata}},
			"_manifests": {"GET": {(*Handler).listManifests, readsMetadata}},
			"_usage":     {"GET": {(*Handler).repositoryUsage, readsMetadata}},
		}[rest[0]]
	case len(rest) == 2 && rest[0] == "_tags":
		r.kind, r.Tag = "acr_tag", rest[1]
		r.endpoints = endpoints{
			"GET":    {(*Handler).getTag, readsMetadata},
			"PATCH":  {(*Handler).updateTag, writesMetadata},
			"DELETE": {(*Handler).deleteTag, deletes},
		}
	case len(rest) == 2 && rest[0] == "_manifests":
		r.kind, r.Digest = "acr_manifest", oci.Digest(rest[1])
		r.endpoints = endpoints{
			"GET":    {(*Handler).getManifest, readsMetadata},
			"PATCH":  {(*Handler).updateManifest, writesMetadata},
			"DELETE": {(*Handler).deleteManifest, deletes},
		}
	}
}

// cutRepository takes the repository's name off a path: no component of a name
// begins with an underscore.
func (r *Request) cutRepository(s []string) (rest []string) {
	n := 0
	for n < len(s) && !strings.HasPrefix(s[n], "_") {
		n++
	}
	r.Repository = strings.Join(s[:n], "/")
	return s[n:]
}

// check checks the form of the names.
func (r *Request) check() error {
	if r.Repository != "" {
		if err := oci.CheckRepository(r.Repository); err != nil {
			return err
		}
	}
	if r.Tag != "" {
		if err := oci.CheckTag(r.Tag); err != nil {
			return err
		}
	}
	if r.Digest != "" {
		if _, err := oci.ParseDigest(r.Digest.String()); err != nil {
			return err
		}
	}
	return nil
}
