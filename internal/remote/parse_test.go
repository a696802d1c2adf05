package remote

import (
	"errors"
	"math"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"sluice/oci"
)

func TestParseContentRange(t *testing.T) {
	for header, want := range map[string]contentRange{
		"bytes 0-0/1":   {0, 0, 1},
		"bytes 5-9/100": {5, 9, 100},
		"Bytes 5-9/*":   {5, 9, -1},
		"bytes  5-9/10": {5, 9, 10},
		"bytes 0-9223372036854775806/9223372036854775807": {0, math.MaxInt64 - 1, math.MaxInt64},
	} {
		if got, err := parseContentRange(header); err != nil || got != want {
			t.Errorf("parseContentRange(%q) = %v, %v; want %v", header, got, err, want)
		}
	}
	for _, header := range []string{
		"", "bytes", "bytes ", "bytes 0-0", "bytes */100", "bytes 5-4/10", "bytes 0-10/10", "bytes -1-5/10", "bytes 0-+5/10", "bytes 0-5/-1", "bytes 0x0-5/10",
		"items 0-5/10", "bytes=0-5/10", "bytes 0-9223372036854775807/*", "bytes 0-99999999999999999999/*", "bytes 1-2-3/4", "bytes 0-5/10, 6-7/10",
	} {
		if got, err := parseContentRange(header); err == nil {
			t.Errorf("parseContentRange(%q) = %v, want an error", header, got)
		}
	}
}

func FuzzContentRange(f *testing.F) {
	for _, s := range []string{"bytes 0-0/1", "bytes 5-9/*", "bytes 5-4/10", "bytes */1", "", "bytes 0-9223372036854775807/*"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, header string) {
		got, err := parseContentRange(header)
		if err == nil && (got.first < 0 || got.last < got.first || got.last-got.first+1 <= 0 || got.size >= 0 && got.last >= got.size) {
			t.Errorf("parseContentRange(%q) = %v", header, got)
		}
		if size, err := parseUploadRange(header); err == nil && size < 0 {
			t.Errorf("parseUploadRange(%q) = %d", header, size)
		}
	})
}

func TestParseUploadRange(t *testing.T) {
	for header, want := range map[string]int64{"": 0, "0-0": 0, "0-1": 2, "0-99": 100, "bytes=0-99": 100} {
		if got, err := parseUploadRange(header); err != nil || got != want {
			t.Errorf("parseUploadRange(%q) = %d, %v; want %d", header, got, err, want)
		}
	}
	for _, header := range []string{"1-5", "0-", "0--1", "-", "5", "0-9223372036854775807", "a-b", "0-5/10"} {
		if got, err := parseUploadRange(header); err == nil {
			t.Errorf("parseUploadRange(%q) = %d, want an error", header, got)
		}
	}
}

func TestNextLink(t *testing.T) {
	for _, test := range []struct {
		want    string
		headers []string
	}{
		{"", nil},
		{"/v2/_catalog?last=a&n=2", []string{`</v2/_catalog?last=a&n=2>; rel="next"`}},
		{"/x", []string{`</x>;rel=next`}},
		{"/x", []string{`</y>; rel="prev", </x>; title="a, b; c <z>"; rel="last next"`}},
		{"/x", []string{`</y>; rel=first`, `</x>; REL=Next`}},
		{"", []string{`</x>`}},
		{"", []string{`</x>; rel=nextish`}},
		{"", []string{`</x>; rev=next`}},
		{"", []string{`</x; rel=next`}},
		{"", []string{`/x; rel=next`}},
		{"", []string{`</x>; title="unfinished; rel=next`}},
		{"", []string{strings.Repeat(`</y>; rel=prev,`, 1000) + `</x>; rel=next`}},
	} {
		if got := nextLink(test.headers); got != test.want {
			t.Errorf("nextLink(%.80q) = %q, want %q", test.headers, got, test.want)
		}
	}
}

func FuzzParseLink(f *testing.F) {
	for _, s := range []string{`</v2/_catalog?last=a>; rel="next"`, `<a>,<b>;rel=next`, `<a>; x="\"<b>; rel=next"`, `<`, `<>;rel=next`, `;,;<a>"`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, header string) {
		if link := nextLink([]string{header}); link != "" && !strings.Contains(header, link) {
			t.Errorf("nextLink(%q) = %q, which isn't in it", header, link)
		}
	})
}

