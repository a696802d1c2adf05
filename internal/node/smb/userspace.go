package smb

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"runtime"
	"strings"

	"github.com/cloudsoda/go-smb2"

	"sluice/oci"
)

// NewClient returns a share that is read over connections of this process: SMB 3.1.1,
// signed in with NTLMv2, and encrypted, or not at all.
func NewClient(o Options) *Client { return New(userspace{}, o) }

// userspace is the Transport that is a library. What the library leaves open is closed
// here:
//
//   - It writes from a buffer that the next request reuses, so a request that is taken
//     back while it is written would garble the next. None is: calls get no context
//     but the connection's, which ends after it.
//   - It takes any server's word for what needs no encryption, and for a dialect: see
//     guard.
//   - An answer that makes no sense can panic in the caller: see calling. In the
//     goroutine that receives, it ends the connection by itself.
//   - Files have finalizers that ask the server something: they are taken away.
//   - Signing off makes other requests panic: the connection is closed instead.
type userspace struct{}

// credits is how many are asked for, of 64 KiB each: those of maxRequests and some
// for what is small.
const credits = maxRequests*partSize>>16 + 64

func (userspace) Connect(ctx context.Context, l Login) (Connection, error) {
	host, port := serverOf(l)
	if l.Share == "" || strings.ContainsAny(l.Share, `/\`) {
		return nil, fmt.Errorf("%w: %q is no name of a share", ErrUnreachable, l.Share)
	}
	var d net.Dialer
	tcp, err := d.DialContext(ctx, "tcp", net.JoinHostPort(host, port))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	life, cancel := context.WithCancel(context.Background()) // the connection's own; it ends with it
	c := &userspaceConnection{guard: newGuard(tcp), cancel: cancel}
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	c.share, err = calling(func() (*smb2.Share, error) { return signIn(life, c.guard, host, l) })
	if err == nil && !stop() {
		err = fmt.Errorf("%w: %w", ErrUnreachable, context.Cause(ctx))
	}
	if err != nil {
		stop()
		_ = c.Close()
		return nil, err
	}
	return c, nil
}

// serverOf returns where the server is.
func serverOf(l Login) (host, port string) {
	host, port, err := net.SplitHostPort(l.Server)
	if err != nil {
		return strings.Trim(l.Server, "[]"), "445"
	}
	return host, port
}

// userOf returns who signs in, DOMAIN\USER or USER.
func userOf(l Login) (domain, user string) {
	domain, user, ok := strings.Cut(l.Username, `\`)
	if !ok {
		return "", l.Username
	}
	return domain, user
}

// signIn connects to a share.
func signIn(life context.Context, g *guard, host string, l Login) (*smb2.Share, error) {
	domain, user := userOf(l)
	d := smb2.Dialer{
		MaxCreditBalance: credits,
		Negotiator:       smb2.Negotiator{RequireMessageSigning: true, SpecifiedDialect: dialect},
		Initiator:        &smb2.NTLMInitiator{Domain: domain, User: user, Password: l.Password},
	}
	session, err := d.DialConn(life, g, host)
	if err != nil {
		return nil, connectError(err, l)
	}
	g.sealed.Store(true)
	share, err := session.WithContext(life).Mount(l.Share)
	if err != nil {
		return nil, connectError(err, l)
	}
	return share.WithContext(life), nil
}

type userspaceConnection struct {
	guard  *guard
	cancel context.CancelFunc
	share  *smb2.Share
}

func (c *userspaceConnection) Open(path string) (File, error) {
	return calling(func() (File, error) {
		f, err := c.share.Open(path)
		if err != nil {
			return nil, fileError(err, path)
		}
		runtime.SetFinalizer(f, nil)
		size, err := f.Seek(0, io.SeekEnd)
		if err == nil && size < 0 {
			err = fmt.Errorf("%s is said to have %d bytes", path, size)
		}
		if err != nil {
			return nil, errors.Join(fileError(err, path), f.Close())
		}
		return &userspaceFile{f: f, path: path, size: size}, nil
	})
}

// Close closes the connection and then ends the requests that wait for something else,
// such as the server's leave to send them.
func (c *userspaceConnection) Close() error {
	err := c.guard.Close()
	c.cancel()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

type userspaceFile struct {
	f    *smb2.File
	path string
	size int64
}

func (f *userspaceFile) Size() int64 { return f.size }

func (f *userspaceFile) ReadAt(p []byte, off int64) (int, error) {
	return calling(func() (int, error) {
		n, err := f.f.ReadAt(p, off)
		if err == nil && n < len(p) {
			err = io.EOF
		}
		return n, fileError(err, f.path)
	})
}

func (f *userspaceFile) Close() error {
	_, err := calling(func() (struct{}, error) { return struct{}{}, fileError(f.f.Close(), f.path) })
	return err
}

// calling calls the library. A panic over what a server sent is the server's fault, and
// leaves nothing but the connection in doubt.
func calling[T any](call func() (T, error)) (v T, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: its answer makes no sense: %v", ErrUnreachable, r)
		}
	}()
	return call()
}

// NTSTATUS values of MS-ERREF, section 2.3.1, that mean something here.
var (
	refusals = map[uint32]bool{
		0xC0000064: true, // NO_SUCH_USER
		0xC000006A: true, // WRONG_PASSWORD
		0xC000006D: true, // LOGON_FAILURE
		0xC000006E: true, // ACCOUNT_RESTRICTION
		0xC000006F: true, // INVALID_LOGON_HOURS
		0xC0000070: true, // INVALID_WORKSTATION
		0xC0000071: true, // PASSWORD_EXPIRED
		0xC0000072: true, // ACCOUNT_DISABLED
		0xC000015B: true, // LOGON_TYPE_NOT_GRANTED
		0xC0000193: true, // ACCOUNT_EXPIRED
		0xC0000224: true, // PASSWORD_MUST_CHANGE
		0xC0000234: true, // ACCOUNT_LOCKED_OUT
	}
	noFile = map[uint32]bool{
		0xC000000F: true, // NO_SUCH_FILE
		0xC0000033: true, // OBJECT_NAME_INVALID
		0xC000003B: true, // OBJECT_PATH_SYNTAX_BAD
		0xC0000056: true, // DELETE_PENDING
		0xC0000103: true, // NOT_A_DIRECTORY
	}
	noSession = map[uint32]bool{
		0xC00000C9: true, // NETWORK_NAME_DELETED
		0xC0000203: true, // USER_SESSION_DELETED
		0xC000020C: true, // CONNECTION_DISCONNECTED
		0xC0000205: true, // INSUFF_SERVER_RESOURCES
		0xC000035C: true, // NETWORK_SESSION_EXPIRED
	}
)

const noShare = 0xC00000CC // BAD_NETWORK_NAME

// connectError is what an error of the library means while connecting.
func connectError(err error, l Login) error {
	var answer *smb2.ResponseError
	code := uint32(0)
	if errors.As(err, &answer) {
		code = answer.Code
	}
	switch {
	case refusals[code], errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w (%w)", ErrRefused, err)
	case code == noShare, errors.Is(err, fs.ErrNotExist):
		return NotExist("share " + l.Share)
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, err)
}

// fileError is what an error of the library means of a file.
func fileError(err error, path string) error {
	var answer *smb2.ResponseError
	code := uint32(0)
	if errors.As(err, &answer) {
		code = answer.Code
	}
	switch {
	case err == nil, err == io.EOF:
		return err
	case noFile[code], errors.Is(err, fs.ErrNotExist):
		return NotExist(path)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: %w", oci.ErrDenied.Withf("the file server doesn't let %s be read", path), err)
	case answer != nil && !noSession[code]:
		return fmt.Errorf("the file server says: %w", err)
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, err)
}
