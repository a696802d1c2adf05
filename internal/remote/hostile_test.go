package remote_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/remote"
	"sluice/oci"
)

var (
	blob       = bytes.Repeat([]byte("0123456789"), 10)
	blobDigest = oci.DigestOf(blob)
)

// answer is a handler that gives one answer to everything.
func answer(status int, body string, header ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(status)
		io.WriteString(w, body)
	}
}

// checkMessage checks an error's text: it always names host and repository.
func checkMessage(t *testing.T, what string, err error, reg *remote.Registry, want ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: no error", what)
		return
	}
	for _, w := range append(want, reg.Host(), "some/repo") {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%s: error %q doesn't contain %q", what, err, w)
		}
	}
	if len(err.Error()) > 1500 {
		t.Errorf("%s: the error has %d bytes", what, len(err.Error()))
	}
}

var (
	once      = remote.Options{Retries: -1}
	impatient = remote.Options{Retries: -1, ReadTimeout: 300 * time.Millisecond, WriteTimeout: 300 * time.Millisecond}
)

func TestHostileRanges(t *testing.T) {
	for name, test := range map[string]struct {
		handler http.HandlerFunc
		want    string
	}{
		"other start":    {answer(206, "123456789", "Content-Range", "bytes 1-9/100"), "bytes 1 to 9 of 100"},
		"short":          {answer(206, "01234", "Content-Range", "bytes 0-4/100"), "bytes 0 to 4 of 100"},
		"long":           {answer(206, "01234567890", "Content-Range", "bytes 0-10/100"), "bytes 0 to 10 of 100"},
		"wrong length":   {answer(206, "01234", "Content-Range", "bytes 0-9/100"), "5 bytes"},
		"no range":       {answer(206, "0123456789"), `Content-Range ""`},
		"garbage":        {answer(206, "0123456789", "Content-Range", "lines 0-9/100"), "lines 0-9/100"},
		"overflow":       {answer(206, "0123456789", "Content-Range", "bytes 0-9223372036854775807/*"), "impossible"},
		"multipart":      {answer(206, "--x\r\n", "Content-Type", "multipart/byteranges; boundary=x"), "multipart/byteranges"},
		"page":           {answer(206, "<html>log in</html>", "Content-Type", "text/html"), "log in"},
		"whole page":     {answer(200, "<html>log in</html>", "Content-Type", "text/html; charset=utf-8"), "log in"},
		"other digest":   {answer(206, "0123456789", "Content-Range", "bytes 0-9/100", "Docker-Content-Digest", oci.DigestOf(nil).String()), oci.DigestOf(nil).String()},
		"no digest":      {answer(206, "0123456789", "Content-Range", "bytes 0-9/100", "Docker-Content-Digest", "abc"), `"abc"`},
		"compressed":     {answer(206, "0123456789", "Content-Range", "bytes 0-9/100", "Content-Encoding", "gzip"), "gzip"},
		"short of whole": {answer(200, ""), "0 bytes"},
		"no content":     {answer(204, ""), "HTTP 204"},
		"redirect":       {answer(302, "", "Location", "/v2/again"), "redirects"},
		"no redirect":    {answer(302, ""), "302"},
		"teapot":         {answer(418, "I'm a \x1b[31mteapot"), "HTTP 418: I'm a .[31mteapot"},
	} {
		reg := serve(t, test.handler, once)
		r, err := reg.GetBlobRange(t.Context(), "some/repo", blobDigest, 0, 10)
		if err == nil {
			r.Close()
		}
		checkMessage(t, name, err, reg, test.want, blobDigest.String())
	}
	reg := serve(t, http.HandlerFunc(hang), impatient)
	_, err := reg.GetBlobRange(t.Context(), "some/repo", blobDigest, 0, 10)
	checkMessage(t, "silent", err, reg, "no progress for 300ms", blobDigest.String())
}