func TestNew(t *testing.T) {
	for host, want := range map[string]string{
		"docker.io":            "https://registry-1.docker.io",
		"reg.example.com":      "https://reg.example.com",
		"reg.example.com:5000": "https://reg.example.com:5000",
		"10.0.0.1:5000":        "https://10.0.0.1:5000",
		"[fe80::1]:5000":       "https://[fe80::1]:5000",
		"localhost":            "http://localhost",
		"localhost:5000":       "http://localhost:5000",
		"127.0.0.1:5000":       "http://127.0.0.1:5000",
		"127.9.9.9":            "http://127.9.9.9",
		"[::1]:5000":           "http://[::1]:5000",
		"localhost:443":        "https://localhost:443",
		"localhost.evil.com":   "https://localhost.evil.com",
		"127.0.0.1.evil.com":   "https://127.0.0.1.evil.com",
	} {
		reg, err := New(host, Options{})
		if err != nil {
			t.Errorf("New(%q): %v", host, err)
		} else if got := reg.base.String(); got != want || reg.Host() != host {
			t.Errorf("New(%q) is at %s, want %s", host, got, want)
		}
	}
	for _, host := range []string{"", "http://localhost", "a/b", "user@host", "user:pass@host", "a b", "a?b", "a#b", ":5000", "[::1", "a:b:c", "a\nb"} {
		if reg, err := New(host, Options{}); err == nil {
			t.Errorf("New(%q) is at %s, want an error", host, reg.base)
		}
	}
	if reg, err := New("localhost:1", Options{PlainHTTP: PlainHTTPNever}); err != nil || reg.base.Scheme != "https" {
		t.Errorf("PlainHTTPNever: %v", err)
	}
	if reg, err := New("example.com", Options{PlainHTTP: PlainHTTPAlways}); err != nil || reg.base.Scheme != "http" {
		t.Errorf("PlainHTTPAlways: %v", err)
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	for header, want := range map[string]time.Duration{
		"0": 0, "5": 5 * time.Second, "2147483647": 2147483647 * time.Second,
		now.Add(time.Minute).Format(http.TimeFormat):  time.Minute,
		now.Add(-time.Minute).Format(http.TimeFormat): 0,
	} {
		if got, ok := retryAfter(header, now); !ok || got != want {
			t.Errorf("retryAfter(%q) = %v, %v; want %v", header, got, ok, want)
		}
	}
	for _, header := range []string{"", "-1", "1.5", "soon", "99999999999999999999"} {
		if got, ok := retryAfter(header, now); ok {
			t.Errorf("retryAfter(%q) = %v, want none", header, got)
		}
	}
}

func TestReferrersTag(t *testing.T) {
	for digest, want := range map[oci.Digest]string{
		oci.SHA256.FromString(""): "sha256-e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
		oci.SHA512.FromString(""): "sha512-cf83e1357eefb8bdf1542850d66d8007d620e4050b5715dc83f4a921d36ce9ce", // 64 digits of 128
	} {
		if got := referrersTag(digest); got != want {
			t.Errorf("referrersTag(%s) = %s, want %s", digest, got, want)
		} else if err := oci.CheckTag(got); err != nil {
			t.Error(err)
		}
	}
}

func TestRedact(t *testing.T) {
	secret := &url.Error{Op: "Get", URL: "https://h/p?sig=SECRET", Err: errors.New(`Get "https://u:SECRET@h/p?sig=SECRET": broken`)}
	got := redact(secret)
	if strings.Contains(got.Error(), "SECRET") || !strings.Contains(got.Error(), "https://h/p") || !strings.Contains(got.Error(), "broken") {
		t.Errorf("redacted to %q", got)
	}
	if got := snippet([]byte("<a href=\"https://h/p?sig=SECRET\">\x00\xff\nx")); strings.Contains(got, "SECRET") || strings.ContainsAny(got, "\n\x00") {
		t.Errorf("snippet is %q", got)
	}
	if got := (Credential{Username: "u", Password: "SECRET"}); strings.Contains(got.String()+got.GoString(), "SECRET") {
		t.Errorf("a credential is printed as %v", got)
	}
}
