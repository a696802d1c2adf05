package config

import (
	"fmt"
	"net"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Problem is a part of a configuration that can't be used.
type Problem struct {
	Key     string // empty if the file can't be parsed
	Value   string // as written, unless secret; empty if there is none
	Origin  string // "registry.toml:12", "environment SLUICE_…", "flag", "default"
	Allowed string // what would be right
}

// Error says everything in one line.
func (p Problem) Error() string {
	if p.Key == "" {
		return p.Origin + ": " + p.Allowed
	}
	s := p.Key
	if p.Value != "" {
		s += " = " + p.Value
	}
	return s + " (" + p.Origin + "): " + p.Allowed
}

// Problems is an error with everything that is wrong, one line each.
type Problems []Problem

func (p Problems) Error() string {
	lines := make([]string, len(p))
	for i, problem := range p {
		lines[i] = problem.Error()
	}
	return strings.Join(lines, "\n")
}

// Actions are what webhooks can be told of.
func Actions() []string { return []string{"push", "delete", "convert"} }

// Check returns nil if the values can be used, each by itself and together, and
// otherwise Problems with all that is wrong. It doesn't look at files or
// networks.
func (r *Registry) Check() error {
	c := &checker{registry: r}
	c.address("listen", r.Listen)
	c.that(r.Data != "", "data", "a directory")
	c.database()
	c.storage()
	c.that(r.TLS.Key != "" || r.TLS.Cert == "", "tls.key", "a file (PEM), since tls.cert is set")
	c.that(r.TLS.Cert != "" || r.TLS.Key == "", "tls.cert", "a file (PEM), since tls.key is set")
	c.auth()
	c.between("push.upload_age", r.Push.UploadAge, time.Minute, 365*24*time.Hour)
	c.limits()
	c.that(r.SoftDelete.Days >= 0 && r.SoftDelete.Days <= 90, "soft_delete.days", "0 (deleted at once) or 1 to 90")
	if r.GarbageCollection.Interval != 0 {
		c.between("garbage_collection.interval", r.GarbageCollection.Interval, time.Minute, 365*24*time.Hour)
	}
	c.between("garbage_collection.grace", r.GarbageCollection.Grace, time.Minute, 365*24*time.Hour)
	c.streaming()
	c.teleport()
	c.webhooks()
	c.oneOf("log.level", r.Log.Level, "debug", "info", "warn", "error")
	c.oneOf("log.format", r.Log.Format, "text", "json")
	if r.Metrics.Listen != "" {
		c.address("metrics.listen", r.Metrics.Listen)
	}
	if r.Traces.Endpoint != "" {
		c.url("traces.endpoint", r.Traces.Endpoint, "http", "https")
	}
	if len(c.problems) > 0 {
		return c.problems
	}
	return nil
}

// checker is one Check.
type checker struct {
	registry *Registry
	problems Problems
}

// that adds a problem unless ok.
func (c *checker) that(ok bool, key, allowed string) {
	if ok {
		return
	}
	p := Problem{Key: key, Origin: c.registry.Origin(key), Allowed: allowed}
	if v, ok := lookup(reflect.ValueOf(c.registry).Elem(), key, false); ok {
		p.Value = show(v)
	}
	c.problems = append(c.problems, p)
}

func (c *checker) oneOf(key, value string, of ...string) {
	c.that(slices.Contains(of, value), key, strings.Join(of, ", "))
}

func (c *checker) between(key string, d, least, most time.Duration) {
	c.that(d >= least && d <= most, key, fmt.Sprintf("a duration from %v to %v", least, most))
}

func (c *checker) address(key, value string) {
	_, port, err := net.SplitHostPort(value)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	c.that(err == nil, key, `HOST:PORT, such as "127.0.0.1:5000" or ":5000"`)
}

func (c *checker) url(key, value string, schemes ...string) {
	u, err := url.Parse(value)
	c.that(err == nil && u.Host != "" && slices.Contains(schemes, u.Scheme), key,
		"a URL such as "+schemes[len(schemes)-1]+"://HOST/PATH")
}

func (c *checker) database() {
	if c.registry.Database.URL == "" {
		return
	}
	value := c.registry.Database.URL.Value()
	scheme, rest, _ := strings.Cut(value, ":")
	c.that(rest != "" && slices.Contains([]string{"sqlite", "postgres", "postgresql"}, scheme),
		"database.url", `"sqlite:FILE" or "postgres://USER@HOST/DATABASE"`)
	u, err := url.Parse(value)
	if err != nil || u.User == nil || c.registry.writtenInFile("database.url") == "" {
		return
	}
	_, password := u.User.Password()
	c.that(!password, "database.url", "no password: put the URL into a file and name that as database.url_file, or set "+EnvName("database.url"))
}

func (c *checker) storage() {
	s := c.registry.Storage
	c.oneOf("storage.kind", s.Kind, StorageLocal, StorageAzure, StorageS3)
	if s.Redirect != 0 {
		c.between("storage.redirect", s.Redirect, time.Minute, 7*24*time.Hour)
		c.that(s.Kind != StorageLocal, "storage.redirect", "0 with local storage, which has no URLs")
	}
	switch s.Kind {
	case StorageAzure:
		c.that(s.Azure.ServiceURL != "" || s.Azure.ConnectionString != "", "storage.azure.service_url",
			"the URL of the account's blob service, or set storage.azure.connection_string_file")
		if s.Azure.ServiceURL != "" {
			c.that(s.Azure.ConnectionString == "", "storage.azure.service_url", "nothing, since there is a connection string")
			c.url("storage.azure.service_url", s.Azure.ServiceURL, "http", "https")
		}
		c.that(isBucket(s.Azure.Container), "storage.azure.container", "the name of a container: 3 to 63 lower-case letters, digits, -")
	case StorageS3:
		c.that(s.S3.Endpoint != "" && !strings.Contains(s.S3.Endpoint, "/"), "storage.s3.endpoint", `HOST[:PORT], such as "s3.amazonaws.com"`)
		c.that(isBucket(s.S3.Bucket), "storage.s3.bucket", "the name of a bucket: 3 to 63 lower-case letters, digits, - and .")
		c.that((s.S3.AccessKey == "") == (s.S3.SecretKey == ""), "storage.s3.access_key",
			"either both, an access key and storage.s3.secret_key_file, or neither (then the machine's own role is used)")
	}
	c.prefix("storage.azure.prefix", s.Azure.Prefix)
	c.prefix("storage.s3.prefix", s.S3.Prefix)
}

func (c *checker) streaming() {
	s := c.registry.Streaming
	c.that(s.Workers >= 1 && s.Workers <= 256, "streaming.workers", "1 to 256")
	c.that(s.Layers >= 1 && s.Layers <= 64, "streaming.layers", "1 to 64")
	for _, p := range s.Platforms {
		parts := strings.Split(p, "/")
		c.that((len(parts) == 2 || len(parts) == 3) && parts[0] == "linux" && !slices.Contains(parts, ""),
			"streaming.platforms", `platforms of linux, such as ["linux/amd64", "linux/arm64"]`)
	}
}

func (c *checker) teleport() {
	t := c.registry.Teleport
	c.that(t.Workers >= 1 && t.Workers <= 256, "teleport.workers", "1 to 256")
	c.that(t.MaxRepositories >= 1 && t.MaxRepositories <= 10_000, "teleport.max_repositories", "1 to 10000")
	c.that(t.MaxLayer >= 1<<20 && t.MaxLayer <= 1<<40, "teleport.max_layer", "from 1MiB to 1TiB")
	c.that(t.MaxImage >= t.MaxLayer, "teleport.max_image", "at least teleport.max_layer")
	c.between("teleport.credential_lifetime", t.CredentialLifetime, 10*time.Second, 7*24*time.Hour)
	if t.Enabled || t.Server != "" {
		u, err := url.Parse("smb://" + t.Server)
		c.that(err == nil && t.Server != "" && u.Host == t.Server, "teleport.server", `HOST or HOST:PORT of the file server that shares teleport.directory`)
	}
	c.that(!strings.ContainsAny(t.Share, `/\`) && len(t.Share) <= 80, "teleport.share", "the name of a share, without its server")
	c.that(t.Share == "" || t.Username != "" && t.Password != "", "teleport.share", "set teleport.username and teleport.password, with which clients reach it, too")
	c.that(t.Share != "" || t.Username == "", "teleport.username", "only with teleport.share: Samba's accounts are the registry's")
	c.that(regexp.MustCompile(`^[A-Za-z0-9._-]{0,64}$`).MatchString(t.Region), "teleport.region", "a name of letters, digits, . _ and -")
}

func isBucket(s string) bool {
	return regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$`).MatchString(s)
}

func (c *checker) prefix(key, value string) {
	c.that(value == "" || regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]*(/[a-zA-Z0-9_][a-zA-Z0-9._-]*)*/?$`).MatchString(value),
		key, `letters, digits, . _ - and / between them, such as "registry"`)
}

func (c *checker) auth() {
	a := c.registry.Auth
	if a.ExternalURL != "" {
		c.url("auth.external_url", a.ExternalURL, "http", "https")
	}
	c.between("auth.access_lifetime", a.AccessLifetime, time.Minute, 24*time.Hour)
	c.between("auth.refresh_lifetime", a.RefreshLifetime, time.Minute, 30*24*time.Hour)
	c.that(a.RefreshLifetime >= a.AccessLifetime, "auth.refresh_lifetime", "at least auth.access_lifetime")
	if a.Admin.Enabled {
		c.that(a.Enabled, "auth.admin.enabled", "false, or auth.enabled = true")
		c.that(a.Admin.User != "" && !strings.Contains(a.Admin.User, ":"), "auth.admin.user", "a name without a colon")
		c.that(len(a.Admin.Password) <= 72, "auth.admin.password", "at most 72 bytes")
	}
	for i, issuer := range a.Issuers {
		key := join("auth.issuers", strconv.Itoa(i))
		c.issuerURL(key+".url", issuer.URL)
		if issuer.Discovery != "" {
			c.issuerURL(key+".discovery", issuer.Discovery)
		}
		c.that(issuer.Audience != "", key+".audience", "the audience that tokens must be for")
		c.that(len(issuer.Rules) > 0, key+".rules", "at least one rule: without, no token is accepted")
		for j, rule := range issuer.Rules {
			rkey := join(key+".rules", strconv.Itoa(j))
			c.that(rule.ScopeMap != "", rkey+".scope_map", "the name of a scope map")
			c.that(len(rule.Claims) > 0, rkey+".claims", "at least one claim: without, every token of the issuer would do")
			for _, value := range rule.Claims {
				c.that(isPattern(value), rkey+".claims", "values with * only at the end")
			}
		}
	}
}

// issuerURL checks a URL that keys come from.
func (c *checker) issuerURL(key, value string) {
	u, err := url.Parse(value)
	ok := err == nil && u.Host != ""
	if ok && u.Scheme == "http" {
		ip := net.ParseIP(u.Hostname())
		ok = u.Hostname() == "localhost" || ip != nil && ip.IsLoopback()
	}
	c.that(ok && (u.Scheme == "http" || u.Scheme == "https"), key, "a URL that begins with https://")
}

// isPattern reports whether s is a value or the beginning of one and a star.
func isPattern(s string) bool {
	return s != "" && !strings.Contains(strings.TrimSuffix(s, "*"), "*")
}

func (c *checker) limits() {
	l := c.registry.Limits
	c.that(l.Reads >= 0, "limits.reads", "requests a minute, or 0 for no limit")
	c.that(l.Writes >= 0, "limits.writes", "requests a minute, or 0 for no limit")
	c.that(l.Referrers >= 0, "limits.referrers", "requests a minute, or 0 for no limit")
	c.that(l.MaxManifest >= 1<<10 && l.MaxManifest <= 4<<20, "limits.max_manifest", "from 1KiB to 4MiB, which is what clients read")

}

func (c *checker) webhooks() {
	seen := map[string]bool{}
	for i, w := range c.registry.Webhooks {
		key := join("webhooks", strconv.Itoa(i))
		c.that(regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,63}$`).MatchString(w.Name), key+".name", "up to 64 lower-case letters, digits and hyphens")
		c.that(!seen[w.Name], key+".name", "a name that no other webhook has")
		seen[w.Name] = true
		c.url(key+".url", w.URL, "http", "https")
		c.that(!slices.ContainsFunc(w.Actions, func(a string) bool { return !slices.Contains(Actions(), a) }),
			key+".actions", "some of "+strings.Join(Actions(), ", "))
		c.that(!slices.ContainsFunc(w.Repositories, func(p string) bool { return !isPattern(p) }),
			key+".repositories", "names of repositories, with * only at the end")
		for name := range w.Headers {
			c.that(regexp.MustCompile(`^[A-Za-z0-9-]+$`).MatchString(name), key+".headers", "names of HTTP headers")
		}
	}
}

