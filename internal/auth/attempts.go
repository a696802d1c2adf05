package auth

import (
	"fmt"
	"math"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"sluice/oci"
)

// LimitError says that there were too many attempts to sign in. It is
// oci.ErrTooManyRequests, and an HTTP server says RetryAfter in the header
// Retry-After.
type LimitError struct {
	RetryAfter time.Duration
}

// Error implements error.
func (e *LimitError) Error() string {
	return fmt.Sprintf("too many attempts to sign in: try again in %d seconds", e.Seconds())
}

// Seconds is RetryAfter as the header wants it, at least 1.
func (e *LimitError) Seconds() int { return max(1, int(math.Ceil(e.RetryAfter.Seconds()))) }

// Unwrap returns the code on the wire.
func (e *LimitError) Unwrap() error { return oci.ErrTooManyRequests }

// attempts counts wrong passwords and makes whoever tries many wait: by account
// and address together, by address, and by account.
//
// The limit of an account as such holds only for addresses from which a wrong
// password for it came lately. So nobody can lock an account's owner out: what
// strangers do at other addresses doesn't matter to the first attempt from the
// owner's. And passwords that were right minutes ago aren't counted at all.
type attempts struct {
	now func() time.Time

	mu       sync.Mutex               // makes a look at several counts and their change one
	failures cache[attemptKey, count] // under mu
}

// attemptKey has an address, an account, or both.
type attemptKey struct{ address, account string }

type count struct {
	n    int
	last time.Time
}

const (
	maxAttempts = 16_384           // counts kept
	attemptsTTL = 15 * time.Minute // after the last wrong one
)

// patience is how many wrong passwords are free, and how long the wait may
// become, which begins with a second and doubles with each further one.
type patience struct {
	free    int
	longest time.Duration
}

func (k attemptKey) patience() patience {
	switch {
	case k.account == "":
		return patience{free: 50, longest: 10 * time.Second} // a whole company may be behind one address
	case k.address == "":
		return patience{free: 100, longest: 10 * time.Second}
	}
	return patience{free: 10, longest: time.Minute}
}

func (p patience) wait(n int) time.Duration {
	if n < p.free {
		return 0
	}
	return min(time.Second<<min(n-p.free, 16), p.longest)
}

func newAttempts(now func() time.Time) *attempts {
	return &attempts{now: now, failures: cache[attemptKey, count]{max: maxAttempts}}
}

// admit counts an attempt as a wrong one until it succeeded, or refuses it with
// a LimitError. What is refused isn't counted, so no wait gets longer by asking.
// Without an account it is one of the address alone.
func (a *attempts) admit(address, account string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.now()
	var wait time.Duration
	for _, k := range keysOf(address, account) {
		c, ok, _ := a.failures.get(k, now)
		if k.address == "" {
			_, ok, _ = a.failures.get(attemptKey{address, account}, now)
		}
		if ok {
			wait = max(wait, c.last.Add(k.patience().wait(c.n)).Sub(now))
		}
	}
	if wait > 0 {
		return &LimitError{RetryAfter: wait}
	}
	for _, k := range keysOf(address, account) {
		c, _, _ := a.failures.get(k, now)
		a.failures.set(k, count{c.n + 1, now}, now.Add(attemptsTTL))
	}
	return nil
}

// succeeded takes an attempt back that was right, and with it what went wrong
// before at this address with this account.
func (a *attempts) succeeded(address, account string) { a.takeBack(address, account, true) }

// undecided takes an attempt back of which nobody knows whether it was right.
func (a *attempts) undecided(address, account string) { a.takeBack(address, account, false) }

func (a *attempts) takeBack(address, account string, right bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.now()
	for _, k := range keysOf(address, account) {
		c, ok, _ := a.failures.get(k, now)
		switch forgiven := right && k.address != "" && k.account != ""; {
		case ok && c.n > 1 && !forgiven:
			a.failures.set(k, count{c.n - 1, c.last}, now.Add(attemptsTTL))
		case ok:
			a.failures.drop(k)
		}
	}
}

func keysOf(address, account string) []attemptKey {
	if account == "" {
		return []attemptKey{{address: address}}
	}
	return []attemptKey{{address, account}, {address: address}, {account: account}}
}

// clientAddress is the default of Options.ClientAddress.
func clientAddress(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	return host
}

// addressGroup is whom an address belongs to: of IPv6, everybody has 2^64.
func addressGroup(address string) string {
	ip, err := netip.ParseAddr(address)
	if err != nil {
		return clip(address)
	}
	if ip = ip.Unmap(); ip.Is6() {
		if p, err := ip.WithZone("").Prefix(64); err == nil {
			return p.String()
		}
	}
	return ip.String()
}