// Some servers know only ranges that are given to the byte.
func TestExactRangesOnly(t *testing.T) {
	reg := serve(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		var first, last int
		w.Header().Set("Content-Length", "100")
		if req.Method == http.MethodHead {
			return
		}
		if _, err := fmt.Sscanf(req.Header.Get("Range"), "bytes=%d-%d", &first, &last); err != nil || last > 99 {
			w.Header().Del("Content-Length")
			answer(416, `{"errors":[{"code":"BLOB_UNKNOWN","message":"what?"}]}`)(w, req)
			return
		}
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/100", first, last))
		w.Header().Set("Content-Length", fmt.Sprint(last-first+1))
		answer(206, string(blob[first:last+1]))(w, req)
	}), once)
	for _, test := range []struct{ offset, length, from, to int64 }{{0, -1, 0, 100}, {90, -1, 90, 100}, {95, 10, 95, 100}, {5, 5, 5, 10}, {90, 10, 90, 100}} {
		r, err := reg.GetBlobRange(t.Context(), "some/repo", blobDigest, test.offset, test.length)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, blob[test.from:test.to]) {
			t.Errorf("%+v: got %q, %v", test, got, err)
		}
		r.Close()
	}
	_, err := reg.GetBlobRange(t.Context(), "some/repo", blobDigest, 100, -1)
	if !errors.Is(err, oci.ErrRangeInvalid) {
		t.Errorf("beyond the end: %v", err)
	}
}

// hang answers nothing until the client gives up.
func hang(_ http.ResponseWriter, req *http.Request) {
	select {
	case <-req.Context().Done():
	case <-time.After(time.Minute):
	}
}

// patience is the timeout of tests in which something is slow, and still in time
// on a machine that stands still for a while. They wait side by side.
const patience = 5 * time.Second

func TestRangesIgnored(t *testing.T) {
	reg := serve(t, answer(200, string(blob)), once)
	for _, test := range []struct{ offset, length, from, to int64 }{{0, 10, 0, 10}, {95, 10, 95, 100}, {13, -1, 13, 100}, {99, 1, 99, 100}} {
		r, err := reg.GetBlobRange(t.Context(), "some/repo", blobDigest, test.offset, test.length)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, blob[test.from:test.to]) || r.Descriptor().Size != 100 {
			t.Errorf("%+v: got %q of %d, %v", test, got, r.Descriptor().Size, err)
		}
		r.Close()
	}
	_, err := reg.GetBlobRange(t.Context(), "some/repo", blobDigest, 100, 1)
	if !errors.Is(err, oci.ErrRangeInvalid) {
		t.Errorf("beyond the end: %v", err)
	}
}

func TestBrokenBodies(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		finish func(w http.ResponseWriter, req *http.Request)
		want   string
	}{
		"cut":     {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "unexpected EOF"},
		"stalled": {hang, "no progress for " + patience.String()},
	} {
		reg := serve(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			w.Header().Set("Content-Length", "100")
			w.Write(blob[:60])
			w.(http.Flusher).Flush()
			test.finish(w, req)
		}), remote.Options{Retries: -1, ReadTimeout: patience})
		r, err := reg.GetBlob(t.Context(), "some/repo", blobDigest)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got, err := io.ReadAll(r)
		r.Close()
		if !bytes.Equal(got, blob[:60]) {
			t.Errorf("%s: read %q", name, got)
		}
		checkMessage(t, name, err, reg, test.want, "60 of 100 bytes", blobDigest.String())
	}
}

// A body that keeps coming, however slowly, is progress.
func TestSlowBody(t *testing.T) {
	t.Parallel()
	reg := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "100")
		for i := range 10 {
			w.Write(blob[10*i : 10*i+10])
			w.(http.Flusher).Flush()
			time.Sleep(patience / 8)
		}
	}), remote.Options{Retries: -1, ReadTimeout: patience})
	r, err := reg.GetBlob(t.Context(), "some/repo", blobDigest)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, blob) {
		t.Errorf("got %d bytes, %v", len(got), err)
	}
}

// Neither is it the server's fault when the caller takes its time.
func TestSlowCaller(t *testing.T) {
	t.Parallel()
	opts := remote.Options{Retries: -1, ReadTimeout: patience, WriteTimeout: patience}
	reg := serve(t, inMemory(), opts)
	slow := io.MultiReader(bytes.NewReader(blob[:10]), pause(patience+time.Second), bytes.NewReader(blob[10:]))
	if _, err := reg.PushBlob(t.Context(), "some/repo", oci.Descriptor{Digest: blobDigest, Size: 100}, slow); err != nil {
		t.Fatal(err)
	}
	r, err := reg.GetBlob(t.Context(), "some/repo", blobDigest)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := io.ReadFull(r, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(patience + time.Second)
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, blob[10:]) {
		t.Errorf("got %d bytes, %v", len(got), err)
	}
}

