package credentials

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"sluice/internal/durable"
	"sluice/internal/remote"
)

// maxConfig bounds a configuration file with credentials, in bytes: that of a
// Kubernetes secret.
const maxConfig = 1 << 20

// auths are the credentials of a docker configuration by their keys: a
// registry's host or URL, with the beginning of repositories' names if they are
// for these only.
type auths map[string]authEntry

// authEntry is a credential as docker writes it.
type authEntry struct {
	Username      string `json:"username"`
	Password      string `json:"password"`
	Auth          string `json:"auth"` // base64 of "username:password"
	IdentityToken string `json:"identitytoken"`
	RegistryToken string `json:"registrytoken"`
}

// credential returns what an entry holds, which may be nothing.
func (e authEntry) credential() (remote.Credential, error) {
	c := remote.Credential{Username: e.Username, Password: e.Password, RefreshToken: e.IdentityToken, AccessToken: e.RegistryToken}
	if e.Auth != "" && c.Username == "" && c.Password == "" {
		b, err := base64.StdEncoding.DecodeString(strings.TrimRight(e.Auth, "\x00"))
		if err != nil {
			return c, errors.New("auth is not base64")
		}
		name, password, ok := strings.Cut(string(b), ":")
		if !ok {
			return c, errors.New("auth has no colon in it")
		}
		c.Username, c.Password = name, strings.Trim(password, "\x00")
	}
	return c, nil
}

// parseAuths reads docker's config.json, or the older form that is only what is
// in its "auths" (kubernetes.io/dockerconfigjson and kubernetes.io/dockercfg).
func parseAuths(content []byte) (auths, error) {
	var doc struct {
		Auths auths `json:"auths"`
	}
	if err := json.Unmarshal(content, &doc); err == nil && doc.Auths != nil {
		return doc.Auths, nil
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(content, &fields); err != nil {
		return nil, errors.New("it isn't JSON as docker writes it") // the error may quote a secret
	}
	old := make(auths)
	for key, value := range fields {
		var e authEntry
		if strings.ContainsAny(key, ".:") && json.Unmarshal(value, &e) == nil {
			old[key] = e
		}
	}
	return old, nil
}

// find returns the credential for a repository: of all entries that match the
// one with the most specific key, the first that isn't refused; or a refused one
// if all are. The error is ErrNone if there's none.
func (a auths) find(req Request) (remote.Credential, error) {
	var keys []string
	for key := range a {
		if matches(key, req) {
			keys = append(keys, key)
		}
	}
	slices.SortFunc(keys, func(a, b string) int {
		if d := len(bare(b)) - len(bare(a)); d != 0 {
			return d
		}
		return strings.Compare(a, b)
	})
	found, err := remote.Credential{}, ErrNone
	for _, key := range keys {
		c, cerr := a[key].credential()
		switch {
		case cerr != nil:
			if err == ErrNone {
				err = fmt.Errorf("the entry of %.100q: %w", key, cerr)
			}
		case c == remote.Credential{}:
		case !req.refused(c):
			return c, nil
		default:
			found, err = c, nil
		}
	}
	return found, err
}

// bare is a key without its scheme.
func bare(key string) string {
	return strings.TrimPrefix(strings.TrimPrefix(key, "https://"), "http://")
}

// fileVersion returns a value that changes when the file of that name does, or is
// another one.
func fileVersion(name string) string {
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil {
		return name + ": " + err.Error()
	}
	return fmt.Sprint(name, " ", st.Dev, st.Ino, st.Size, st.Mtim.Nano(), st.Ctim.Nano())
}

// fileAuths looks for an entry in a docker configuration. A file that isn't there
// has none.
func fileAuths(name string, req Request) (remote.Credential, error) {
	content, err := durable.ReadFile(name, maxConfig)
	if errors.Is(err, os.ErrNotExist) {
		return remote.Credential{}, ErrNone
	}
	if err != nil {
		return remote.Credential{}, err
	}
	a, err := parseAuths(content)
	if err != nil {
		return remote.Credential{}, fmt.Errorf("%s: %w", name, err)
	}
	c, err := a.find(req)
	if err != nil && !errors.Is(err, ErrNone) {
		err = fmt.Errorf("%s: %w", name, err)
	}
	return c, err
}
