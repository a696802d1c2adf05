package auth_test

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"sluice/internal/auth"
	"sluice/internal/storage"
	"sluice/oci"
)

func from(address string, with credentials) credentials {
	return func(r *http.Request) { with(r); r.RemoteAddr = address }
}

func TestGuessingIsLimited(t *testing.T) {
	c := newClock()
	b := open(t, new(storage.Memory), c, nil)
	ci := b.token("ci", auth.MapPull)
	const attacker, owner = "198.51.100.7:1", "203.0.113.9:1"
	tried, refused := 0, 0
	var limit *auth.LimitError
	for i := range 1000 { // for 1000 seconds, without pause
		_, err := b.who(from(attacker, basic("ci", fmt.Sprint("guess", i))))
		switch {
		case errors.As(err, &limit):
			if !errors.Is(err, oci.ErrTooManyRequests) || limit.RetryAfter <= 0 || limit.RetryAfter > time.Minute || limit.Seconds() < 1 {
				t.Fatalf("%v: %v", err, limit.RetryAfter)
			}
			refused++
		case errors.Is(err, oci.ErrUnauthorized):
			tried++
		default:
			t.Fatal(err)
		}
		c.Advance(time.Second)
	}
	if tried < 10 || tried > 40 || tried+refused != 1000 {
		t.Errorf("%d guesses in 1000 s", tried)
	}
	// Nobody else is locked out, and the attacker not for ever.
	if _, err := b.who(from(owner, basic("ci", ci))); err != nil {
		t.Errorf("the owner, elsewhere: %v", err)
	}
	a := b.serve(request("GET", "/oauth2/token", nil, from(attacker, basic("ci", "x"))))
	for ; a.status != http.StatusTooManyRequests; a = b.serve(request("GET", "/oauth2/token", nil, from(attacker, basic("ci", "x")))) {
		continue
	}
	if a.header.Get("Retry-After") == "" || len(a.Errors) != 1 || a.Errors[0].Code != "TOOMANYREQUESTS" {
		t.Errorf("token server: %d %v %s", a.status, a.header, a.body)
	}
	c.Advance(time.Minute)
	if _, err := b.who(from(attacker, basic("ci", ci))); err != nil {
		t.Errorf("the right password after the wait: %v", err)
	}
}

// Thousands of addresses guess at one account. Its owner comes from anywhere.
func TestManyAddressesGuess(t *testing.T) {
	c := newClock()
	b := open(t, new(storage.Memory), c, nil)
	ci := b.token("ci", auth.MapPull)
	for round := range 2 {
		allowed := 0
		for i := range 130 {
			_, err := b.who(from(fmt.Sprintf("[2001:db8:%x::%x]:1", i, round), basic("ci", fmt.Sprint("guess", round, i))))
			if errors.Is(err, oci.ErrUnauthorized) {
				allowed++
			}
		}
		if round > 0 && allowed > 10 {
			t.Errorf("round %d: %d addresses could guess again at once", round, allowed)
		}
	}
	if _, err := b.who(from("203.0.113.9:1", basic("ci", ci))); err != nil {
		t.Errorf("the owner: %v", err)
	}
	// Who signed in lately isn't counted at all, also among attackers.
	for range 100 {
		_, _ = b.who(from("203.0.113.9:1", basic("ci", "wrong")))
	}
	if _, err := b.who(from("203.0.113.9:1", basic("ci", ci))); err != nil {
		t.Errorf("the owner, where somebody guesses: %v", err)
	}
}

// One address tries accounts rather than passwords.
func TestOneAddressTriesAccounts(t *testing.T) {
	b := open(t, new(storage.Memory), newClock(), nil)
	tried := 0
	for i := range 200 {
		if _, err := b.who(from("198.51.100.7:1", basic(fmt.Sprint("user", i), "password"))); errors.Is(err, oci.ErrUnauthorized) {
			tried++
		}
	}
	if tried > 60 {
		t.Errorf("%d accounts at once", tried)
	}
}

// What was right doesn't count, and forgives what was wrong before.
func TestRightPasswordsAreNotCounted(t *testing.T) {
	b := open(t, new(storage.Memory), newClock(), nil)
	b.token("ci", auth.MapPull)
	for i := range 80 {
		if i%10 == 0 && i < 50 {
			for range 5 {
				_, _ = b.who(basic("ci", "wrong"))
			}
		}
		if _, err := b.who(basic("ci", b.mustGenerate("ci", 1))); err != nil { // a new one isn't remembered
			t.Fatalf("the right password, %d: %v", i, err)
		}
	}
}

// Many connections with the right password at once are one attempt.
func TestManyConnections(t *testing.T) {
	b := open(t, new(storage.Memory), newClock(), nil)
	ci := b.token("ci", auth.MapPull)
	var all sync.WaitGroup
	for range 100 {
		all.Go(func() {
			if _, err := b.who(basic("ci", ci)); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
}

// At bcrypt's usual cost, a password that was right minutes ago costs nothing.
func TestVerificationIsRemembered(t *testing.T) {
	b := open(t, new(storage.Memory), newClock(), func(o *auth.Options) { o.HashCost = 8 })
	ci := basic("ci", b.token("ci", auth.MapPull))
	verify := func() time.Duration {
		began := time.Now()
		if _, err := b.who(ci); err != nil {
			t.Fatal(err)
		}
		return time.Since(began)
	}
	first := verify()
	var again []time.Duration
	for range 51 {
		again = append(again, verify())
	}
	slices.Sort(again)
	if usual := again[len(again)/2]; usual > first/2 {
		t.Errorf("the first verification took %s, those after it %s", first, usual)
	}
}

// An account that doesn't exist takes as long as a wrong password.
func TestUnknownAccountsCostTheSame(t *testing.T) {
	b := open(t, new(storage.Memory), newClock(), func(o *auth.Options) { o.HashCost = 6 })
	b.token("ci", auth.MapPull)
	// The fastest of several, by turns: other work only makes it slower.
	fastest := map[string]time.Duration{"ci": time.Hour, "nobody": time.Hour, "..": time.Hour, "admin": time.Hour}
	for i := range 9 {
		for user := range fastest {
			began := time.Now()
			if _, err := b.who(basic(user, fmt.Sprint("wrong", i))); !errors.Is(err, oci.ErrUnauthorized) {
				t.Fatal(err)
			}
			fastest[user] = min(fastest[user], time.Since(began))
		}
	}
	for user, d := range fastest {
		if known := fastest["ci"]; d < known/3 || d > known*3 {
			t.Errorf("a known account %s, %q %s", known, user, d)
		}
	}
}