// pause is an empty reader that takes so long.
type pause time.Duration

func (p pause) Read([]byte) (int, error) {
	time.Sleep(time.Duration(p))
	return 0, io.EOF
}

// Requests one after the other share a connection, whatever they end in.
func TestConnectionsAreKept(t *testing.T) {
	handler := inMemory()
	var opened atomic.Int64
	server := httptest.NewUnstartedServer(handler)
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			opened.Add(1)
		}
	}
	server.Start()
	t.Cleanup(server.Close)
	reg := connect(t, server, once)
	if _, err := reg.PushBlob(t.Context(), "some/repo", oci.Descriptor{Digest: blobDigest, Size: 100}, bytes.NewReader(blob)); err != nil {
		t.Fatal(err)
	}
	for offset := range int64(100) {
		r, err := reg.GetBlobRange(t.Context(), "some/repo", blobDigest, offset, 7)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, r); err != nil {
			t.Error(err)
		}
		r.Close()
		if _, err := reg.ResolveManifest(t.Context(), "some/repo", "none"); !errors.Is(err, oci.ErrManifestUnknown) {
			t.Error(err)
		}
		if _, err := reg.GetManifest(t.Context(), "some/repo", "none"); !errors.Is(err, oci.ErrManifestUnknown) {
			t.Error(err)
		}
	}
	if n := opened.Load(); n > 3 {
		t.Errorf("%d connections were opened", n)
	}
}

const emptyIndex = `{"schemaVersion":2,"mediaType":"` + oci.MediaTypeIndex + `","manifests":[]}`

func TestHostileManifests(t *testing.T) {
	endless := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", oci.MediaTypeIndex)
		for piece := bytes.Repeat([]byte(" "), 1<<20); ; {
			if _, err := w.Write(piece); err != nil {
				return
			}
		}
	}
	digest := oci.DigestOf([]byte(emptyIndex)).String()
	other := oci.DigestOf(nil).String()
	for name, test := range map[string]struct {
		handler   http.HandlerFunc
		reference string
		want      string
		code      error
	}{
		"page":         {answer(200, "<html>log in</html>", "Content-Type", "text/html"), "tag", "log in", oci.ErrManifestInvalid},
		"page as JSON": {answer(200, "<html>log in</html>", "Content-Type", "application/json"), "tag", "log in", oci.ErrManifestInvalid},
		"endless":      {endless, "tag", "larger", oci.ErrManifestInvalid},
		"too long":     {answer(200, strings.Repeat(" ", oci.MaxManifestSize+1)), "tag", "larger", oci.ErrManifestInvalid},
		"other":        {answer(200, emptyIndex+" ", "Content-Type", oci.MediaTypeIndex), digest, digest, oci.ErrDigestInvalid},
		"lying header": {answer(200, emptyIndex, "Content-Type", oci.MediaTypeIndex, "Docker-Content-Digest", other), "tag", other, oci.ErrDigestInvalid},
		"both":         {answer(200, emptyIndex, "Content-Type", oci.MediaTypeIndex, "Docker-Content-Digest", other), digest, other, oci.ErrDigestInvalid},
		"bad header":   {answer(200, emptyIndex, "Content-Type", oci.MediaTypeIndex, "Docker-Content-Digest", "sha256:x"), "tag", "sha256:x", oci.ErrDigestInvalid},
		"schema 1":     {answer(200, "{}", "Content-Type", "application/vnd.docker.distribution.manifest.v1+prettyjws"), "tag", "prettyjws", oci.ErrManifestInvalid},
		"404 page":     {answer(404, "<html>not here</html>"), "tag", "not here", oci.ErrManifestUnknown},
		"404 code":     {answer(404, `{"errors":[{"code":"NAME_UNKNOWN","message":"who?"}]}`), "tag", "who?", oci.ErrNameUnknown},
		"404 other":    {answer(404, `{"errors":[{"code":"NOT_FOUND","message":"gone"}]}`), "tag", "gone", oci.ErrManifestUnknown},
		"403":          {answer(403, `{"errors":[{"code":"X","message":"no"},{"code":"DENIED","message":"never"}]}`), "tag", "never", oci.ErrDenied},
		"401":          {answer(401, ""), "tag", "401", oci.ErrUnauthorized},
		"429":          {answer(429, "slow down"), "tag", "slow down", oci.ErrTooManyRequests},
		"500":          {answer(500, `{"errors":[{"code":"MANIFEST_UNKNOWN"}]}`), "tag", "HTTP 500", nil},
		"endless 500": {func(w http.ResponseWriter, req *http.Request) {
			w.WriteHeader(http.StatusInternalServerError)
			endless(w, req)
		}, "tag", "HTTP 500", nil},
	} {
		reg := serve(t, test.handler, once)
		m, err := reg.GetManifest(t.Context(), "some/repo", test.reference)
		if err == nil {
			t.Errorf("%s: got %+v", name, m.Descriptor)
			continue
		}
		checkMessage(t, name, err, reg, test.want)
		if test.code != nil && !errors.Is(err, test.code) {
			t.Errorf("%s: error %v is not %v", name, err, test.code)
		}
		if name == "500" && errors.Is(err, oci.ErrManifestUnknown) {
			t.Errorf("a broken server's code was believed")
		}
	}
}

