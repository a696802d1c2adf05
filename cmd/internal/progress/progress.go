// Package progress shows people how far some work is: bars on a terminal, and a few
// lines anywhere else.
package progress

import (
	"fmt"
	"io"
	"os"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"sluice/internal/human"
)

// Progress shows how far some work is. Show is called by one at a time. What is
// written to it appears as lines among what it shows. Close leaves the last picture.
type Progress interface {
	io.Writer
	Show(Step)
	Close()
}

// New returns what shows progress on w: bars on a terminal, otherwise lines.
func New(w io.Writer) Progress {
	if f, ok := w.(*os.File); ok && isatty.IsTerminal(f.Fd()) {
		return newBars(f)
	}
	return &lines{Writer: w}
}

// Step says how far a piece of work is that consists of parts, and one of them.
type Step struct {
	Name        string // of the work: "linux/amd64"
	Verb, Ended string // what is being done to it, and what has been: "converting", "published"
	Parts       string // that it has: "3 layers"
	Size        int64  // bytes of all parts
	Complete    bool   // nothing more comes of this work

	// One part, unless its Label is empty. A single one is the whole, and gets no
	// bar of its own.
	Label       string
	Single      bool
	Part        int
	Done, Total int64 // bytes
	Finished    bool
}

// tally adds up the progress of a work's parts.
type tally struct {
	finished int           // parts
	done     int64         // bytes of them
	running  map[int]int64 // bytes of the others by part
}

func newTally() *tally { return &tally{running: make(map[int]int64)} }

// add counts the progress of a part.
func (t *tally) add(s Step) {
	if s.Finished {
		t.finished++
		t.done += s.Total
		delete(t.running, s.Part)
		return
	}
	t.running[s.Part] = s.Done
}

// bytes returns how many bytes of all parts have been done.
func (t *tally) bytes() int64 {
	n := t.done
	for _, r := range t.running {
		n += r
	}
	return n
}

// lineEvery is how often a log is told that work goes on.
const lineEvery = 10 * time.Second

// lines prints a line when work begins and ends, and now and then meanwhile,
// however many parts there are.
type lines struct {
	io.Writer
	tally *tally // of the work under way
	last  time.Time
}

func (l *lines) Show(s Step) {
	if s.Complete {
		if l.tally != nil {
			fmt.Fprintf(l, "%s: %s\n", s.Name, s.Ended)
		}
		l.tally = nil
		return
	}
	if l.tally == nil {
		l.tally, l.last = newTally(), time.Now()
		fmt.Fprintf(l, "%s: %s %s, %s\n", s.Name, s.Verb, s.Parts, human.Bytes(s.Size))
	}
	if s.Label == "" {
		return
	}
	l.tally.add(s)
	if now := time.Now(); now.Sub(l.last) >= lineEvery {
		l.last = now
		fmt.Fprintf(l, "%s: %d of %s, %s of %s\n", s.Name, l.tally.finished, s.Parts, human.Bytes(l.tally.bytes()), human.Bytes(s.Size))
	}
}

func (l *lines) Close() {}

// barWidth is how wide a bar without its texts is at most. It gives way to
// them on narrow terminals.
const barWidth = 32

// bars shows a bar of the whole work, and beneath it one for each part that is
// being worked at; those disappear when they are complete.
type bars struct {
	*mpb.Progress
	tally *tally // of the work under way
	total *mpb.Bar
	parts map[int]*mpb.Bar
}

func newBars(w io.Writer) *bars {
	return &bars{Progress: mpb.New(mpb.WithOutput(w), mpb.WithAutoRefresh()), parts: make(map[int]*mpb.Bar)}
}

func (b *bars) Show(s Step) {
	if s.Complete {
		b.end(s)
		return
	}
	if b.total == nil {
		b.begin(s)
	}
	if s.Label == "" {
		return
	}
	b.tally.add(s)
	b.total.SetTotal(max(s.Size, 1), false)
	b.total.SetCurrent(b.tally.bytes())
	if s.Single {
		return
	}
	bar := b.parts[s.Part]
	switch {
	case s.Finished && bar != nil:
		bar.SetCurrent(max(s.Total, 1))
		delete(b.parts, s.Part)
	case s.Finished:
	case bar == nil:
		bar = b.add(s)
		b.parts[s.Part] = bar
		fallthrough
	default:
		// The last byte read isn't the last byte stored.
		bar.SetCurrent(min(s.Done, s.Total-1))
	}
}

// begin shows the bar of the whole. Its total may change; it is complete when
// end says so.
func (b *bars) begin(s Step) {
	b.tally = newTally()
	b.total = b.New(0, barStyle(), mpb.BarPriority(-1), mpb.BarWidth(barWidth),
		mpb.PrependDecorators(decor.Name(fmt.Sprintf("%s, %s", s.Name, s.Parts), decor.WCSyncSpaceR)),
		mpb.AppendDecorators(decor.Any(counters), decor.AverageSpeed(decor.SizeB1000(0), ", % .0f"), decor.Any(timeLeft(time.Now()))))
	b.total.SetTotal(max(s.Size, 1), false)
}

// add shows the bar of a part.
func (b *bars) add(s Step) *mpb.Bar {
	return b.New(max(s.Total, 1), barStyle(), mpb.BarRemoveOnComplete(), mpb.BarWidth(barWidth),
		mpb.PrependDecorators(decor.Name("  "+s.Label, decor.WCSyncSpaceR)),
		mpb.AppendDecorators(decor.Any(counters)))
}

// barStyle is a bar of characters that every terminal has.
func barStyle() mpb.BarFillerBuilder {
	return mpb.BarStyle().Lbound("[").Filler("=").Tip(">").Padding(" ").Rbound("]")
}

// counters shows how many bytes of how many there are.
func counters(s decor.Statistics) string {
	return fmt.Sprintf(" %s of %s", human.Bytes(s.Current), human.Bytes(s.Total))
}

// timeLeft returns what shows the time that is left if all goes on as since
// start.
func timeLeft(start time.Time) func(decor.Statistics) string {
	return func(s decor.Statistics) string {
		passed := time.Since(start)
		if s.Completed || s.Aborted || s.Current == 0 || passed < time.Second {
			return ""
		}
		left := time.Duration(float64(passed) * float64(s.Total-s.Current) / float64(s.Current))
		return fmt.Sprintf(", %v left", max(left.Round(time.Second), time.Second))
	}
}

// end completes the bar of the whole.
func (b *bars) end(s Step) {
	if b.total == nil {
		return // there was nothing to do
	}
	b.total.SetTotal(max(s.Size, 1), true)
	b.total, b.tally = nil, nil
}

// Close implements Progress: it removes the bars of what was given up and waits for the last picture.
func (b *bars) Close() {
	for _, bar := range b.parts {
		bar.Abort(true)
	}
	if b.total != nil {
		b.total.Abort(false)
	}
	b.Wait()
}
