package faults

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Catalog returns all faults.
func Catalog() []Fault {
	var all []Fault
	for _, part := range [][]Fault{slow(), cut(), damaged(), ranges(), lies(), statuses(), redirects(), nonsense()} {
		all = append(all, part...)
	}
	return all
}

// slow are answers that take their time, or for ever.
func slow() []Fault {
	const unavailable = "RegistryUnavailable"
	return []Fault{
		{Name: "delay", Mild: true, Serve: func(x *Exchange) {
			if x.Pause(150 * time.Millisecond) {
				x.Send(x.Answer())
			}
		}},
		{Name: "throttle", Body: true, Mild: true, Serve: func(x *Exchange) {
			a := x.Answer()
			x.Write(a.Head())
			for len(a.Body) > 0 && x.Pause(2*time.Millisecond) {
				n := min(len(a.Body), 32<<10)
				x.Write(a.Body[:n])
				a.Body = a.Body[n:]
			}
		}},
		{Name: "stall-before-headers", Stalls: true, Reason: unavailable, Serve: func(x *Exchange) { x.Stall() }},
		{Name: "stall-in-headers", Stalls: true, Reason: unavailable, Serve: func(x *Exchange) {
			head := x.Answer().Head()
			x.Write(head[:len(head)/2])
			x.Stall()
		}},
		{Name: "stall-after-headers", Stalls: true, Body: true, Reason: unavailable, Serve: func(x *Exchange) {
			x.Write(x.Answer().Head())
			x.Stall()
		}},
		{Name: "stall-in-body", Stalls: true, Body: true, Reason: unavailable, Serve: func(x *Exchange) {
			a := x.Answer()
			x.Write(a.Head())
			x.Write(a.Body[:len(a.Body)/2])
			x.Stall()
		}},
		{Name: "drip", Stalls: true, Body: true, Reason: unavailable, Serve: func(x *Exchange) {
			a := x.Answer()
			x.Write(a.Head())
			drip(x, a.Body)
		}},
		{Name: "drip-headers", Stalls: true, Reason: unavailable, Serve: func(x *Exchange) { drip(x, x.Answer().Head()) }},
	}
}

// drip sends a byte every second.
func drip(x *Exchange, b []byte) {
	for i := range b {
		x.Write(b[i : i+1])
		if !x.Pause(time.Second) {
			return
		}
	}
}

// cut are connections that end.
func cut() []Fault {
	half := func(x *Exchange) {
		a := x.Answer()
		x.Write(a.Head())
		x.Write(a.Body[:len(a.Body)/2])
	}
	return []Fault{
		{Name: "close-before-headers", Serve: func(*Exchange) {}},
		{Name: "reset-before-headers", Serve: func(x *Exchange) { x.Reset() }},
		{Name: "close-in-headers", Serve: func(x *Exchange) {
			head := x.Answer().Head()
			x.Write(head[:len(head)/2])
		}},
		{Name: "close-after-headers", Body: true, Serve: func(x *Exchange) { x.Write(x.Answer().Head()) }},
		{Name: "close-in-body", Body: true, Serve: half},
		{Name: "reset-in-body", Body: true, Serve: func(x *Exchange) { half(x); x.Reset() }},
		{Name: "close-in-chunked-body", Body: true, Serve: func(x *Exchange) {
			a := x.Answer()
			a.Header.Del("Content-Length")
			a.Header.Set("Transfer-Encoding", "chunked")
			x.Write(a.Head())
			x.Write(fmt.Appendf(nil, "%x\r\n", len(a.Body)))
			x.Write(a.Body[:len(a.Body)/2])
		}},
		{Name: "chunked", Body: true, Mild: true, Serve: func(x *Exchange) {
			a := x.Answer()
			if x.Request.Method == http.MethodHead { // the size has to be said once
				x.Send(a)
				return
			}
			a.Header.Del("Content-Length")
			a.Header.Set("Transfer-Encoding", "chunked")
			x.Write(a.Head())
			x.Write(fmt.Appendf(nil, "%x\r\n%s\r\n0\r\n\r\n", len(a.Body), a.Body))
		}},
		{Name: "http-1.0", Body: true, Mild: true, Serve: func(x *Exchange) {
			a := x.Answer()
			a.Proto = "HTTP/1.0"
			if x.Request.Method != http.MethodHead {
				a.Header.Del("Content-Length")
			}
			x.Send(a)
		}},
		{Name: "http-1.0-cut", Body: true, Serve: func(x *Exchange) {
			a := x.Answer()
			a.Proto = "HTTP/1.0"
			a.Header.Del("Content-Length")
			a.Body = a.Body[:len(a.Body)/2]
			x.Send(a)
		}},
	}
}

