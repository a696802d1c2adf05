package layer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Gunzip decodes gzip: the part of a conversion that can't be spread over
// processors, and the one that other programs do faster. The zero value decodes
// in this process.
//
// A program's output is worth as much as a download: whoever uses it compares
// its digest with the diff ID, as with everything else.
type Gunzip struct {
	path string // of the program, absolute
}

// gunzips are the programs that decode gzip faster than this process, the
// fastest first. Each reads its standard input when called with -dc.
var gunzips = []string{"igzip", "unpigz"} // of ISA-L and of pigz

// FindGunzip returns the fastest of those that are installed: igzip or unpigz
// if a directory of PATH has them, otherwise the zero value.
func FindGunzip() Gunzip {
	for _, name := range gunzips {
		path, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		if path, err = filepath.Abs(path); err == nil {
			return Gunzip{path}
		}
	}
	return Gunzip{}
}

// String names the decoder: "igzip", "unpigz", or "go" for the one in this
// process.
func (g Gunzip) String() string {
	if g.path == "" {
		return "go"
	}
	return filepath.Base(g.path)
}

// Decompress is as the function of that name; gzip is decoded by g. With a
// program, r is read by another goroutine until Close returns, which waits for
// a Read that is under way; ctx kills the program. Errors of a program's tell
// less: what it stumbled on, but not where. An end of r that comes as an error
// is returned as that error.
func (g Gunzip) Decompress(ctx context.Context, r io.Reader) (io.ReadCloser, error) {
	return decompress(r, func(r io.Reader) (io.Reader, func() error, error) {
		if g.path == "" {
			return gunzipHere(r)
		}
		return g.run(ctx, r)
	})
}

const (
	feedSize = 128 << 10 // of a write to the program

	// gunzipGrace is how long a program whose output has ended may take to end
	// itself before it is killed.
	gunzipGrace = 10 * time.Second

	maxComplaint = 300 // bytes of what a program says that are told
)

// run starts the program on r.
func (g Gunzip) run(ctx context.Context, r io.Reader) (io.Reader, func() error, error) {
	running, kill := context.WithCancel(ctx)
	p := &program{name: g.String(), kill: kill, given: func() error { return context.Cause(ctx) }, fed: make(chan error, 1)}
	p.cmd = exec.CommandContext(running, g.path, "-dc")
	p.cmd.Env = []string{} // PIGZ and GZIP would be options
	p.cmd.WaitDelay = gunzipGrace
	p.cmd.Stderr = &p.complaint
	in, err := p.cmd.StdinPipe()
	if err == nil {
		p.out, err = p.cmd.StdoutPipe()
	}
	if err == nil {
		err = p.cmd.Start()
	}
	if err != nil {
		kill()
		return nil, nil, fmt.Errorf("start %s: %w", g.path, err)
	}
	go func() { p.fed <- feed(in, r) }()
	return p, p.close, nil
}

// feed copies r to a program's input and closes that. A program that takes no
// more is an error; the reader's is more important.
func feed(in io.WriteCloser, r io.Reader) error {
	defer in.Close()
	buf := make([]byte, feedSize)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			if _, werr := in.Write(buf[:n]); werr != nil {
				return errStopped
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return &inputError{err}
		}
	}
}

// errStopped says that a program didn't want all of its input.
var errStopped = errors.New("it stopped before the end of its input")

// inputError is an error of what is decoded.
type inputError struct{ error }

func (e *inputError) Unwrap() error { return e.error }

// program is one that runs.
type program struct {
	name      string
	cmd       *exec.Cmd
	kill      context.CancelFunc
	given     func() error // why the caller gave up, if so
	out       io.Reader
	complaint complaint
	fed       chan error // gets what feed ended with
	ended     bool
	err       error // what Read returns once it has ended
}

// Read returns what the program writes. The end of that is the end of the
// content only if the program took all of its input and is content with it.
func (p *program) Read(b []byte) (int, error) {
	if p.ended {
		return 0, p.err
	}
	n, err := p.out.Read(b)
	if err == nil {
		return n, nil
	}
	p.end(err)
	return n, p.err
}

// end waits for the program. out is what ended its output.
func (p *program) end(out error) {
	p.ended = true
	if out != io.EOF {
		p.kill()
	}
	late := time.AfterFunc(gunzipGrace, p.kill)
	defer late.Stop()
	waited := p.cmd.Wait() // and its pipes are closed, so feed ends with the next Read of the input
	p.kill()
	fed := <-p.fed
	var input *inputError
	switch {
	case errors.As(fed, &input):
		p.err = input.error
	case p.given() != nil:
		p.err = p.given()
	case waited != nil:
		p.err = fmt.Errorf("%s: %w%s", p.name, waited, p.complaint.String())
	case fed != nil:
		p.err = fmt.Errorf("%s: %w", p.name, fed)
	default:
		p.err = out
	}
}

// close ends a program that is still running.
func (p *program) close() error {
	if !p.ended {
		p.kill()
		p.end(context.Canceled)
	}
	return nil
}

// complaint keeps the beginning of what a program says.
type complaint struct{ text bytes.Buffer }

func (c *complaint) Write(p []byte) (int, error) {
	c.text.Write(p[:min(len(p), maxComplaint-c.text.Len())])
	return len(p), nil
}

func (c *complaint) String() string {
	text := strings.Join(strings.Fields(strings.ToValidUTF8(c.text.String(), ".")), " ")
	if text == "" {
		return ""
	}
	return fmt.Sprintf(" (it says %q)", text)
}
