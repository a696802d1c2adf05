package auth

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"
)

const (
	// maxToken bounds a JWT that anybody sends, in bytes. Ours are smaller;
	// Microsoft Entra's have several KiB when the account is in many groups.
	maxToken = 32 << 10

	// clockSkew is how far the clocks of two replicas may be apart.
	clockSkew = time.Minute

	// parsedTTL bounds how long a token whose signature was right needn't be
	// checked again; a key that was withdrawn works that much longer.
	parsedTTL = time.Minute
	maxParsed = 2048 // of 30 KiB at most, less than 1 KiB usually

	claimsVersion = "1.0"
)

// claims are those of our own tokens, spelled as Azure's are (docs/AAD-OAuth.md
// of Azure/acr, "token claim sets"). An access token has Access, a refresh
// token Permissions; which of them is there says what it is.
type claims struct {
	ID          string       `json:"jti"`
	Subject     string       `json:"sub"`
	NotBefore   int64        `json:"nbf"`
	Expiry      int64        `json:"exp"`
	IssuedAt    int64        `json:"iat"`
	Issuer      string       `json:"iss"`
	Audience    string       `json:"aud"`
	Version     string       `json:"version"`
	Access      *[]Access    `json:"access,omitempty"`
	Permissions *permissions `json:"permissions,omitempty"`
	Roles       []string     `json:"roles"`
	GrantType   string       `json:"grant_type"`
	Tenant      string       `json:"tenant,omitempty"`

	// Principal is our own: what is needed to look the account up again.
	Principal principal `json:"sluice"`
}

type permissions struct {
	Actions    []string `json:"actions"`
	NotActions []string `json:"notActions"`
}

// principal is which account a token is of, besides its name.
type principal struct {
	Kind Kind `json:"kind"`

	// Created tells a token from an earlier one of the same name.
	Created int64 `json:"created,omitempty"`

	// ScopeMap and Issuer are those of a federated caller.
	ScopeMap string `json:"scopeMap,omitempty"`
	Issuer   string `json:"issuer,omitempty"`
}

// errToken is all that is told of a token that isn't good.
var errToken = errors.New("the token is not valid, or has expired")

// issue signs c, whose account, audience and kind are filled in, for so long.
// It returns the token, and how long it is really valid: not beyond limit,
// unless that is zero.
func (a *Authority) issue(ctx context.Context, c claims, lifetime time.Duration, limit time.Time) (string, time.Duration, error) {
	now := a.now()
	expiry := now.Add(lifetime)
	if !limit.IsZero() && limit.Before(expiry) {
		expiry = limit
	}
	c.ID, c.Issuer, c.Version, c.Roles = newUUID(), a.opts.Issuer, claimsVersion, []string{}
	c.IssuedAt, c.NotBefore, c.Expiry = now.Unix(), now.Unix(), expiry.Unix()
	signer, err := a.keys.signer(ctx)
	if err != nil {
		return "", 0, err
	}
	payload, err := json.Marshal(c)
	if err != nil {
		return "", 0, err
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		return "", 0, fmt.Errorf("token can't be signed: %w", err)
	}
	token, err := jws.CompactSerialize()
	return token, time.Unix(c.Expiry, 0).Sub(now), err
}

// verify returns the claims of a token of ours that is valid now and meant for
// the service. What is wrong with another isn't told: errToken.
func (a *Authority) verify(ctx context.Context, token, service string) (*claims, error) {
	if len(token) > maxToken {
		return nil, errToken
	}
	now := a.now()
	key := sha256.Sum256([]byte(token))
	c, ok, sets := a.parsed.get(key, now)
	if !ok {
		var err error
		if c, err = a.parse(ctx, token); err != nil {
			return nil, err
		}
		a.parsed.fill(key, c, now.Add(parsedTTL), sets)
	}
	if c.Issuer != a.opts.Issuer || c.Audience != service ||
		now.Unix() >= c.Expiry || now.Add(clockSkew).Unix() < c.NotBefore {
		return nil, errToken
	}
	return c, nil
}

func (a *Authority) parse(ctx context.Context, token string) (*claims, error) {
	jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil || len(jws.Signatures) != 1 {
		return nil, errToken
	}
	key, err := a.keys.public(ctx, jws.Signatures[0].Protected.KeyID)
	if err != nil {
		return nil, err
	}
	if key == nil {
		return nil, errToken
	}
	payload, err := jws.Verify(key)
	if err != nil {
		return nil, errToken
	}
	var c claims
	if err := json.Unmarshal(payload, &c); err != nil {
		return nil, errToken
	}
	return &c, nil
}

// newUUID returns a random UUID (RFC 9562, version 4).
func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // it never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
