package registry

import (
	"math"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"sluice/internal/auth"
	"sluice/oci"
)

// Limits is how many requests one caller may send in a minute: an account or,
// if anonymous, a client's address. Zero means as many as they like. A caller
// who was quiet for a minute may send a whole minute's requests at once.
//
// Azure's registries of the largest kind have Reads 10,000, Writes 2,000 and
// Referrers 1,000.
type Limits struct {
	Reads     int // GET and HEAD
	Writes    int // every other method
	Referrers int // lists of referrers, which count as reads too
}

// maxBuckets bounds how many callers a limiter remembers: twice as many, about
// 200 bytes each.
const maxBuckets = 10_000

// limiters are the limits of a front.
type limiters struct {
	reads, writes, referrers *limiter // nil: no limit
	address                  func(*http.Request) string
}

func newLimiters(l Limits, address func(*http.Request) string) limiters {
	return limiters{newLimiter(l.Reads), newLimiter(l.Writes), newLimiter(l.Referrers), address}
}

// take takes one request from a caller's allowance. If there is none left it
// returns which limit that is and how long to wait.
func (l limiters) take(r *http.Request, caller auth.Caller, now time.Time) (limit string, wait time.Duration) {
	if l.reads == nil && l.writes == nil && l.referrers == nil {
		return "", 0
	}
	who := string(caller.Kind) + " " + caller.Name
	if caller.Name == "" {
		who = "address " + addressGroup(l.address(r))
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return "writes", l.writes.take(who, now)
	}
	if isReferrers(r.URL.Path) {
		if wait := l.referrers.take(who, now); wait > 0 {
			return "referrers", wait
		}
	}
	return "reads", l.reads.take(who, now)
}

// addressGroup returns an IP address; of IPv6 the first 64 bits, since one
// subscriber has all that begin with them.
func addressGroup(address string) string {
	ip := net.ParseIP(address)
	if ip == nil || ip.To4() != nil {
		return address
	}
	return ip.Mask(net.CIDRMask(64, 128)).String()
}

// isReferrers reports whether a path is /v2/REPOSITORY/referrers/DIGEST.
func isReferrers(path string) bool {
	rest, last := path, strings.LastIndexByte(path, '/')
	if last >= 0 {
		rest = path[:last]
	}
	return strings.HasPrefix(path, "/v2/") && strings.HasSuffix(rest, "/referrers")
}

// limiter has a token bucket for each caller. A bucket that nobody took from
// for a minute is full again, so it can be forgotten: the buckets are in two
// generations, and the older one is dropped each minute.
type limiter struct {
	perMinute int

	mu         sync.Mutex
	young, old map[string]*rate.Limiter
	turned     time.Time // when old was young
}

func newLimiter(perMinute int) *limiter {
	if perMinute <= 0 {
		return nil
	}
	return &limiter{perMinute: perMinute, young: map[string]*rate.Limiter{}}
}

// take takes a token and returns 0, or how long it takes until there is one.
func (l *limiter) take(who string, now time.Time) time.Duration {
	if l == nil {
		return 0
	}
	reservation := l.bucket(who, now).ReserveN(now, 1)
	wait := reservation.DelayFrom(now)
	if wait > 0 {
		reservation.CancelAt(now)
	}
	return wait
}

func (l *limiter) bucket(who string, now time.Time) *rate.Limiter {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.young[who]
	if b != nil {
		return b
	}
	// When there are more callers than can be remembered, some of them have
	// their allowance renewed early.
	if now.Sub(l.turned) > time.Minute || len(l.young) >= maxBuckets {
		l.young, l.old, l.turned = map[string]*rate.Limiter{}, l.young, now
	}
	if b = l.old[who]; b == nil {
		b = rate.NewLimiter(rate.Limit(float64(l.perMinute)/60), l.perMinute)
	}
	l.young[who] = b
	return b
}

// tooManyRequests is the answer to a caller who has to wait.
func tooManyRequests(limit string, wait time.Duration) error {
	seconds := strconv.Itoa(max(1, int(math.Ceil(wait.Seconds()))))
	return &StatusError{
		Status: http.StatusTooManyRequests,
		Header: http.Header{"Retry-After": {seconds}},
		Err:    oci.ErrTooManyRequests.Withf("too many requests (%s): try again in %s seconds", limit, seconds),
	}
}