// damaged are bodies of the right length and other bytes.
func damaged() []Fault {
	body := func(change func([]byte)) func(x *Exchange) {
		return func(x *Exchange) {
			a := x.Answer()
			change(a.Body)
			x.Send(a)
		}
	}
	return []Fault{
		{Name: "flip-bit", Body: true, Serve: body(func(b []byte) {
			if len(b) > 0 {
				b[len(b)/2] ^= 0x10
			}
		})},
		{Name: "flip-last-bit", Body: true, Serve: body(func(b []byte) {
			if len(b) > 0 {
				b[len(b)-1] ^= 1
			}
		})},
		{Name: "zeros", Body: true, Serve: body(func(b []byte) { clear(b) })},
		{Name: "zeros-at-end", Body: true, Serve: body(func(b []byte) { clear(b[len(b)/2:]) })},
		{Name: "reversed", Body: true, Serve: body(func(b []byte) {
			for i, j := 0, len(b)-1; i < j; i, j = i+1, j-1 {
				b[i], b[j] = b[j], b[i]
			}
		})},
	}
}

// span is the range of a reply.
type span struct{ first, last, size int }

func spanOf(r Reply) span {
	var s span
	_, _ = fmt.Sscanf(r.Header.Get("Content-Range"), "bytes %d-%d/%d", &s.first, &s.last, &s.size) // without one it is of nothing
	return s
}

func (s span) String() string { return fmt.Sprintf("bytes %d-%d/%d", s.first, s.last, s.size) }

// ranges are answers with another range than was asked for.
func ranges() []Fault {
	// other sends another range, and says so, or not.
	other := func(change func(s *span), honest bool) func(x *Exchange) {
		return func(x *Exchange) {
			a, whole := x.Answer(), x.Whole()
			s := spanOf(a)
			change(&s)
			s.first, s.last = max(s.first, 0), min(s.last, len(whole.Body)-1)
			a.Body = nil
			if s.first <= s.last {
				a.Body = whole.Body[s.first : s.last+1]
			}
			a.Header.Set("Content-Length", strconv.Itoa(len(a.Body)))
			if honest {
				a.Header.Set("Content-Range", s.String())
			}
			x.Send(a)
		}
	}
	shift := func(s *span) { s.first, s.last = s.first-512, s.last-512 }
	shorter := func(s *span) { s.last -= (s.last - s.first) / 2 }
	longer := func(s *span) { s.last += 4096 }
	return []Fault{
		{Name: "range-shifted", Range: true, Serve: other(shift, true)},
		{Name: "range-shifted-secretly", Range: true, Serve: other(shift, false)},
		{Name: "range-shorter", Range: true, Serve: other(shorter, true)},
		{Name: "range-shorter-secretly", Range: true, Serve: other(shorter, false)},
		{Name: "range-longer", Range: true, Serve: other(longer, true)},
		{Name: "range-longer-secretly", Range: true, Serve: other(longer, false)},
		{Name: "range-empty", Range: true, Serve: other(func(s *span) { s.last = s.first - 1 }, true)},
		{Name: "whole-blob", Range: true, Mild: true, Serve: func(x *Exchange) { x.Send(x.Whole()) }},
		{Name: "whole-blob-as-206", Range: true, Serve: func(x *Exchange) {
			a, whole := x.Answer(), x.Whole()
			a.Body = whole.Body
			a.Header.Set("Content-Length", strconv.Itoa(len(a.Body)))
			x.Send(a)
		}},
		{Name: "range-as-200", Range: true, Serve: func(x *Exchange) {
			a := x.Answer()
			a.Status = http.StatusOK
			a.Header.Del("Content-Range")
			// Or else it is the whole blob, and right.
			if s := spanOf(x.Answer()); s.first == 0 && s.last == s.size-1 {
				a.Body = a.Body[:len(a.Body)/2]
				a.Header.Set("Content-Length", strconv.Itoa(len(a.Body)))
			}
			x.Send(a)
		}},
		{Name: "multipart", Range: true, Serve: func(x *Exchange) {
			a := x.Answer()
			var b bytes.Buffer
			fmt.Fprintf(&b, "--X\r\nContent-Type: application/octet-stream\r\nContent-Range: %s\r\n\r\n%s\r\n--X--\r\n", spanOf(a), a.Body)
			a.Body = b.Bytes()
			a.Header.Set("Content-Type", "multipart/byteranges; boundary=X")
			a.Header.Del("Content-Range")
			a.Header.Set("Content-Length", strconv.Itoa(len(a.Body)))
			x.Send(a)
		}},
		{Name: "416", Range: true, Final: true, Serve: status(http.StatusRequestedRangeNotSatisfiable, "", nil)},
	}
}

