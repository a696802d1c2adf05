package peers

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// conn is a client's connection that is kept alive. It does nothing but what
// the load needs, so that the client takes little of what is measured.
type conn struct {
	net.Conn
	br   *bufio.Reader
	addr string
	buf  []byte
}

// patience bounds one request, of which there may be many at a time.
const patience = 5 * time.Minute

func dial(ctx context.Context, addr string) (*conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	return &conn{Conn: c, br: bufio.NewReaderSize(c, 16<<10), addr: addr, buf: make([]byte, 256<<10)}, nil
}

// whole, as the place where a range begins, asks for everything.
const whole = -1

// get requests the bytes of what is at path from a place on, or the whole of
// it, and compares them with want.
func (c *conn) get(path string, from int, want []byte) error {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	req := append(c.buf[:0], "GET "...)
	req = append(req, path...)
	req = append(req, " HTTP/1.1\r\nHost: "...)
	req = append(req, c.addr...)
	expect := http.StatusOK
	if from != whole {
		expect = http.StatusPartialContent
		req = append(req, "\r\nRange: bytes="...)
		req = strconv.AppendInt(req, int64(from), 10)
		req = append(req, '-')
		req = strconv.AppendInt(req, int64(from+len(want)-1), 10)
	}
	req = append(req, "\r\n\r\n"...)
	if _, err := c.Write(req); err != nil {
		return err
	}
	status, length, err := c.head()
	if err != nil {
		return err
	}
	if status != expect || length != int64(len(want)) {
		return fmt.Errorf("%d and %d bytes for %d bytes of %s from %d on", status, length, len(want), path, from)
	}
	for len(want) > 0 {
		n := min(len(want), len(c.buf))
		if _, err := io.ReadFull(c.br, c.buf[:n]); err != nil {
			return err
		}
		if !bytes.Equal(c.buf[:n], want[:n]) {
			return fmt.Errorf("wrong bytes of %s, read from %d on", path, from)
		}
		want = want[n:]
	}
	return nil
}

// head reads a response's head, of which only status and length matter.
func (c *conn) head() (status int, length int64, err error) {
	length = -1
	for first := true; ; first = false {
		line, err := c.br.ReadSlice('\n')
		if err != nil {
			return 0, 0, err
		}
		switch line = bytes.TrimRight(line, "\r\n"); {
		case first && len(line) >= len("HTTP/1.1 200"):
			if status, err = strconv.Atoi(string(line[9:12])); err != nil {
				return 0, 0, err
			}
		case first:
			return 0, 0, errors.New("not HTTP: " + string(line))
		case len(line) == 0:
			return status, length, nil
		case len(line) > 15 && bytes.EqualFold(line[:15], []byte("content-length:")):
			if length, err = strconv.ParseInt(string(bytes.TrimSpace(line[15:])), 10, 64); err != nil {
				return 0, 0, err
			}
		}
	}
}

// request makes any other request, whose body is that of parts together.
func (c *conn) request(method, path, contentType string, parts ...[]byte) (*http.Response, []byte, error) {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, nil, err
	}
	length := 0
	for _, p := range parts {
		length += len(p)
	}
	head := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n", method, path, c.addr, contentType, length)
	all := append(net.Buffers{[]byte(head)}, parts...)
	if _, err := all.WriteTo(c.Conn); err != nil {
		return nil, nil, err
	}
	resp, err := http.ReadResponse(c.br, &http.Request{Method: method})
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	return resp, body, err
}

// refusal is an answer that was to be another one.
type refusal string

func (r refusal) Error() string { return string(r) }

// pushBlob uploads a blob as most clients do: POST, then PUT with the content.
func (c *conn) pushBlob(repo, digest string, parts ...[]byte) error {
	resp, body, err := c.request(http.MethodPost, "/v2/"+repo+"/blobs/uploads/", "application/octet-stream")
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusAccepted {
		return refusal(fmt.Sprintf("POST of an upload: %s: %s", resp.Status, body))
	}
	to := resp.Header.Get("Location")
	if _, rest, ok := strings.Cut(to, c.addr); ok {
		to = rest
	}
	sep := "?"
	if strings.Contains(to, "?") {
		sep = "&"
	}
	return c.created(c.request(http.MethodPut, to+sep+"digest="+digest, "application/octet-stream", parts...))
}

// pushManifest pushes a manifest under a tag or its digest.
func (c *conn) pushManifest(repo, reference, mediaType string, content []byte) error {
	return c.created(c.request(http.MethodPut, "/v2/"+repo+"/manifests/"+reference, mediaType, content))
}

func (c *conn) created(resp *http.Response, body []byte, err error) error {
	if err == nil && resp.StatusCode != http.StatusCreated {
		err = refusal(fmt.Sprintf("PUT: %s: %s", resp.Status, body))
	}
	return err
}