// Origin says where the value of a key came from.
func (r *Registry) Origin(key string) string {
	if o := r.origins[key]; o != "" {
		return o
	}
	return "default"
}

// writtenInFile returns the place in the configuration file that a key has its
// value from, "" if it is from elsewhere.
func (r *Registry) writtenInFile(key string) string {
	o := r.origins[key]
	if o == "flag" || strings.HasPrefix(o, "environment ") || strings.HasPrefix(o, "file ") {
		return ""
	}
	return o
}

// String returns every key with its value, in the order of docs/registry.toml
// and in its form, with a comment where a value came from that isn't a default.
// Secrets, and values of headers and claims, are hidden.
func (r *Registry) String() string {
	var b strings.Builder
	walk(reflect.ValueOf(r).Elem(), "", func(key string, v reflect.Value) {
		fmt.Fprintf(&b, "%s = %s", key, show(v))
		if o := r.origins[key]; o != "" {
			fmt.Fprintf(&b, "  # %s", o)
		}
		b.WriteByte('\n')
	})
	return b.String()
}

// GoString is String: %#v hides secrets too.
func (r *Registry) GoString() string { return r.String() }

// withoutPassword hides the password of a URL, and its query, which may hold a
// signature.
func withoutPassword(s string) string {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" {
		return s
	}
	if u.RawQuery != "" {
		u.RawQuery = "hidden"
	}
	return u.Redacted()
}
