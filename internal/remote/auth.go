package remote

import (
	"context"
	"fmt"
	"os"

	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/credentials"
)

// Credential is how to authenticate to a registry. The zero value is anonymous.
type Credential struct {
	// Username and Password, for Basic authentication or to get a token.
	Username, Password string

	// RefreshToken gets access tokens by OAuth 2; docker calls it the
	// identity token.
	RefreshToken string

	// AccessToken is sent as it is; docker calls it the registry token.
	AccessToken string
}

// String hides everything, so that no log or message shows a secret.
func (c Credential) String() string {
	if c == (Credential{}) {
		return "anonymous"
	}
	return "credential(hidden)"
}

// GoString is String: %#v hides secrets too.
func (c Credential) GoString() string { return c.String() }

// CredentialFunc returns the credential for a registry's host, which is spelled
// as in image references ("docker.io", "127.0.0.1:5000"). It is asked only when
// a server demands authentication, and again whenever a token has run out; so it
// should return what is valid now. It may be called concurrently.
//
// When the server refuses a credential (401 or 403, of the server or of where it
// sends us for tokens), the function is asked once more, with a context of which
// RefusalOf returns what was refused. If it then returns another credential, the
// request is tried again and the function asked again, which should now return
// the other one; if it returns the same, the refusal is the answer; and so it is
// if it returns an error, whose text is added.
type CredentialFunc func(ctx context.Context, host string) (Credential, error)

// Anonymous is a CredentialFunc without credentials.
func Anonymous(context.Context, string) (Credential, error) { return Credential{}, nil }

// DockerCredentials is a CredentialFunc that looks into docker's configuration,
// $DOCKER_CONFIG/config.json or $HOME/.docker/config.json, and asks the
// credential helpers it names. Both are read anew at each call, so a renewed
// login takes effect. Without a configuration it is Anonymous.
func DockerCredentials(ctx context.Context, host string) (Credential, error) {
	if os.Getenv("DOCKER_CONFIG") == "" && os.Getenv("HOME") == "" {
		return Credential{}, nil // a daemon without a home
	}
	store, err := credentials.NewStoreFromDocker(credentials.StoreOptions{})
	if err != nil {
		return Credential{}, fmt.Errorf("docker's credentials: %w", err)
	}
	c, err := store.Get(ctx, credentials.ServerAddressFromRegistry(host))
	if err != nil {
		return Credential{}, fmt.Errorf("docker's credentials for %s: %w", host, err)
	}
	return Credential(c), nil
}

// forOras returns f as the auth client wants it.
func (f CredentialFunc) forOras() auth.CredentialFunc {
	return func(ctx context.Context, host string) (auth.Credential, error) {
		c, err := f(ctx, credentialHost(host))
		if err == nil {
			gotWith(ctx, c)
		}
		return auth.Credential(c), err
	}
}

// credentialHost returns the name in references of the registry at an address.
func credentialHost(host string) string {
	if host == "registry-1.docker.io" {
		return "docker.io"
	}
	return host
}

// The scopes of tokens (https://distribution.github.io/distribution/spec/auth/scope/).
// There are as few kinds as possible, since the client keeps one token for each.

func pull(repo string) []string { return []string{auth.ScopeRepository(repo, auth.ActionPull)} }

func push(repo string) []string {
	return []string{auth.ScopeRepository(repo, auth.ActionPull, auth.ActionPush)}
}

func remove(repo string) []string {
	return []string{auth.ScopeRepository(repo, auth.ActionPull, auth.ActionDelete)}
}
