package acr

import (
	"time"

	"sluice/internal/index"
	"sluice/oci"
)

// Repository is a repository's attributes: GET and PATCH /acr/v1/{repo}.
type Repository struct {
	Registry      string               `json:"registry"`
	Name          string               `json:"imageName"`
	Created       time.Time            `json:"createdTime"`
	Updated       time.Time            `json:"lastUpdateTime"`
	ManifestCount int                  `json:"manifestCount"`
	TagCount      int                  `json:"tagCount"`
	Attributes    RepositoryAttributes `json:"changeableAttributes"`
}

// Attributes are the locks of a repository, a manifest or a tag. What is not
// enabled is refused (deleting, overwriting, pulling) or not shown (in lists).
type Attributes struct {
	DeleteEnabled bool `json:"deleteEnabled"`
	WriteEnabled  bool `json:"writeEnabled"`
	ReadEnabled   bool `json:"readEnabled"`
	ListEnabled   bool `json:"listEnabled"`
}

// RepositoryAttributes are Attributes, and what only repositories have.
type RepositoryAttributes struct {
	Attributes

	// TeleportEnabled has layers expanded for Teleport, StreamingEnabled has
	// pushed images converted, AnonymousPullEnabled lets everybody pull.
	TeleportEnabled      bool `json:"teleportEnabled"`
	StreamingEnabled     bool `json:"streamingEnabled"`
	AnonymousPullEnabled bool `json:"anonymousPullEnabled"`
}

// AttributeChanges is the body of a PATCH: the attributes to set; nil leaves
// one as it is. The last three are of repositories only.
type AttributeChanges struct {
	DeleteEnabled *bool `json:"deleteEnabled,omitempty"`
	WriteEnabled  *bool `json:"writeEnabled,omitempty"`
	ReadEnabled   *bool `json:"readEnabled,omitempty"`
	ListEnabled   *bool `json:"listEnabled,omitempty"`

	TeleportEnabled      *bool `json:"teleportEnabled,omitempty"`
	StreamingEnabled     *bool `json:"streamingEnabled,omitempty"`
	AnonymousPullEnabled *bool `json:"anonymousPullEnabled,omitempty"`
}

// repositoryOnly reports whether c has what a manifest or tag does not.
func (c AttributeChanges) repositoryOnly() bool {
	return c.TeleportEnabled != nil || c.StreamingEnabled != nil || c.AnonymousPullEnabled != nil
}

// apply sets what c has.
func (c AttributeChanges) apply(a *index.Attributes) {
	set := func(to *bool, from *bool) {
		if from != nil {
			*to = *from
		}
	}
	set(&a.DeleteEnabled, c.DeleteEnabled)
	set(&a.WriteEnabled, c.WriteEnabled)
	set(&a.ReadEnabled, c.ReadEnabled)
	set(&a.ListEnabled, c.ListEnabled)
	set(&a.TeleportEnabled, c.TeleportEnabled)
	set(&a.StreamingEnabled, c.StreamingEnabled)
	set(&a.AnonymousPullEnabled, c.AnonymousPullEnabled)
}

func locks(a index.Attributes) Attributes {
	return Attributes{DeleteEnabled: a.DeleteEnabled, WriteEnabled: a.WriteEnabled, ReadEnabled: a.ReadEnabled, ListEnabled: a.ListEnabled}
}

// Manifest is a manifest's attributes.
type Manifest struct {
	Digest          oci.Digest `json:"digest"`
	ImageSize       int64      `json:"imageSize"` // bytes: manifest, config and layers
	Created         time.Time  `json:"createdTime"`
	Updated         time.Time  `json:"lastUpdateTime"`
	CreatedBy       string     `json:"createdBy,omitempty"`
	Architecture    string     `json:"architecture,omitempty"`
	OS              string     `json:"os,omitempty"`
	MediaType       string     `json:"mediaType"`
	ConfigMediaType string     `json:"configMediaType,omitempty"`
	ArtifactType    string     `json:"artifactType,omitempty"`
	Subject         oci.Digest `json:"subject,omitempty"`
	Tags            []string   `json:"tags,omitempty"`
	Attributes      Attributes `json:"changeableAttributes"`

	// References are the manifests that an index names; only where one
	// manifest is asked for.
	References []Reference `json:"references,omitempty"`
}

// Reference is a manifest that an index names.
type Reference struct {
	Digest       oci.Digest `json:"digest"`
	Architecture string     `json:"architecture,omitempty"`
	OS           string     `json:"os,omitempty"`
}

