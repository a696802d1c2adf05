package timeline

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// DrawOptions say how a trace is drawn.
type DrawOptions struct {
	Width    int  // columns; 0: 100
	Requests bool // each HTTP request has a line
}

const (
	minBars = 20 // columns, however narrow the terminal is
	maxName = 34 // columns of a step's name with its indentation
)

// Draw draws a trace: a line for each step, below the step that it's a part of,
// with a bar for when it was. Steps that haven't ended have a bar to the end.
// Spans of several traces make no sense together.
func Draw(w io.Writer, spans []Span, opts DrawOptions) error {
	if len(spans) == 0 {
		return nil
	}
	if opts.Width == 0 {
		opts.Width = 100
	}
	d := drawing{opts: opts, children: make(map[string][]Span)}
	known := make(map[string]bool)
	for _, s := range spans {
		known[s.ID] = true
	}
	spans = slices.Clone(spans)
	slices.SortStableFunc(spans, func(a, b Span) int { return a.Start.Compare(b.Start) })
	for _, s := range spans {
		if d.began.IsZero() || s.Start.Before(d.began) {
			d.began = s.Start
		}
		d.ended = latest(d.ended, latest(s.Start, s.End))
		if !known[s.Parent] {
			s.Parent = ""
		}
		d.children[s.Parent] = append(d.children[s.Parent], s)
	}
	d.collect("", 0, make(map[string]bool))
	_, err := io.WriteString(w, d.text())
	return err
}

// drawing is a trace that is being drawn.
type drawing struct {
	opts         DrawOptions
	began, ended time.Time
	children     map[string][]Span // by parent, in the order of their start
	lines        []line
}

// line is one step's.
type line struct {
	name     string
	span     Span
	requests int
	bytes    int64
}

// collect makes the lines of the steps beneath parent. above are the steps that
// it's within: a hostile trace may be a circle.
func (d *drawing) collect(parent string, depth int, above map[string]bool) {
	for _, s := range d.children[parent] {
		if s.ID != "" && above[s.ID] || isRequest(s) && !d.opts.Requests && depth > 0 {
			continue
		}
		l := line{name: strings.Repeat("  ", depth) + s.Name, span: s}
		l.requests, l.bytes = d.traffic(s, make(map[string]bool))
		d.lines = append(d.lines, l)
		if s.ID == "" {
			continue
		}
		above[s.ID] = true
		d.collect(s.ID, depth+1, above)
		delete(above, s.ID)
	}
}

// traffic adds up the requests of a step and those within it.
func (d *drawing) traffic(s Span, seen map[string]bool) (requests int, bytes int64) {
	if s.ID == "" || seen[s.ID] {
		return 0, 0
	}
	seen[s.ID] = true
	if isRequest(s) {
		requests, bytes = 1, number(s.Attributes[Bytes])
	}
	for _, c := range d.children[s.ID] {
		n, b := d.traffic(c, seen)
		requests, bytes = requests+n, bytes+b
	}
	return requests, bytes
}

func isRequest(s Span) bool { return s.Attributes[Request] != nil }

// number returns an attribute's number, which may have been through JSON.
func number(v any) int64 {
	switch n := v.(type) {
	case int64:
		return n
	case float64:
		return int64(n)
	}
	return 0
}

// text makes the picture.
func (d *drawing) text() string {
	var b strings.Builder
	name := len("STEP")
	for _, l := range d.lines {
		name = max(name, min(utf8.RuneCountInString(l.name), maxName))
	}
	head := fmt.Sprintf("%s  %8s %8s %4s %9s  ", pad("STEP", name), "START ms", "TOOK ms", "REQ", "BYTES")
	columns := max(d.opts.Width-len(head), minBars)
	total := max(d.ended.Sub(d.began), time.Microsecond)
	b.WriteString(strings.TrimRight(head+scale(total, columns), " ") + "\n")
	for _, l := range d.lines {
		took, end := fmt.Sprintf("%.1f", ms(l.span.End.Sub(l.span.Start))), l.span.End
		if end.IsZero() {
			took, end = "...", d.ended
		}
		requests, bytes := "", ""
		if l.requests > 0 {
			requests, bytes = fmt.Sprint(l.requests), size(l.bytes)
		}
		text := fmt.Sprintf("%s  %8.1f %8s %4s %9s  %s", pad(clip(l.name, name), name), ms(l.span.Start.Sub(d.began)), took, requests, bytes,
			bar(l.span.Start.Sub(d.began), end.Sub(d.began), total, columns))
		b.WriteString(strings.TrimRight(text, " ") + "\n")
		if l.span.Error != "" {
			indent := len(l.name) - len(strings.TrimLeft(l.name, " ")) + 2
			b.WriteString(strings.Repeat(" ", indent) + "! " + clip(firstLine(l.span.Error), len(head)+columns-indent-2) + "\n")
		}
	}
	return b.String()
}

// scale writes times above the bars, each where it is.
func scale(total time.Duration, columns int) string {
	text := []byte(strings.Repeat(" ", columns))
	const parts = 4
	format := "|%.0f"
	if total < 20*time.Millisecond {
		format = "|%.1f"
	}
	for i := range parts {
		at := columns * i / parts
		copy(text[at:], fmt.Sprintf(format, ms(total)*float64(i)/parts))
	}
	return string(text)
}

// bar draws a step. One that is shorter than a column has a thin one.
func bar(from, to, total time.Duration, columns int) string {
	at := func(t time.Duration) int {
		return min(int(float64(columns)*float64(max(t, 0))/float64(total)), columns)
	}
	begin, end := at(from), at(to)
	begin = min(begin, columns-1)
	if end <= begin {
		return strings.Repeat(" ", begin) + "▏"
	}
	return strings.Repeat(" ", begin) + strings.Repeat("█", end-begin)
}

func pad(s string, n int) string {
	return s + strings.Repeat(" ", max(0, n-utf8.RuneCountInString(s)))
}

func clip(s string, n int) string {
	r := []rune(s)
	if len(r) <= n {
		return s
	}
	return string(r[:max(n-1, 0)]) + "…"
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// size prints bytes in the unit that fits.
func size(n int64) string {
	switch {
	case n < 1000:
		return fmt.Sprintf("%d B", n)
	case n < 999_950:
		return fmt.Sprintf("%.1f kB", float64(n)/1e3)
	}
	return fmt.Sprintf("%.1f MB", float64(n)/1e6)
}

func latest[T interface{ Compare(T) int }](a, b T) T {
	if a.Compare(b) >= 0 {
		return a
	}
	return b
}
