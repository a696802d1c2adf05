package auth

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"time"

	"golang.org/x/crypto/bcrypt"

	"sluice/internal/storage"
)

// Options says how an Authority works. The zero value is useful: tokens that
// are managed by calls, no admin user, nobody federated, nothing anonymous.
type Options struct {
	// Service is the registry's name in challenges and tokens. Empty: the
	// host of ExternalURL, or else whatever host a request is for.
	Service string

	// Issuer is the claim "iss" of tokens. Empty: "Azure Container Registry",
	// which is what clients of Azure's know.
	Issuer string

	// ExternalURL is how clients reach the registry, "https://r.example.com",
	// where a proxy stands before it. Empty: the host of each request, and
	// https if it came by TLS.
	ExternalURL string

	// TrustForwarded believes the header X-Forwarded-Proto. Only a proxy that
	// sets it on every request makes that safe.
	TrustForwarded bool

	// AccessLifetime is that of access tokens. Zero: 75 minutes.
	AccessLifetime time.Duration

	// RefreshLifetime is that of refresh tokens. Zero: 3 hours.
	RefreshLifetime time.Duration

	// KeyRotation is how long a key signs. Zero: 30 days.
	KeyRotation time.Duration

	Admin Admin

	// Exchange lists the issuers whose tokens /oauth2/exchange takes.
	Exchange []Issuer

	// AnonymousPull reports whether everybody may read a repository. It is
	// called for most requests of callers without rights of their own, and
	// must be fast. Nil: none.
	AnonymousPull func(ctx context.Context, repo string) bool

	// ClientAddress returns the IP address that a request comes from, by
	// which wrong passwords are counted. Nil: that of the connection, which
	// is the proxy's if there is one.
	ClientAddress func(*http.Request) string

	// Exclude locks a name against all replicas, so that no change of an
	// account is lost to another made at the same time; index.DB has it.
	// Nil: only this process's changes wait for each other.
	Exclude func(ctx context.Context, name string) (unlock func(), err error)

	// HashCost is bcrypt's, 4 to 31. Zero: 10, about 50 ms. Lower is for tests.
	HashCost int

	// Now is the clock. Nil: time.Now.
	Now func() time.Time

	// Log gets what goes wrong, and refused sign-ins. Never a secret.
	Log *slog.Logger
}

func (o *Options) setDefaults() {
	o.Issuer = cmp.Or(o.Issuer, "Azure Container Registry")
	o.AccessLifetime = cmp.Or(o.AccessLifetime, 75*time.Minute)
	o.RefreshLifetime = cmp.Or(o.RefreshLifetime, 3*time.Hour)
	o.KeyRotation = cmp.Or(o.KeyRotation, 30*24*time.Hour)
	o.Admin.Name = cmp.Or(o.Admin.Name, adminObject)
	o.HashCost = cmp.Or(o.HashCost, bcrypt.DefaultCost)
	if o.ClientAddress == nil {
		o.ClientAddress = clientAddress
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
}

const (
	adminObject = "admin"

	// maintenance is how often Run looks after the keys; so often that no
	// request has to wait while they are read.
	maintenance = keysTTL / 2
)

// Authority knows the accounts and their rights. Its methods may be called
// concurrently.
type Authority struct {
	opts     Options
	external *url.URL // of Options.ExternalURL, or nil
	now      func() time.Time
	log      *slog.Logger

	builtin []*mapRecord // never changed
	maps    table[mapRecord, *mapRecord]
	tokens  table[accountRecord, *accountRecord]
	admin   table[accountRecord, *accountRecord] // of one

	keys      *keyring
	parsed    cache[[32]byte, *claims] // by the token's hash
	passwords *passwords
	attempts  *attempts
	issuers   []*issuer
}

// Open returns the Authority of the accounts and keys in store, and makes what
// has to be there: a signing key, the admin user's password. It doesn't ask the
// issuers anything yet.
func Open(ctx context.Context, store storage.Store, opts Options) (*Authority, error) {
	opts.setDefaults()
	a := &Authority{opts: opts, now: opts.Now, log: opts.Log, builtin: builtinMaps(), attempts: newAttempts(opts.Now)}
	if min(opts.AccessLifetime, opts.RefreshLifetime, opts.KeyRotation) < time.Second {
		return nil, fmt.Errorf("lifetimes of %s (access), %s (refresh), %s (keys): each must be a second or more", opts.AccessLifetime, opts.RefreshLifetime, opts.KeyRotation)
	}
	if opts.Service != "" && !hostPattern.MatchString(opts.Service) {
		return nil, fmt.Errorf("service %q: write the registry's host name, with its port if it has one", opts.Service)
	}
	if opts.ExternalURL != "" {
		u, err := url.Parse(opts.ExternalURL)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || !hostPattern.MatchString(u.Host) || u.RawQuery != "" || u.User != nil {
			return nil, fmt.Errorf("external URL %q: write https://HOST", opts.ExternalURL)
		}
		a.external = u
	}
	a.maps = table[mapRecord, *mapRecord]{store: store, prefix: "registry/scope-maps/", what: "scope map", now: a.now, exclude: opts.Exclude}
	a.tokens = table[accountRecord, *accountRecord]{store: store, prefix: "registry/tokens/", what: "token", now: a.now, exclude: opts.Exclude}
	a.admin = table[accountRecord, *accountRecord]{store: store, prefix: "registry/", what: "account", now: a.now, exclude: opts.Exclude}
	a.maps.recent.max, a.tokens.recent.max, a.admin.recent.max, a.parsed.max = maxCachedMaps, maxCachedTokens, 1, maxParsed
	for _, i := range opts.Exchange {
		issuer, err := newIssuer(i, a.now)
		if err != nil {
			return nil, err
		}
		a.issuers = append(a.issuers, issuer)
	}
	var err error
	if a.passwords, err = newPasswords(opts.HashCost, a.now); err != nil {
		return nil, fmt.Errorf("passwords: %w", err)
	}
	if a.keys, err = newKeyring(ctx, &keyring{
		store: store, now: a.now, log: a.log,
		rotation: opts.KeyRotation, lifetime: max(opts.AccessLifetime, opts.RefreshLifetime),
	}); err != nil {
		return nil, err
	}
	return a, a.openAdmin(ctx)
}

// Run reads the signing keys now and then, replaces them when they are due, and
// clears old ones away, until ctx ends. Without it that happens when a request
// needs a key, which takes longer then.
func (a *Authority) Run(ctx context.Context) {
	tick := time.NewTicker(maintenance)
	defer tick.Stop()
	for {
		if _, err := a.keys.rotate(ctx); err != nil && ctx.Err() == nil {
			a.log.Error("signing keys can't be looked after; it is tried again", "error", err, "in", maintenance)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