// Tag is a tag's attributes.
type Tag struct {
	Name       string     `json:"name"`
	Digest     oci.Digest `json:"digest"`
	Created    time.Time  `json:"createdTime"`
	Updated    time.Time  `json:"lastUpdateTime"`
	Signed     bool       `json:"signed"` // by Docker Content Trust, which is not served: always false
	Attributes Attributes `json:"changeableAttributes"`
}

// image is what ACR puts around manifests and tags.
type image struct {
	Registry string `json:"registry"`
	Name     string `json:"imageName"`
}

type manifestDocument struct {
	image
	Manifest Manifest `json:"manifest"`
}

type manifestsDocument struct {
	image
	Manifests []Manifest `json:"manifests"`
}

type tagDocument struct {
	image
	Tag Tag `json:"tag"`
}

type tagsDocument struct {
	image
	Tags []Tag `json:"tags"`
}

type catalogDocument struct {
	Repositories []string `json:"repositories"`
}

// DeletedContent is the answer to the deletion of a repository.
type DeletedContent struct {
	Manifests []oci.Digest `json:"manifestsDeleted"`
	Tags      []string     `json:"tagsDeleted"`
}

// DeletedRepository is a repository that is gone, but has soft-deleted
// manifests.
type DeletedRepository struct {
	Name    string    `json:"repository"`
	Deleted time.Time `json:"deletedAt"` // when its last manifest was
}

type deletedRepositoriesDocument struct {
	Repositories []DeletedRepository `json:"repositories"`
}

// DeletedManifest is a soft-deleted manifest.
type DeletedManifest struct {
	Digest    oci.Digest `json:"digest"`
	Deleted   time.Time  `json:"deletedAt"`
	DeletedBy string     `json:"deletedBy,omitempty"`
	Purged    time.Time  `json:"expiresAfter,omitzero"` // when it is lost for good, or soon after
	MediaType string     `json:"mediaType"`
	ImageSize int64      `json:"imageSize"`
	Tags      []string   `json:"tags,omitempty"` // that named it
}

type deletedManifestsDocument struct {
	image
	Manifests []DeletedManifest `json:"manifests"`
}

// DeletedTag is a tag of a soft-deleted manifest.
type DeletedTag struct {
	Tag     string     `json:"tag"`
	Digest  oci.Digest `json:"digest"`
	Deleted time.Time  `json:"deletedAt"`
	Purged  time.Time  `json:"expiresAfter,omitzero"`
}

type deletedTagsDocument struct {
	image
	Tags []DeletedTag `json:"tags"`
}

// restoreRequest is the body of POST /acr/v1/_deleted/{repo}/_manifests/{digest}:
// the tag to give it; without one it gets those that named it.
type restoreRequest struct {
	Tag string `json:"tag"`
}

// Restored is what was restored.
type Restored struct {
	Digest oci.Digest `json:"digest"`
	Tag    string     `json:"tag,omitempty"`
}

// Usage is how much a repository, or the whole registry, holds, in bytes.
type Usage struct {
	Repository string `json:"repository,omitempty"`
	Manifests  int    `json:"manifestCount"`
	Blobs      int    `json:"blobCount"`

	// Size has every blob and manifest once; Shared is the part of it that
	// other repositories hold as well, so deleting this one frees no more
	// than Size - Shared.
	Size   int64 `json:"size"`
	Shared int64 `json:"shared"`
}

// Token is an account for machines, with the rights of its scope map.
type Token struct {
	Name      string     `json:"name"`
	ScopeMap  string     `json:"scopeMap"`
	Enabled   bool       `json:"enabled"`
	Created   time.Time  `json:"creationDate,omitzero"`
	Passwords []Password `json:"passwords"`
}

// Password is one of a token's two passwords. The registry keeps only a hash:
// Value is set in the answer to the request that generated it and never again.
type Password struct {
	Name    string    `json:"name"` // password1 or password2
	Created time.Time `json:"creationTime"`
	Expiry  time.Time `json:"expiry,omitzero"` // zero: never
	Value   string    `json:"value,omitempty"`
}

type tokensDocument struct {
	Tokens []Token `json:"tokens"`
}

// tokenRequest is the body of POST /acr/v1/_tokens and of PATCH (without name).
type tokenRequest struct {
	Name     string  `json:"name,omitempty"`
	ScopeMap *string `json:"scopeMap,omitempty"`
	Enabled  *bool   `json:"enabled,omitempty"`
}

