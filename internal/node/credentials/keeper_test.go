package credentials

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"sluice/internal/remote"
)

// asked is somebody to ask, in the test's own time.
type asked struct {
	mu    sync.Mutex
	times []time.Time
	next  func(ctx context.Context, n int, req Request) (got[remote.Credential], error)
}

func (a *asked) ask(ctx context.Context, req Request) (got[remote.Credential], error) {
	a.mu.Lock()
	a.times = append(a.times, time.Now())
	n := len(a.times)
	a.mu.Unlock()
	return a.next(ctx, n, req)
}

func (a *asked) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.times)
}

// password is an answer that is good for a time, and for all of a registry.
func password(n int, req Request, life time.Duration) got[remote.Credential] {
	return got[remote.Credential]{value: remote.Credential{Username: "u", Password: fmt.Sprint(n)}, key: registryKey(req), until: time.Now().Add(life)}
}

// kept is a source that has only a keeper.
type keptSource struct {
	*keeper[remote.Credential]
	hosts []string // none: all
}

func (s keptSource) Name() string { return "kept" }

func (s keptSource) Credential(ctx context.Context, req Request) (remote.Credential, time.Time, error) {
	if s.hosts != nil && !slices.Contains(s.hosts, req.Host) {
		return remote.Credential{}, time.Time{}, ErrNone
	}
	return s.get(ctx, req, []string{imageKey(req), registryKey(req)}, func(c remote.Credential) bool { return !req.refused(c) })
}

// inBubble runs a test with a source of its own time.
func inBubble(t *testing.T, next func(ctx context.Context, n int, req Request) (got[remote.Credential], error), test func(t *testing.T, a *asked, s keptSource)) {
	synctest.Test(t, func(t *testing.T) {
		a := &asked{next: next}
		s := keptSource{keeper: newKeeper(time.Minute, a.ask)}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { s.run(ctx) })
		test(t, a, s)
		cancel()
		wg.Wait()
	})
}

func TestOneQuestionForAll(t *testing.T) {
	next := func(_ context.Context, n int, req Request) (got[remote.Credential], error) {
		time.Sleep(2 * time.Second)
		return password(n, req, time.Hour), nil
	}
	inBubble(t, next, func(t *testing.T, a *asked, s keptSource) {
		var wg sync.WaitGroup
		for i := range 50 {
			wg.Go(func() {
				c, _, err := s.Credential(t.Context(), Request{Host: "a.io", Repository: fmt.Sprint("app", i)})
				if err != nil || c.Password != "1" {
					t.Errorf("%+v, %v", c, err)
				}
			})
		}
		wg.Wait()
		if n := a.count(); n != 1 {
			t.Errorf("%d questions for 50 requests at once", n)
		}
	})
}

// A credential is renewed ahead of its end as long as somebody uses it, so that
// nobody has to wait for that.
func TestRenewedAhead(t *testing.T) {
	next := func(_ context.Context, n int, req Request) (got[remote.Credential], error) {
		time.Sleep(time.Second)
		return password(n, req, time.Hour), nil
	}
	inBubble(t, next, func(t *testing.T, a *asked, s keptSource) {
		req := Request{Host: "a.io", Repository: "app"}
		get := func() string {
			began := time.Now()
			c, until, err := s.Credential(t.Context(), req)
			if err != nil || !time.Now().Before(until) {
				t.Fatalf("%v, until %v", err, until)
			}
			if a.count() > 1 && time.Since(began) > 0 {
				t.Errorf("waited for %v", time.Since(began))
			}
			return c.Password
		}
		get()
		for range 20 {
			time.Sleep(50 * time.Minute)
			get()
		}
		a.mu.Lock()
		times := slices.Clone(a.times)
		a.mu.Unlock()
		if n := len(times); n < 17 || n > 22 {
			t.Errorf("asked %d times in 17 hours, for what is good for an hour", n)
		}
		for i, at := range times[1:] {
			if d := at.Sub(times[i]); d < 45*time.Minute || d > time.Hour {
				t.Errorf("renewed after %v", d)
			}
		}
		time.Sleep(inUse + time.Hour)
		n := a.count()
		time.Sleep(100 * time.Hour)
		if a.count() != n {
			t.Error("what nobody uses is renewed for ever")
		}
		if s.get(t.Context(), req, []string{"x"}, nil); a.count() != n+1 { // and then it is asked for when it's wanted
			t.Error("not asked")
		}
	})
}

// A renewal that fails is repeated while the old credential is good.
func TestRenewalRetried(t *testing.T) {
	next := func(_ context.Context, n int, req Request) (got[remote.Credential], error) {
		if n == 2 {
			return got[remote.Credential]{}, errors.New("busy")
		}
		return password(n, req, time.Hour), nil
	}
	inBubble(t, next, func(t *testing.T, a *asked, s keptSource) {
		req := Request{Host: "a.io", Repository: "app"}
		for range 3 {
			if _, _, err := s.Credential(t.Context(), req); err != nil {
				t.Fatal(err)
			}
			time.Sleep(59 * time.Minute)
		}
		if n := a.count(); n < 4 || n > 5 {
			t.Errorf("asked %d times", n)
		}
	})
}

