// Package auth says who asks a registry for something, and what they may have.
//
// An Authority keeps the accounts and their signing keys in the registry's
// storage, so every replica knows the same; it answers /oauth2/… (ServeHTTP:
// access and refresh tokens, the published keys), tells who a request comes
// from (Authenticate), what they may do (Caller.Allows), and where one without
// rights gets some (Challenge). The wire form is that of Azure Container
// Registry (docs/AAD-OAuth.md and docs/Token-BasicAuth.md of Azure/acr), which
// is that of Docker's registry with an exchange of other issuers' tokens.
//
// # Callers
//
//   - the admin user: everything. Enabled by configuration.
//   - a token: an account with one scope map and two passwords, so that one
//     can be renewed while the other is in use.
//   - federated: whoever holds a token of a configured OpenID issuer
//     (Microsoft Entra, Kubernetes service accounts); a rule maps its claims
//     to a scope map.
//   - anonymous: reads the repositories that are open to all.
//
// A ScopeMap lists what its holders may do, as "repositories/team/*/content/read".
// What one asks of the token server and what one has are intersected, so a
// client that asks for pull and push, and may pull, gets pull.
//
// # What is where
//
//	registry/tokens/{name}      a token, its passwords as bcrypt hashes
//	registry/scope-maps/{name}  a scope map
//	registry/admin              the admin user's passwords
//	registry/keys/{kid}         a signing key, private while it signs
//
// Whoever can read the storage can take the private keys, and with them any
// identity; it has to be kept as a secret anyway, since all images are in it.
//
// # How soon a change holds
//
// In the process that made it, at once: for passwords, for new tokens and for
// access tokens already issued (they name their account, which must still be
// enabled and whose scope map must still allow it: stricter than Azure's). In
// other replicas after at most recordTTL, five seconds. A key that was deleted
// from the storage by hand is distrusted within two minutes.
//
// Replicas must agree on the time within a minute.
package auth
