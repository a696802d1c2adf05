package azureblob

import (
	"context"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/sas"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/service"
)

// delegation is a key that the service gave to an identity for signing URLs.
type delegation struct {
	key    *service.UserDelegationCredential
	expiry time.Time
}

// delegationLife is for how long a key is asked for; a week is allowed.
const delegationLife = 24 * time.Hour

// skew is how far another clock may be behind: a URL is valid from then on.
const skew = 5 * time.Minute

// SignURL implements storage.Bucket: a service SAS by the account's key, or by a
// key that is delegated to the identity.
func (b *bucket) SignURL(ctx context.Context, name string, ttl time.Duration) (string, error) {
	now := time.Now().UTC()
	start := now.Add(-skew)
	client := b.blob(name)
	if b.signsByKey {
		u, err := client.BlobClient().GetSASURL(sas.BlobPermissions{Read: true}, now.Add(ttl), nil)
		return u, b.failed("sign a URL of", name, err)
	}
	key, err := b.delegated(ctx, now, ttl)
	if err != nil {
		return "", b.failed("get a key for signing a URL of", name, err)
	}
	values := sas.BlobSignatureValues{
		Protocol: sas.ProtocolHTTPS, ContainerName: b.name, BlobName: name,
		StartTime: start, ExpiryTime: now.Add(ttl), Permissions: (&sas.BlobPermissions{Read: true}).String(),
	}
	signed, err := values.SignWithUserDelegation(key)
	if err != nil {
		return "", b.failed("sign a URL of", name, err)
	}
	return client.URL() + "?" + signed.Encode(), nil
}

// delegated returns a key that is valid for ttl at least.
func (b *bucket) delegated(ctx context.Context, now time.Time, ttl time.Duration) (*service.UserDelegationCredential, error) {
	b.mu.Lock()
	defer b.mu.Unlock() // held during the request: one is enough for all
	if b.delegation.key != nil && now.Add(ttl).Before(b.delegation.expiry) {
		return b.delegation.key, nil
	}
	expiry := now.Add(max(delegationLife, ttl+time.Hour))
	from, until := now.Add(-skew).Format(time.RFC3339), expiry.Format(time.RFC3339)
	key, err := b.service.GetUserDelegationCredential(ctx, service.KeyInfo{Start: &from, Expiry: &until}, nil)
	if err != nil {
		return nil, err
	}
	b.delegation = delegation{key, expiry}
	return key, nil
}