func TestFailureIsNotRepeatedAtOnce(t *testing.T) {
	next := func(_ context.Context, n int, req Request) (got[remote.Credential], error) {
		if req.Repository == "bad" {
			return got[remote.Credential]{}, errors.New("no such thing")
		}
		return password(n, req, time.Hour), nil
	}
	inBubble(t, next, func(t *testing.T, a *asked, s keptSource) {
		for range 600 {
			if _, _, err := s.Credential(t.Context(), Request{Host: "a.io", Repository: "bad"}); err == nil || err.Error() != "no such thing" {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		if n := a.count(); n < 5 || n > 12 {
			t.Errorf("asked %d times in 10 minutes", n)
		}
		// It is no obstacle to another repository of the registry.
		if _, _, err := s.Credential(t.Context(), Request{Host: "a.io", Repository: "good"}); err != nil {
			t.Error(err)
		}
	})
}

// A source that hangs delays its own registry's requests, by a bounded time.
func TestHangDelaysOnlyItsOwn(t *testing.T) {
	var ended atomic.Int32
	next := func(ctx context.Context, n int, req Request) (got[remote.Credential], error) {
		if req.Host == "slow.io" {
			<-ctx.Done()
			ended.Add(1)
			return got[remote.Credential]{}, ctx.Err()
		}
		return password(n, req, time.Hour), nil
	}
	inBubble(t, next, func(t *testing.T, a *asked, s keptSource) {
		s.hosts = []string{"slow.io"}
		second := keptSource{keeper: newKeeper(time.Minute, func(_ context.Context, req Request) (got[remote.Credential], error) {
			return password(77, req, time.Hour), nil
		})}
		chain := New(nil, s, second)
		took := func(host string) time.Duration {
			began := time.Now()
			c, err := chain.For("", "app")(t.Context(), host)
			if err != nil || c.Password != "77" {
				t.Errorf("%s: %+v, %v", host, c, err)
			}
			return time.Since(began)
		}
		if d := took("slow.io"); d != patience {
			t.Errorf("a source that hangs delays by %v", d)
		}
		if d := took("other.io"); d != 0 {
			t.Errorf("and others by %v", d)
		}
		if d := took("slow.io"); d != 0 {
			t.Errorf("and the second time by %v", d)
		}
		if st := chain.Status(); len(st) != 2 || len(st[1].Passed) != 1 || !strings.Contains(st[1].Passed[0].Reason, "no answer for 5s") {
			t.Errorf("status %+v", st)
		}
		time.Sleep(2 * time.Minute)
		if ended.Load() != 1 {
			t.Error("it hangs for ever")
		}
		second.stop()
	})
}

// Who was refused with an old credential gets a newer one; who was with a young
// one waits until it's worth asking.
func TestRefusedIsReplaced(t *testing.T) {
	next := func(_ context.Context, n int, req Request) (got[remote.Credential], error) {
		return password(n, req, 10*time.Hour), nil
	}
	inBubble(t, next, func(t *testing.T, a *asked, s keptSource) {
		req := Request{Host: "a.io", Repository: "app"}
		get := func(refused ...remote.Credential) remote.Credential {
			req.Refused = refused
			c, _, err := s.Credential(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		first := get()
		if c := get(first); c != first || a.count() != 1 {
			t.Errorf("a young one that was refused: %+v after %d questions", c, a.count())
		}
		time.Sleep(time.Minute)
		if c := get(first); c == first || a.count() != 2 {
			t.Errorf("an old one that was refused: %+v after %d questions", c, a.count())
		}
	})
}

func TestKeeperIsBounded(t *testing.T) {
	next := func(_ context.Context, n int, req Request) (got[remote.Credential], error) {
		if n%2 == 0 {
			return got[remote.Credential]{}, errors.New("no")
		}
		return password(n, req, 1000*time.Hour), nil
	}
	inBubble(t, next, func(t *testing.T, a *asked, s keptSource) {
		for i := range 2*maxKept + 50 { // half of them fail
			_, _, _ = s.Credential(t.Context(), Request{Host: fmt.Sprintf("%d.io", i), Repository: "app"})
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.kept) > maxKept || len(s.failed) > maxKept || len(s.flights) > 0 {
			t.Errorf("%d values, %d failures, %d flights", len(s.kept), len(s.failed), len(s.flights))
		}
	})
}

func TestChainIsBounded(t *testing.T) {
	chain := New(nil)
	for i := range maxUses + 20 {
		_, _ = chain.For("", "app")(t.Context(), fmt.Sprintf("%d.io", i))
	}
	if n := len(chain.Status()); n != maxUses {
		t.Errorf("%d uses are remembered", n)
	}
}