// passwordRequest is the body of POST /acr/v1/_tokens/{name}/passwords.
type passwordRequest struct {
	Name   string    `json:"name"`
	Expiry time.Time `json:"expiry,omitzero"`
}

// ScopeMap is a named list of rights, such as
// "repositories/team/*/content/read".
type ScopeMap struct {
	Name        string   `json:"name"`
	Description string   `json:"description,omitempty"`
	Actions     []string `json:"actions"`
	Builtin     bool     `json:"builtin,omitempty"` // can't be changed
}

type scopeMapsDocument struct {
	ScopeMaps []ScopeMap `json:"scopeMaps"`
}

// scopeMapRequest is the body of POST /acr/v1/_scopeMaps and of PATCH (without
// name).
type scopeMapRequest struct {
	Name        string   `json:"name,omitempty"`
	Description *string  `json:"description,omitempty"`
	Actions     []string `json:"actions,omitempty"`
}

// Collected is what POST /acr/v1/_gc removed.
type Collected struct {
	Blobs  int   `json:"blobsDeleted"`
	Bytes  int64 `json:"bytesFreed"`
	Purged int   `json:"manifestsPurged"` // soft-deleted ones whose time was over
}

// ImportRequest is the body of POST /acr/v1/_import.
type ImportRequest struct {
	// Source is HOST[:PORT]/REPOSITORY with :TAG or @DIGEST.
	Source string `json:"source"`

	// Target is REPOSITORY, with :TAG unless the source's tag is to be kept
	// or the image is to have none.
	Target string `json:"target"`

	// Username and Password are for the source; empty: anonymous.
	Username string `json:"username,omitempty"`
	Password string `json:"password,omitempty"`

	// Platform keeps one platform of an index only, such as linux/arm64.
	Platform string `json:"platform,omitempty"`

	// Referrers copies also what refers to the image.
	Referrers bool `json:"referrers,omitempty"`

	// Force moves the target's tag if it names another manifest already.
	Force bool `json:"force,omitempty"`

	// PlainHTTP speaks with the source without TLS.
	PlainHTTP bool `json:"plainHTTP,omitempty"`
}

// Operation is a long-running operation: GET /acr/v1/_operations/{id}.
type Operation struct {
	ID        string     `json:"id"`
	Name      string     `json:"name"`
	Resource  string     `json:"resource"`
	Status    Status     `json:"status"`
	StartTime time.Time  `json:"startTime"`
	Updated   time.Time  `json:"lastUpdateTime"`
	Progress  string     `json:"progress,omitempty"` // "8%"
	Details   string     `json:"details,omitempty"`
	Digest    oci.Digest `json:"digest,omitempty"`    // of what was imported
	ErrorCode string     `json:"errorCode,omitempty"` // of a conversion that failed, such as UNSUPPORTED_PLATFORM
}

// Streaming is the setting of GET /acr/v1/{repo}/_streaming: whether images are
// converted when they are pushed.
type Streaming struct {
	ConvertPushedImages bool `json:"convertPushedImages"`
}

// conversionRequest is the body of POST /acr/v1/{repo}/_streaming/{digest}.
type conversionRequest struct {
	Format  string `json:"conversionFormat,omitempty"`
	Version string `json:"conversionVersion,omitempty"`
}

// streamingRequest is the body of POST /acr/v1/{repo}/_streaming.
type streamingRequest struct {
	conversionRequest
	ConvertPushedImages *bool `json:"convertPushedImages"`

	// Backfill has the images converted that are there; ACR has no such thing.
	Backfill bool `json:"backfill,omitempty"`
}

// operationAnswer is an operation where one is begun, or asked for by its subject.
type operationAnswer struct {
	ID     string `json:"id"`
	Status Status `json:"status"`
}

type streamingAnswer struct {
	Streaming
	Format  string `json:"conversionFormat"` // what is made, whatever was asked for
	Version string `json:"conversionVersion"`
	operationAnswer
}

// operationsDocument is the answer of GET /acr/v1/{repo}/_operations.
type operationsDocument struct {
	Operations []Operation `json:"operations"`
}

// Status is an operation's state.
type Status string

// The states of operations. The last three are final.
const (
	StatusNotStarted Status = "NotStarted"
	StatusRunning    Status = "Running"
	StatusSucceeded  Status = "Succeeded"
	StatusFailed     Status = "Failed"
	StatusCanceled   Status = "Canceled"
)

// Final reports whether nothing changes any more.
func (s Status) Final() bool {
	return s == StatusSucceeded || s == StatusFailed || s == StatusCanceled
}
