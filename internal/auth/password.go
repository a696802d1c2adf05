package auth

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"runtime"
	"time"

	"golang.org/x/crypto/bcrypt"
	"golang.org/x/sync/singleflight"
)

const (
	// maxPassword is all that bcrypt looks at, in bytes.
	maxPassword = 72

	// verifiedTTL is how long a password that was right needn't be hashed
	// again. A new hash or none makes it worthless at once, since it is in
	// the key; expiry and status are looked at every time.
	verifiedTTL = 5 * time.Minute

	maxVerified = 4096

	// slotWait bounds how long a password waits for a processor.
	slotWait = 5 * time.Second
)

// newSecret returns 256 random bits in 43 characters.
func newSecret() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // it never fails
	return base64.RawURLEncoding.EncodeToString(b[:])
}

// passwords compares passwords with bcrypt's hashes. bcrypt is slow on purpose,
// so whatever was right is remembered for a while, under an HMAC whose key only
// this process has; and few are computed at the same time.
type passwords struct {
	cost     int
	now      func() time.Time
	decoy    []byte // a hash that no password has, for accounts without
	key      [32]byte
	verified cache[string, struct{}]
	flights  singleflight.Group
	slots    chan struct{}
}

func newPasswords(cost int, now func() time.Time) (*passwords, error) {
	p := &passwords{
		cost: cost, now: now,
		verified: cache[string, struct{}]{max: maxVerified},
		// Half of the processors, so that guessing doesn't stop the rest.
		slots: make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2)),
	}
	_, _ = rand.Read(p.key[:])
	var err error
	p.decoy, err = p.hash(newSecret())
	return p, err
}

func (p *passwords) hash(password string) ([]byte, error) {
	return bcrypt.GenerateFromPassword([]byte(password), p.cost)
}

// is compares at once, without memory.
func (p *passwords) is(password string, hash []byte) bool {
	return hash != nil && bcrypt.CompareHashAndPassword(hash, []byte(password)) == nil
}

// mac makes one key of several parts.
func (p *passwords) mac(parts ...[]byte) string {
	h := hmac.New(sha256.New, p.key[:])
	var n [8]byte
	for _, part := range parts {
		binary.LittleEndian.PutUint64(n[:], uint64(len(part)))
		h.Write(n[:])
		h.Write(part)
	}
	return string(h.Sum(nil))
}

// guess is one attempt to sign in.
type guess struct {
	address, account, password string
	hashes                     [2][]byte // of the account's passwords, nil where there is none
}

// match returns which of the hashes is the password's, or -1. It takes as long
// for an account that has none. The same guess made several times at once is
// one; attempts bounds how many there are.
func (p *passwords) match(ctx context.Context, g guess, limits *attempts) (int, error) {
	if g.password == "" || len(g.password) > maxPassword {
		return -1, nil // nobody's
	}
	var known [2]string
	for i, hash := range g.hashes {
		known[i] = p.mac([]byte(g.account), []byte(g.password), hash)
		if _, ok, _ := p.verified.get(known[i], p.now()); ok && hash != nil {
			return i, nil
		}
	}
	flight := p.mac([]byte(g.address), []byte(g.account), []byte(g.password), g.hashes[0], g.hashes[1])
	result := p.flights.DoChan(flight, func() (any, error) {
		if err := limits.admit(g.address, g.account); err != nil {
			return -1, err
		}
		select {
		case p.slots <- struct{}{}:
			defer func() { <-p.slots }()
		case <-time.After(slotWait):
			limits.undecided(g.address, g.account)
			return -1, &LimitError{RetryAfter: slotWait}
		}
		found := -1
		for i, hash := range g.hashes {
			if hash == nil {
				p.is(g.password, p.decoy)
			} else if p.is(g.password, hash) {
				found = i
				p.verified.set(known[i], struct{}{}, p.now().Add(verifiedTTL))
				limits.succeeded(g.address, g.account)
			}
		}
		return found, nil
	})
	select {
	case r := <-result:
		return r.Val.(int), r.Err
	case <-ctx.Done():
		return -1, ctx.Err()
	}
}