// A HEAD's answer that lacks something is completed by a GET.
func TestResolveManifestByGet(t *testing.T) {
	digest := oci.DigestOf([]byte(emptyIndex))
	for name, head := range map[string]http.HandlerFunc{
		"not allowed": answer(405, ""),
		"no digest":   answer(200, "", "Content-Type", oci.MediaTypeIndex, "Content-Length", "80"),
		"no type":     answer(200, "", "Content-Length", "80", "Docker-Content-Digest", digest.String()),
		"sha512":      answer(200, "", "Content-Type", oci.MediaTypeIndex, "Content-Length", "80", "Docker-Content-Digest", oci.SHA512.FromString(emptyIndex).String()),
	} {
		reg := serve(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.Method == http.MethodHead {
				head(w, req)
			} else {
				answer(200, emptyIndex, "Content-Type", "application/json")(w, req)
			}
		}), once)
		desc, err := reg.ResolveManifest(t.Context(), "some/repo", digest.String())
		if err != nil || desc.Digest != digest || desc.Size != int64(len(emptyIndex)) || desc.MediaType != oci.MediaTypeIndex {
			t.Errorf("%s: %+v, %v", name, desc, err)
		}
	}
	reg := serve(t, answer(200, "", "Content-Type", oci.MediaTypeIndex, "Content-Length", "80", "Docker-Content-Digest", digest.String()), once)
	_, err := reg.ResolveManifest(t.Context(), "some/repo", oci.DigestOf(nil).String())
	if !errors.Is(err, oci.ErrDigestInvalid) {
		t.Errorf("answer about another digest: %v", err)
	}
}

func TestHostileLists(t *testing.T) {
	var page atomic.Int64
	link := func(format string) http.HandlerFunc {
		return func(w http.ResponseWriter, req *http.Request) {
			answer(200, `{"tags":["a"]}`, "Link", fmt.Sprintf(format, page.Add(1)))(w, req)
		}
	}
	for name, test := range map[string]struct {
		handler http.HandlerFunc
		want    string
	}{
		"circle":     {answer(200, `{"tags":["a"]}`, "Link", `<?n=1>; rel=next`), "circle"},
		"elsewhere":  {answer(200, `{"tags":["a"]}`, "Link", `<http://169.254.169.254/latest>; rel=next`), "not on this registry"},
		"scheme":     {answer(200, `{"tags":["a"]}`, "Link", `<file:///etc/passwd>; rel=next`), "not on this registry"},
		"broken":     {answer(200, `{"tags":["a"]}`, "Link", `<http://[::1>; rel=next`), "not on this registry"},
		"page":       {answer(200, `<html>log in</html>`, "Content-Type", "text/html"), "log in"},
		"wrong type": {answer(200, `{"tags":{"a":1}}`), "not the list"},
		"huge pages": {func(w http.ResponseWriter, req *http.Request) {
			w.Header().Set("Link", fmt.Sprintf("<?n=%d>; rel=next", page.Add(1)))
			io.WriteString(w, `{"tags":["a"]}`)
			w.Write(bytes.Repeat([]byte(" "), 20<<20))
		}, "too long"},
		"404": {answer(404, ""), "404"},
	} {
		reg := serve(t, test.handler, remote.Options{Retries: -1})
		checkMessage(t, name, listError(reg.Tags(t.Context(), "some/repo", "")), reg, test.want)
		if name != "404" {
			checkMessage(t, name, listError(reg.Referrers(t.Context(), "some/repo", blobDigest, "")), reg)
		}
	}
	// Disorder, repetition and nonsense in a list are put right.
	reg := serve(t, answer(200, `{"tags":["b","a","","../x","b","0"]}`), once)
	var got []string
	for tag, err := range reg.Tags(t.Context(), "some/repo", "0") {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, tag)
	}
	if strings.Join(got, " ") != "a b" {
		t.Errorf("tags: %q", got)
	}
	// Many pages are fine.
	page.Store(0)
	reg = serve(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if page.Load() < 50 {
			link("<?n=%d>; rel=next")(w, req)
		} else {
			answer(200, `{"tags":["z"]}`)(w, req)
		}
	}), once)
	if err := listError(reg.Tags(t.Context(), "some/repo", "")); err != nil {
		t.Errorf("many pages: %v", err)
	}
}

