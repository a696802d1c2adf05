package notify

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"
)

func TestVerify(t *testing.T) {
	now, body := time.Unix(1764003600, 0), []byte(`{"events":[]}`)
	header := sign("secret", body, now)
	// Made by: printf '%s.%s' 1764003600 '{"events":[]}' | openssl dgst -sha256 -hmac secret
	if want := "t=1764003600,v1=0594d93fe4d0ee94ca4f9ab585e7e1fcac6cf02cc53c877915c07cdb9d733e93"; header != want {
		t.Errorf("the header is %s, want %s", header, want)
	}
	for name, tt := range map[string]struct {
		secret, header string
		body           []byte
		now            time.Time
		ok             bool
	}{
		"good":             {"secret", header, body, now, true},
		"a minute later":   {"secret", header, body, now.Add(time.Minute), true},
		"something newer":  {"secret", header + ",v2=abc", body, now, true},
		"six minutes late": {"secret", header, body, now.Add(6 * time.Minute), false},
		"of the future":    {"secret", header, body, now.Add(-6 * time.Minute), false},
		"another secret":   {"other", header, body, now, false},
		"another body":     {"secret", header, []byte(`{"events":[1]}`), now, false},
		"another time":     {"secret", "t=1764003601" + header[len("t=1764003600"):], body, now, false},
		"no header":        {"secret", "", body, now, false},
		"no time":          {"secret", header[len("t=1764003600,"):], body, now, false},
	} {
		if err := Verify(tt.secret, tt.header, tt.body, tt.now, 5*time.Minute); (err == nil) != tt.ok || err != nil && !errors.Is(err, ErrSignature) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzVerify: what doesn't hold the signature that sign makes, is refused.
func FuzzVerify(f *testing.F) {
	now := time.Unix(1764003600, 0)
	f.Add(sign("secret", []byte("body"), now), []byte("body"))
	f.Add("t=,v1=", []byte{})
	f.Fuzz(func(t *testing.T, header string, body []byte) {
		_, v1, _ := strings.Cut(sign("secret", body, now), ",")
		if Verify("secret", header, body, now, 0) == nil && !strings.Contains(strings.ToLower(header), v1) {
			t.Errorf("%q is accepted", header)
		}
	})
}

// FuzzEvent: what is parsed can be sent.
func FuzzEvent(f *testing.F) {
	f.Add([]byte(`{"id":"1","time":"2026-11-24T02:09:50Z","action":"push","repository":"a","digest":"sha256:00","size":-1}`))
	f.Fuzz(func(t *testing.T, payload []byte) {
		e, err := parseEvent(payload)
		if err != nil {
			return
		}
		if _, err := json.Marshal(e.envelope(nil, "")); err != nil {
			t.Error(err)
		}
	})
}
