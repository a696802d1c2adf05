package config

import "time"

// Registry is the configuration of `sluice registry`. The tags are the keys of
// the file; docs/registry.toml says what each is for. Start from Default or
// Load; Check says whether it can be used.
type Registry struct {
	Listen            string            `toml:"listen"`       // HOST:PORT
	BehindProxy       bool              `toml:"behind_proxy"` // X-Forwarded-For and X-Forwarded-Proto are true
	Data              string            `toml:"data"`         // directory
	Database          Database          `toml:"database"`
	Storage           Storage           `toml:"storage"`
	TLS               TLS               `toml:"tls"`
	Auth              Auth              `toml:"auth"`
	Push              Push              `toml:"push"`
	Limits            Limits            `toml:"limits"`
	SoftDelete        SoftDelete        `toml:"soft_delete"`
	GarbageCollection GarbageCollection `toml:"garbage_collection"`
	Streaming         Streaming         `toml:"streaming"`
	Teleport          Teleport          `toml:"teleport"`
	Webhooks          []Webhook         `toml:"webhooks"`
	Log               Log               `toml:"log"`
	Metrics           Metrics           `toml:"metrics"`
	Traces            Traces            `toml:"traces"`

	// origins tells where each value came from that isn't a default.
	origins map[string]string
}

// Database says where the index database is.
type Database struct {
	URL     Secret `toml:"url"` // "sqlite:/path" or "postgres://…"; empty: see DatabaseURL
	URLFile string `toml:"url_file"`
}

// The kinds of storage.
const (
	StorageLocal = "local"
	StorageAzure = "azure"
	StorageS3    = "s3"
)

// Storage says where images are kept.
type Storage struct {
	Kind     string        `toml:"kind"`     // StorageLocal…; local is the data directory
	Redirect time.Duration `toml:"redirect"` // validity of signed URLs; 0: blobs are read through the registry
	Azure    Azure         `toml:"azure"`
	S3       S3            `toml:"s3"`
}

// Azure is a container of Azure Blob Storage. Without a connection string the
// credentials are those of the environment (a managed identity, for example).
type Azure struct {
	ServiceURL           string `toml:"service_url"`
	ConnectionString     Secret `toml:"connection_string"`
	ConnectionStringFile string `toml:"connection_string_file"`
	Container            string `toml:"container"`
	Prefix               string `toml:"prefix"`
}

// S3 is a bucket of an S3 service.
type S3 struct {
	Endpoint      string `toml:"endpoint"` // HOST[:PORT]
	Bucket        string `toml:"bucket"`
	Prefix        string `toml:"prefix"`
	Region        string `toml:"region"`
	AccessKey     string `toml:"access_key"`
	SecretKey     Secret `toml:"secret_key"`
	SecretKeyFile string `toml:"secret_key_file"`
	Insecure      bool   `toml:"insecure"` // without TLS
}

// TLS is the server's certificate; without one it speaks plain HTTP.
type TLS struct {
	Cert string `toml:"cert"` // PEM files
	Key  string `toml:"key"`
}

// Auth says who may do what.
type Auth struct {
	Enabled         bool          `toml:"enabled"`
	ExternalURL     string        `toml:"external_url"` // of this registry, as clients see it; empty: by each request
	Service         string        `toml:"service"`      // its name in tokens; empty: the host of ExternalURL
	AccessLifetime  time.Duration `toml:"access_lifetime"`
	RefreshLifetime time.Duration `toml:"refresh_lifetime"`
	AnonymousPull   bool          `toml:"anonymous_pull"` // from every repository
	Admin           Admin         `toml:"admin"`
	Issuers         []Issuer      `toml:"issuers"`
}

// Admin is the account that may do everything.
type Admin struct {
	Enabled      bool   `toml:"enabled"`
	User         string `toml:"user"`
	Password     Secret `toml:"password"` // empty: generated at the first start
	PasswordFile string `toml:"password_file"`
}

// Issuer is an OpenID issuer whose tokens can be exchanged for the registry's.
type Issuer struct {
	URL       string       `toml:"url"`
	Discovery string       `toml:"discovery"` // where its .well-known is; empty: at URL
	Audience  string       `toml:"audience"`
	NameClaim string       `toml:"name_claim"` // that callers are named by; empty: sub
	Rules     []IssuerRule `toml:"rules"`      // the first that matches a token decides
}

// IssuerRule gives the holders of some tokens of an issuer the actions of a
// scope map.
type IssuerRule struct {
	Claims   map[string]string `toml:"claims"`    // that a token must have; a trailing * matches the rest
	ScopeMap string            `toml:"scope_map"` // name
}

// Push says what may be pushed.
type Push struct {
	AllowSparse    bool          `toml:"allow_sparse"`    // manifests without what they refer to
	AllowStreaming bool          `toml:"allow_streaming"` // streaming artifacts, by clients
	UploadAge      time.Duration `toml:"upload_age"`      // after which an upload that nobody continued is discarded
}