// lies are headers that aren't true of a body that is right.
func lies() []Fault {
	header := func(name, value string) func(x *Exchange) {
		return func(x *Exchange) {
			a := x.Answer()
			a.Header.Set(name, value)
			x.Send(a)
		}
	}
	length := func(change func(n int) int) func(x *Exchange) {
		return func(x *Exchange) {
			a := x.Answer()
			a.Header.Set("Content-Length", strconv.Itoa(change(len(a.Body))))
			x.Send(a)
		}
	}
	const empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	return []Fault{
		{Name: "length-too-small", Body: true, Serve: length(func(n int) int { return n / 2 })},
		{Name: "length-too-big", Body: true, Serve: length(func(n int) int { return n + 100 })},
		{Name: "length-huge", Body: true, Serve: length(func(int) int { return 1 << 62 })},
		{Name: "length-nonsense", Serve: header("Content-Length", "-5")},
		{Name: "range-nonsense", Range: true, Serve: header("Content-Range", "bytes 0-0/0")},
		{Name: "range-of-other-size", Range: true, Serve: func(x *Exchange) {
			a := x.Answer()
			s := spanOf(a)
			s.size += 1000
			a.Header.Set("Content-Range", s.String())
			x.Send(a)
		}},
		{Name: "digest-of-other", Serve: header("Docker-Content-Digest", empty)},
		{Name: "digest-nonsense", Serve: header("Docker-Content-Digest", "md5:x")},
		{Name: "type-html", Body: true, Serve: header("Content-Type", "text/html")},
		{Name: "encoding-gzip", Body: true, Serve: func(x *Exchange) {
			a := x.Answer()
			var b bytes.Buffer
			zw := gzip.NewWriter(&b)
			_, _ = zw.Write(a.Body) // into memory
			_ = zw.Close()
			a.Body = b.Bytes()
			a.Header.Set("Content-Encoding", "gzip")
			a.Header.Set("Content-Length", strconv.Itoa(len(a.Body)))
			x.Send(a)
		}},
	}
}

// status answers with a status and an OCI error.
func status(code int, ociCode string, header http.Header) func(x *Exchange) {
	return func(x *Exchange) {
		body := fmt.Sprintf(`{"errors":[{"code":%q,"message":"the proxy wants it so"}]}`, ociCode)
		h := http.Header{"Content-Type": {"application/json"}, "Content-Length": {strconv.Itoa(len(body))}, "Connection": {"close"}}
		for name, values := range header {
			h[name] = values
		}
		x.Send(Reply{Status: code, Header: h, Body: []byte(body)})
	}
}

