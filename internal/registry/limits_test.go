package registry

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sluice/internal/auth"
)

func TestLimiterAllowsItsRate(t *testing.T) {
	l, now := newLimiter(60), time.Unix(1e9, 0)
	taken := 0
	for range 600 { // ten minutes, ten a second
		for range 10 {
			if l.take("a", now) == 0 {
				taken++
			}
		}
		now = now.Add(time.Second)
	}
	if taken < 600 || taken > 660 { // one a second, and the first minute's at once
		t.Errorf("%d in ten minutes, want 60 a minute", taken)
	}
	for l.take("a", now) == 0 {
	}
	wait := l.take("a", now)
	if wait <= 0 || wait > time.Second {
		t.Errorf("the wait is %v", wait)
	}
	if l.take("a", now.Add(wait)) != 0 {
		t.Error("after the wait there is none either")
	}
	if l.take("b", now) != 0 {
		t.Error("another caller is refused")
	}
}

// However many callers come, memory is bounded; one that comes all the time is
// not forgotten, and so is limited.
func TestLimiterForgets(t *testing.T) {
	l, now := newLimiter(10), time.Unix(1e9, 0)
	taken := 0
	for i := range 5 * maxBuckets {
		if l.take("busy", now) == 0 {
			taken++
		}
		l.take(fmt.Sprint(i), now)
		now = now.Add(time.Millisecond)
	}
	if n := len(l.young) + len(l.old); n > 2*maxBuckets+1 {
		t.Errorf("%d buckets", n)
	}
	if most := 10 + 5*maxBuckets/6000 + 1; taken > most { // 10 a minute, 1000 tries a second
		t.Errorf("the busy caller took %d, want at most %d", taken, most)
	}
	now = now.Add(2 * time.Minute)
	l.take("x", now)
	l.take("x", now.Add(2*time.Minute))
	l.take("y", now.Add(2*time.Minute))
	if n := len(l.young) + len(l.old); n > 3 {
		t.Errorf("%d buckets after minutes of rest", n)
	}
}

func TestLimiterConcurrently(t *testing.T) {
	l, now := newLimiters(Limits{Reads: 100}, connectionAddress), time.Unix(1e9, 0)
	var taken atomic.Int64
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			r := httptest.NewRequest(http.MethodGet, "/v2/", nil)
			for range 100 {
				if _, wait := l.take(r, auth.Caller{Name: "a", Kind: auth.KindToken}, now); wait == 0 {
					taken.Add(1)
				}
			}
		})
	}
	group.Wait()
	if n := taken.Load(); n != 100 {
		t.Errorf("%d were allowed at once, want 100", n)
	}
}

func TestAddresses(t *testing.T) {
	for address, want := range map[string]string{
		"192.0.2.1": "192.0.2.1", "2001:db8::1": "2001:db8::", "2001:db8::2": "2001:db8::", "2001:db8:0:1::2": "2001:db8:0:1::", "@": "@", "::ffff:192.0.2.1": "::ffff:192.0.2.1",
	} {
		if got := addressGroup(address); got != want {
			t.Errorf("%s: %s, want %s", address, got, want)
		}
	}
	for header, want := range map[string]string{"": "192.0.2.1", "10.0.0.1": "10.0.0.1", "6.6.6.6, 10.0.0.1": "10.0.0.1", "evil": "192.0.2.1", "10.0.0.1,": "192.0.2.1"} {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.RemoteAddr = "192.0.2.1:1234"
		if header != "" {
			r.Header.Set("X-Forwarded-For", header)
		}
		if got := ForwardedAddress(r); got != want {
			t.Errorf("%q: %s, want %s", header, got, want)
		}
	}
	for path, want := range map[string]bool{"/v2/a/referrers/sha256:x": true, "/v2/a/b/referrers/x": true, "/v2/a/manifests/x": false, "/referrers/x": false, "/v2/referrers/tags/list": false} {
		if isReferrers(path) != want {
			t.Errorf("%s: %v", path, !want)
		}
	}
}
