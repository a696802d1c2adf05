package registry

import (
	"context"
	"io"
	"net/http"
	"time"

	"sluice/internal/auth"
)

// conversation is one request and its response: an http.ResponseWriter that
// remembers what the access log wants to know and ends a client that stands
// still. It is found in the request's context, and belongs to the goroutine
// that serves the request.
//
// There is no limit to a whole request, since a blob may take hours. Instead
// the connection's deadlines are moved on with every piece that is read or
// written. They stay behind when the request is over: for the server, which
// may still have to skip the rest of a body or to flush, they hold as well, and
// it sets its own before it waits for the next request.
//
// A deadline of HTTP/2 is one of the stream, and ends it when it passes, even if
// nobody reads or writes just then. So there it holds only while somebody does,
// and while the server flushes.
type conversation struct {
	http.ResponseWriter
	request *http.Request
	control *http.ResponseController
	idle    time.Duration
	stream  bool // it is one of HTTP/2
	began   time.Time

	id, trace        string // of the request; trace is empty if it has none
	caller           auth.Caller
	authErr          error  // why the caller isn't known
	kind, repository string // what it is about, see Report

	status         int   // of the response; 0 while none was written
	received, sent int64 // bytes of bodies
	err            error // what went wrong
	broken         bool  // it went wrong after the response had begun
	redirected     bool  // to a URL of the object store
}

type conversationKey struct{}

// conversationOf returns the conversation of a context, nil without a front.
func conversationOf(ctx context.Context) *conversation {
	c, _ := ctx.Value(conversationKey{}).(*conversation)
	return c
}

// Report tells the front what a request is about. The kind, such as
// "blob_get", labels its metrics and names its span, so it must be one of few:
// a constant of the program, never a part of the request. The repository may be
// empty; it is for the access log and the span.
func Report(r *http.Request, kind, repository string) {
	if c := conversationOf(r.Context()); c != nil {
		c.kind, c.repository = kind, repository
	}
}

// sniffSize is how much net/http reads of a body to find out its type.
const sniffSize = 512

// sendSize is how much is handed to the kernel before the deadline moves on.
const sendSize = 1 << 20

func newConversation(w http.ResponseWriter, r *http.Request, idle time.Duration) *conversation {
	c := &conversation{
		ResponseWriter: w, request: r,
		control: http.NewResponseController(w),
		idle:    idle, stream: r.ProtoMajor >= 2, began: time.Now(),
	}
	// Errors of deadlines are those of writers without a connection, as in
	// tests; there is nothing to time then.
	c.writing()
	c.wrote()
	if r.Body != nil && r.Body != http.NoBody {
		if !c.stream {
			c.control.SetReadDeadline(c.began.Add(idle))
		}
		r.Body = &requestBody{ReadCloser: r.Body, c: c}
	}
	return c
}

// writing moves the deadline on before something is written, or flushed at the
// end.
func (c *conversation) writing() { c.control.SetWriteDeadline(time.Now().Add(c.idle)) }

// wrote is called after it was.
func (c *conversation) wrote() {
	if c.stream {
		c.control.SetWriteDeadline(time.Time{})
	}
}

// Unwrap is for http.ResponseController.
func (c *conversation) Unwrap() http.ResponseWriter { return c.ResponseWriter }

func (c *conversation) WriteHeader(status int) {
	if c.status == 0 {
		c.status = status
	}
	c.writing()
	c.ResponseWriter.WriteHeader(status)
	c.wrote()
}

func (c *conversation) Write(p []byte) (int, error) {
	if c.status == 0 {
		c.WriteHeader(http.StatusOK)
	}
	total := 0
	for len(p) > 0 {
		c.writing()
		n, err := c.ResponseWriter.Write(p[:min(len(p), sendSize)])
		c.wrote()
		total += n
		c.sent += int64(n)
		if err != nil {
			return total, err
		}
		p = p[n:]
	}
	return total, nil
}

// ReadFrom sends what src yields. A file, limited or not, goes from page cache
// to socket by sendfile(2), which net/http does if it is given an *os.File or
// an io.LimitedReader of one, and nothing wrapped further.
func (c *conversation) ReadFrom(src io.Reader) (int64, error) {
	to, ok := c.ResponseWriter.(io.ReaderFrom)
	if !ok {
		return io.Copy(struct{ io.Writer }{c}, src)
	}
	if c.status == 0 {
		c.WriteHeader(http.StatusOK)
	}
	limited, _ := src.(*io.LimitedReader)
	if limited != nil && limited.N > sniffSize && !c.stream {
		// With the header gone, net/http doesn't read the beginning of the
		// file itself, to see what it is.
		_ = c.control.Flush() // what goes wrong shows in the body
	}
	var total int64
	for {
		piece := &io.LimitedReader{R: src, N: sendSize}
		if limited != nil {
			piece.R, piece.N = limited.R, min(limited.N, sendSize)
		}
		want := piece.N
		if want == 0 {
			return total, nil
		}
		c.writing()
		n, err := to.ReadFrom(piece)
		total += n
		c.sent += n
		if limited != nil {
			limited.N -= n
		}
		if err != nil || n < want {
			return total, err
		}
	}
}

// fail answers with an error or, if the response has begun, breaks it off, so
// that the client notices.
func (c *conversation) fail(err error) {
	c.err = err
	if c.status != 0 {
		c.broken = true
		return
	}
	writeError(c, c.request, err)
}

// requestBody is a request's body that must keep coming.
type requestBody struct {
	io.ReadCloser
	c *conversation
}

func (b *requestBody) Read(p []byte) (int, error) {
	b.c.control.SetReadDeadline(time.Now().Add(b.c.idle))
	n, err := b.ReadCloser.Read(p)
	b.c.received += int64(n)
	if err == io.EOF || b.c.stream {
		// The server goes on reading, to notice when the client goes away;
		// that may take as long as it likes.
		b.c.control.SetReadDeadline(time.Time{})
	}
	if err != nil && err != io.EOF {
		err = &bodyError{err}
	}
	return n, err
}

// bodyError is a failure to receive a body, which is nobody's fault here.
type bodyError struct{ err error }

func (e *bodyError) Error() string { return "receive the request's body: " + e.err.Error() }
func (e *bodyError) Unwrap() error { return e.err }