// statuses are refusals.
func statuses() []Fault {
	const unauthorized, unavailable = "Unauthorized", "RegistryUnavailable"
	after := func(v string) http.Header { return http.Header{"Retry-After": {v}} }
	return []Fault{
		{Name: "401", Final: true, Reason: unauthorized, Serve: status(http.StatusUnauthorized, "UNAUTHORIZED", nil)},
		{Name: "token-expired", Spreads: true, Reason: unauthorized, Serve: func(x *Exchange) {
			x.proxy.ExpireTokens()
			status(http.StatusUnauthorized, "UNAUTHORIZED", http.Header{"Www-Authenticate": {x.proxy.challenge(x.Request)}})(x)
		}},
		{Name: "403", Final: true, Reason: unauthorized, Serve: status(http.StatusForbidden, "DENIED", nil)},
		{Name: "404", Final: true, Serve: status(http.StatusNotFound, "", nil)},
		{Name: "404-name-unknown", Final: true, Serve: status(http.StatusNotFound, "NAME_UNKNOWN", nil)},
		{Name: "405", Final: true, Serve: status(http.StatusMethodNotAllowed, "UNSUPPORTED", nil)},
		{Name: "429", Reason: unavailable, Serve: status(http.StatusTooManyRequests, "TOOMANYREQUESTS", nil)},
		{Name: "429-retry-now", Reason: unavailable, Serve: status(http.StatusTooManyRequests, "TOOMANYREQUESTS", after("0"))},
		{Name: "429-retry-in-an-hour", Final: true, Reason: unavailable, Serve: status(http.StatusTooManyRequests, "TOOMANYREQUESTS", after("3600"))},
		{Name: "500", Reason: unavailable, Serve: status(http.StatusInternalServerError, "", nil)},
		{Name: "502", Reason: unavailable, Serve: status(http.StatusBadGateway, "", nil)},
		{Name: "503-retry-nonsense", Reason: unavailable, Serve: status(http.StatusServiceUnavailable, "", after("soon"))},
		{Name: "504", Reason: unavailable, Serve: status(http.StatusGatewayTimeout, "", nil)},
		{Name: "599", Reason: unavailable, Serve: status(599, "", nil)},
	}
}

// redirects go elsewhere, as registries send nodes to their blob storage.
func redirects() []Fault {
	to := func(where func(x *Exchange) string) func(x *Exchange) {
		return func(x *Exchange) {
			x.Send(Reply{Status: http.StatusTemporaryRedirect, Header: http.Header{
				"Location": {where(x)}, "Content-Length": {"0"}, "Connection": {"close"},
			}})
		}
	}
	return []Fault{
		{Name: "redirect", Range: true, Mild: true, Serve: to(func(x *Exchange) string {
			return "http://" + x.proxy.Addr() + "/signed" + x.Request.URL.RequestURI()
		})},
		{Name: "redirect-expired", Range: true, Serve: to(func(x *Exchange) string { return "http://" + x.proxy.Addr() + "/expired?se=2026-01-01" })},
		{Name: "redirect-to-nobody", Range: true, Serve: to(func(*Exchange) string { return "http://127.0.0.1:1/" })},
		{Name: "redirect-in-circles", Final: true, Serve: to(func(x *Exchange) string { return x.Request.URL.RequestURI() })},
		{Name: "redirect-nowhere", Final: true, Serve: to(func(*Exchange) string { return "http://%zz" })},
	}
}

// nonsense is what other things say that answer in a registry's place.
func nonsense() []Fault {
	const page = "<html><body>Please log in to HotelWiFi</body></html>"
	html := http.Header{"Content-Type": {"text/html"}, "Content-Length": {strconv.Itoa(len(page))}}
	return []Fault{
		{Name: "garbage", Serve: func(x *Exchange) { x.Write(bytes.Repeat([]byte("\x16\x03\x01\x02\x00\xff\r\n"), 100)) }},
		{Name: "not-http", Serve: func(x *Exchange) { x.Write([]byte("SSH-2.0-OpenSSH_9.2\r\n")) }},
		{Name: "login-page", Body: true, Serve: func(x *Exchange) {
			x.Send(Reply{Status: http.StatusOK, Header: html, Body: []byte(page)})
		}},
		{Name: "nothing-with-200", Body: true, Serve: func(x *Exchange) {
			x.Send(Reply{Status: http.StatusOK, Header: http.Header{"Content-Length": {"0"}}})
		}},
		{Name: "204", Body: true, Serve: func(x *Exchange) { x.Send(Reply{Status: http.StatusNoContent}) }},
		{Name: "header-of-a-megabyte", Serve: func(x *Exchange) {
			a := x.Answer()
			a.Header.Set("X-Long", strings.Repeat("x", 1<<20))
			x.Send(a)
		}},
		{Name: "continue-for-ever", Serve: func(x *Exchange) {
			for range 10_000 {
				x.Write([]byte("HTTP/1.1 103 Early Hints\r\nLink: </>\r\n\r\n"))
			}
		}},
	}
}