// Limits bounds what clients may use. Zero means no limit, except for
// MaxManifest.
type Limits struct {
	Reads           int  `toml:"reads"`  // requests a minute of one caller
	Writes          int  `toml:"writes"` // likewise
	Referrers       int  `toml:"referrers"`
	MaxManifest     Size `toml:"max_manifest"`
	MaxBlob         Size `toml:"max_blob"`
	RepositoryQuota Size `toml:"repository_quota"`
}

// SoftDelete says how long deleted manifests can be restored.
type SoftDelete struct {
	Days int `toml:"days"` // 0: deleted at once; otherwise 1 to 90
}

// GarbageCollection says when blobs that nothing needs are removed.
type GarbageCollection struct {
	Interval time.Duration `toml:"interval"` // 0: never
	Grace    time.Duration `toml:"grace"`    // since a blob was last pushed or asked for by a push
}

// Streaming says how images are converted to streaming artifacts.
type Streaming struct {
	Enabled   bool     `toml:"enabled"`   // by this registry, when asked to
	Workers   int      `toml:"workers"`   // images at once
	Layers    int      `toml:"layers"`    // layers of each at once
	Platforms []string `toml:"platforms"` // OS/ARCHITECTURE[/VARIANT]; empty: all of linux
}

// Teleport says how layers are expanded into disks for Teleport's clients.
type Teleport struct {
	Enabled         bool   `toml:"enabled"`
	Directory       string `toml:"directory"`        // of the disks; empty: TeleportDirectory
	Workers         int    `toml:"workers"`          // images at once
	AutoEnable      bool   `toml:"auto_enable"`      // a repository by a push to it
	MaxRepositories int    `toml:"max_repositories"` // that may have teleportEnabled
	MaxLayer        Size   `toml:"max_layer"`        // expanded
	MaxImage        Size   `toml:"max_image"`        // likewise

	Server         string `toml:"server"`          // HOST[:PORT] of the file server
	Region         string `toml:"region"`          // where it is; empty: wherever clients are
	SambaDirectory string `toml:"samba_directory"` // of what smbd reads; empty: SambaDirectory

	// Of a file server that the registry tells nothing, such as Azure Files. Empty: it
	// is a Samba, with a share and accounts for each repository.
	Share        string `toml:"share"` // that has the directory
	Username     string `toml:"username"`
	Password     Secret `toml:"password"`
	PasswordFile string `toml:"password_file"`

	CredentialLifetime time.Duration `toml:"credential_lifetime"` // at least
}

// Webhook is a URL that is told what happens.
type Webhook struct {
	Name         string            `toml:"name"` // in logs, and of its queue
	URL          string            `toml:"url"`
	Secret       Secret            `toml:"secret"` // signs what is sent
	SecretFile   string            `toml:"secret_file"`
	Headers      map[string]string `toml:"headers"`
	Actions      []string          `toml:"actions"`      // empty: all
	Repositories []string          `toml:"repositories"` // a trailing * stands for any rest; empty: all
}

// Log says what is logged, to standard error.
type Log struct {
	Level  string `toml:"level"`  // debug, info, warn, error
	Format string `toml:"format"` // text, json
}

// Metrics says where Prometheus finds /metrics.
type Metrics struct {
	Listen string `toml:"listen"` // HOST:PORT; empty: nowhere
}

// Traces says where OpenTelemetry's traces are sent.
type Traces struct {
	Endpoint string `toml:"endpoint"` // of OTLP over HTTP; empty: nowhere
}

// Default returns the configuration that an empty file means.
func Default() *Registry {
	return &Registry{
		Listen:  "127.0.0.1:5000",
		Data:    "/var/lib/sluice/registry",
		Storage: Storage{Kind: StorageLocal},
		Auth: Auth{
			AccessLifetime:  75 * time.Minute,
			RefreshLifetime: 3 * time.Hour,
			Admin:           Admin{User: "admin"},
		},
		Push:              Push{UploadAge: 24 * time.Hour},
		Limits:            Limits{MaxManifest: 4 << 20},
		GarbageCollection: GarbageCollection{Interval: 6 * time.Hour, Grace: 24 * time.Hour},
		Streaming:         Streaming{Enabled: true, Workers: 2, Layers: 2, Platforms: []string{}},
		Teleport:          Teleport{Workers: 1, MaxRepositories: 10, MaxLayer: 16 << 30, MaxImage: 100 << 30, CredentialLifetime: time.Hour},
		Log:               Log{Level: "info", Format: "text"},
	}
}

// DatabaseURL returns the URL of the index database: by default that of a SQLite
// file in the data directory. It may hold a password.
func (r *Registry) DatabaseURL() string {
	if r.Database.URL != "" {
		return r.Database.URL.Value()
	}
	return "sqlite:" + r.Data + "/index.db"
}

// TeleportDirectory returns where Teleport's disks are: by default in the data
// directory.
func (r *Registry) TeleportDirectory() string {
	if r.Teleport.Directory != "" {
		return r.Teleport.Directory
	}
	return r.Data + "/teleport"
}

// SambaDirectory returns where smbd finds shares, accounts and passwords: by default
// in the directory of the disks, which the file server has.
func (r *Registry) SambaDirectory() string {
	if r.Teleport.SambaDirectory != "" {
		return r.Teleport.SambaDirectory
	}
	return r.TeleportDirectory() + "/_samba"
}