// listError returns the error that ends a sequence.
func listError[T any](seq func(func(T, error) bool)) error {
	for _, err := range seq {
		if err != nil {
			return err
		}
	}
	return nil
}

func TestRetry(t *testing.T) {
	var requests atomic.Int64
	good := answer(200, string(blob))
	failTwice := func(bad http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, req *http.Request) {
			if requests.Add(1) <= 2 {
				bad(w, req)
			} else {
				good(w, req)
			}
		}
	}
	cut := func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }
	for name, test := range map[string]struct {
		bad      http.HandlerFunc
		requests int64
		code     error
	}{
		"500":             {answer(500, ""), 3, nil},
		"429":             {answer(429, "", "Retry-After", "0"), 3, nil},
		"429 in a moment": {answer(429, "", "Retry-After", "1"), 3, nil},
		"503 with body":   {answer(503, strings.Repeat("x", 1<<20)), 3, nil},
		"cut":             {cut, 3, nil},
		"429 for a day":   {answer(429, "", "Retry-After", "86400"), 1, oci.ErrTooManyRequests},
		"404":             {answer(404, ""), 1, oci.ErrBlobUnknown},
		"403":             {answer(403, ""), 1, oci.ErrDenied},
	} {
		requests.Store(0)
		begin := time.Now()
		reg := serve(t, failTwice(test.bad), remote.Options{})
		r, err := reg.GetBlob(t.Context(), "some/repo", blobDigest)
		if test.code != nil {
			if !errors.Is(err, test.code) {
				t.Errorf("%s: got error %v, want %v", name, err, test.code)
			}
		} else if err != nil {
			t.Errorf("%s: %v", name, err)
		} else {
			if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, blob) {
				t.Errorf("%s: %q, %v", name, got, err)
			}
			r.Close()
		}
		if got := requests.Load(); got != test.requests {
			t.Errorf("%s: %d requests, want %d", name, got, test.requests)
		}
		if name == "429 in a moment" && time.Since(begin) < 2*time.Second {
			t.Errorf("%s: Retry-After was not honoured", name)
		}
	}

	// Retries end, by their number and with the context.
	requests.Store(0)
	reg := serve(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		requests.Add(1)
		answer(503, "down")(w, req)
	}), remote.Options{Retries: 1})
	_, err := reg.ResolveBlob(t.Context(), "some/repo", blobDigest)
	checkMessage(t, "always 503", err, reg, "503")
	if got := requests.Load(); got != 2 {
		t.Errorf("%d requests with one retry", got)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	reg = serve(t, answer(503, "", "Retry-After", "20"), remote.Options{})
	if _, err := reg.GetBlob(ctx, "some/repo", blobDigest); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("waiting for a retry with a context that ends: %v", err)
	}
}

func TestConnectionRefused(t *testing.T) {
	// A port that is taken, so that nobody else comes to listen on it.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	at, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	reg, err := remote.New(fmt.Sprintf("127.0.0.1:%d", at.(*unix.SockaddrInet4).Port), once)
	if err != nil {
		t.Fatal(err)
	}
	_, err = reg.GetManifest(t.Context(), "some/repo", "tag")
	checkMessage(t, "closed", err, reg, "connection refused")
}
