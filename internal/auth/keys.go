package auth

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	"golang.org/x/time/rate"

	"sluice/internal/storage"
)

const (
	keysPrefix = "registry/keys/"

	// keysTTL is how long what another replica did to the keys may go
	// unnoticed, except that an unknown key is looked for at once.
	keysTTL = time.Minute

	// keyGrace is how long a key may still sign, by a replica that hasn't
	// noticed its successor; it is much more than keysTTL.
	keyGrace = 15 * time.Minute

	maxKeyObject = 16 << 10 // bytes
	maxKeys      = 100
)

var keyIDPattern = regexp.MustCompile(`^[0-9a-f]{32}$`)

// keyObject is a signing key as it is stored. The key's ID is made from its
// public part, and is its name.
type keyObject struct {
	Created time.Time       `json:"created"`
	Key     jose.JSONWebKey `json:"key"` // private as long as it signs
}

// keyring is the signing keys, of which the newest signs. Every replica reads
// them from the storage. One replaces the newest when it is old enough; that
// two do so at once does no harm. A replaced key loses its private part after
// keyGrace, and is deleted when everything it signed has expired.
type keyring struct {
	store    storage.Store
	now      func() time.Time
	rotation time.Duration // how long a key signs
	lifetime time.Duration // of the tokens it signs, at most
	log      *slog.Logger

	loading sync.Mutex // held while the storage is read or changed
	unknown *rate.Limiter
	state   atomic.Pointer[keyState]
}

// keyState is what was read at one time. It doesn't change.
type keyState struct {
	read time.Time
	keys []keyObject // newest first
	sign jose.Signer // of the newest with a private part; nil if there is none
	born time.Time   // when that was made
}

func (s *keyState) find(id string) *keyObject {
	i := slices.IndexFunc(s.keys, func(k keyObject) bool { return k.Key.KeyID == id })
	if i < 0 {
		return nil
	}
	return &s.keys[i]
}

// newKeyring reads the keys, and makes one if there is none.
func newKeyring(ctx context.Context, k *keyring) (*keyring, error) {
	k.unknown = rate.NewLimiter(1, 10)
	_, err := k.signer(ctx)
	return k, err
}

// public returns the public key of an ID, or nil if it is unknown.
func (k *keyring) public(ctx context.Context, id string) (*jose.JSONWebKey, error) {
	if !keyIDPattern.MatchString(id) {
		return nil, nil
	}
	s, err := k.current(ctx)
	if err != nil {
		return nil, err
	}
	found := s.find(id)
	// Another replica may have made it just now. Whoever makes IDs up can
	// have the storage read once a second, but everybody gains from that.
	if found == nil && k.unknown.AllowN(k.now(), 1) {
		if s, err = k.load(ctx, s); err != nil {
			return nil, err
		}
		found = s.find(id)
	}
	if found == nil {
		return nil, nil
	}
	public := found.Key.Public()
	return &public, nil
}

// published returns all public keys, for /oauth2/keys.
func (k *keyring) published(ctx context.Context) (jose.JSONWebKeySet, error) {
	s, err := k.current(ctx)
	if err != nil {
		return jose.JSONWebKeySet{}, err
	}
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	for _, o := range s.keys {
		set.Keys = append(set.Keys, o.Key.Public())
	}
	return set, nil
}

// signer returns the newest key's, after replacing it if it is due.
func (k *keyring) signer(ctx context.Context) (jose.Signer, error) {
	s, err := k.current(ctx)
	if err != nil {
		return nil, err
	}
	if s.sign != nil && k.now().Sub(s.born) < k.rotation {
		return s.sign, nil
	}
	fresh, err := k.rotate(ctx)
	if err != nil && s.sign != nil {
		k.log.Error("the signing key can't be replaced; the old one goes on", "error", err)
		return s.sign, nil
	}
	if err != nil {
		return nil, err
	}
	return fresh.sign, nil
}

// current returns the keys as of at most keysTTL ago; as they were read last,
// if the storage doesn't answer.
func (k *keyring) current(ctx context.Context) (*keyState, error) {
	s := k.state.Load()
	if s != nil && k.now().Sub(s.read) < keysTTL {
		return s, nil
	}
	fresh, err := k.load(ctx, s)
	if err != nil && s != nil && ctx.Err() == nil {
		k.log.Error("signing keys can't be read; those known before are used", "error", err)
		return s, nil
	}
	return fresh, err
}

// load reads the keys, unless somebody did since seen was read.
func (k *keyring) load(ctx context.Context, seen *keyState) (*keyState, error) {
	k.loading.Lock()
	defer k.loading.Unlock()
	if s := k.state.Load(); s != seen {
		return s, nil
	}
	return k.loadLocked(ctx)
}

func (k *keyring) loadLocked(ctx context.Context) (*keyState, error) {
	s := &keyState{read: k.now()}
	for name, err := range k.store.List(ctx, keysPrefix, "") {
		if err != nil {
			return nil, fmt.Errorf("signing keys: %w", err)
		}
		o, err := k.readKey(ctx, name)
		if errors.Is(err, storage.ErrNotFound) {
			continue // deleted meanwhile
		}
		if errors.Is(err, errDamagedKey) {
			k.log.Error("a signing key is left out", "error", err)
			continue
		}
		if err != nil {
			return nil, err
		}
		if s.keys = append(s.keys, o); len(s.keys) > maxKeys {
			return nil, fmt.Errorf("more than %d signing keys below %s: remove the oldest", maxKeys, keysPrefix)
		}
	}
	// All replicas must agree on the newest, also of two made at once.
	slices.SortFunc(s.keys, func(a, b keyObject) int {
		if c := b.Created.Compare(a.Created); c != 0 {
			return c
		}
		return strings.Compare(a.Key.KeyID, b.Key.KeyID)
	})
	if i := slices.IndexFunc(s.keys, func(o keyObject) bool { return !o.Key.IsPublic() }); i >= 0 {
		var err error
		s.born = s.keys[i].Created
		s.sign, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: s.keys[i].Key}, (&jose.SignerOptions{}).WithType("JWT"))
		if err != nil {
			return nil, fmt.Errorf("signing key %s: %w", s.keys[i].Key.KeyID, err)
		}
	}
	k.state.Store(s)
	return s, nil
}

var errDamagedKey = errors.New("damaged")

func (k *keyring) readKey(ctx context.Context, name string) (keyObject, error) {
	data, err := storage.ReadAll(ctx, k.store, name, maxKeyObject)
	if err != nil {
		return keyObject{}, fmt.Errorf("signing key: %w", err)
	}
	var o keyObject
	// What is wrong isn't said: it might quote the key.
	if json.Unmarshal(data, &o) != nil || !o.Key.Valid() {
		return keyObject{}, fmt.Errorf("signing key %s: %w", name, errDamagedKey)
	}
	id, err := keyID(o.Key)
	if err != nil || name != keysPrefix+id || o.Key.KeyID != id || o.Key.Algorithm != string(jose.ES256) {
		return keyObject{}, fmt.Errorf("signing key %s: %w: it is not a key of this name", name, errDamagedKey)
	}
	return o, nil
}

// keyID is made from the key's public part (RFC 7638).
func keyID(key jose.JSONWebKey) (string, error) {
	if pub, ok := key.Public().Key.(*ecdsa.PublicKey); !ok || pub.Curve != elliptic.P256() {
		return "", errors.New("not a key of P-256")
	}
	sum, err := key.Thumbprint(crypto.SHA256)
	if err != nil {
		return "", err
	}
	return hex.EncodeToString(sum[:16]), nil
}

// rotate makes a new key if the newest is due, and clears away old ones.
func (k *keyring) rotate(ctx context.Context) (*keyState, error) {
	k.loading.Lock()
	defer k.loading.Unlock()
	s, err := k.loadLocked(ctx)
	if err != nil {
		return nil, err
	}
	if s.sign == nil || k.now().Sub(s.born) >= k.rotation {
		if err := k.create(ctx); err != nil {
			return nil, err
		}
		if s, err = k.loadLocked(ctx); err != nil {
			return nil, err
		}
		if s.sign == nil {
			return nil, errors.New("the signing key that was just made can't be read back")
		}
	}
	k.clear(ctx, s)
	return s, nil
}

func (k *keyring) create(ctx context.Context) error {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("new signing key: %w", err)
	}
	key := jose.JSONWebKey{Key: private, Algorithm: string(jose.ES256), Use: "sig"}
	if key.KeyID, err = keyID(key); err != nil {
		return fmt.Errorf("new signing key: %w", err)
	}
	return k.put(ctx, keyObject{Created: k.now().UTC(), Key: key})
}

func (k *keyring) put(ctx context.Context, o keyObject) error {
	data, err := json.Marshal(o)
	if err == nil {
		err = k.store.Put(ctx, keysPrefix+o.Key.KeyID, data)
	}
	if err != nil {
		return fmt.Errorf("signing key %s can't be stored: %w", o.Key.KeyID, err)
	}
	return nil
}

// clear makes keys public that no longer sign, and deletes those whose tokens
// have all expired.
func (k *keyring) clear(ctx context.Context, s *keyState) {
	for i, o := range s.keys {
		if i == 0 {
			continue
		}
		replaced := k.now().Sub(s.keys[i-1].Created)
		var err error
		switch {
		case replaced > k.lifetime+keyGrace:
			err = k.store.Delete(ctx, keysPrefix+o.Key.KeyID)
		case replaced > keyGrace && !o.Key.IsPublic():
			o.Key = o.Key.Public()
			err = k.put(ctx, o)
		}
		if err != nil && !errors.Is(err, storage.ErrNotFound) { // another replica's work
			k.log.Error("an old signing key stays for now", "key", o.Key.KeyID, "error", err)
		}
	}
}
