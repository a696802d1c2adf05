package main

import (
	"fmt"
	"io"
	"os"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"sluice/internal/convert"
	"sluice/internal/human"
)

// progress shows how far some work is. show is called by one at a time. What is
// written to it appears as lines among what it shows.
type progress interface {
	io.Writer
	show(step)
	close()
}

// newProgress returns what shows progress on w: bars on a terminal, otherwise
// lines.
func newProgress(w io.Writer) progress {
	if f, ok := w.(*os.File); ok && isatty.IsTerminal(f.Fd()) {
		return newBars(f)
	}
	return &lines{Writer: w}
}

// step says how far a piece of work is that consists of parts, and one of them.
type step struct {
	name        string // of the work: "linux/amd64"
	verb, ended string // what is being done to it, and what has been: "converting", "published"
	parts       string // that it has: "3 layers"
	size        int64  // bytes of all parts
	complete    bool   // nothing more comes of this work

	// One part, unless its label is empty. A single one is the whole, and gets no
	// bar of its own.
	label       string
	single      bool
	part        int
	done, total int64 // bytes
	finished    bool
}

// convertStep is the progress of a conversion as a step.
func convertStep(p convert.Progress) step {
	s := step{
		name: platformName(p.Platform), verb: "converting", ended: "published", parts: plural(p.Layers, "layer"), size: p.Size,
		complete: p.Stage == convert.StageDone,
	}
	if p.Stage == convert.StageLayer {
		s.label, s.part, s.done, s.total, s.finished = fmt.Sprintf("layer %d", p.Layer+1), p.Layer, p.Done, p.Total, p.Finished
	}
	return s
}

// tally adds up the progress of a work's parts.
type tally struct {
	finished int           // parts
	done     int64         // bytes of them
	running  map[int]int64 // bytes of the others by part
}

func newTally() *tally { return &tally{running: make(map[int]int64)} }

// add counts the progress of a part.
func (t *tally) add(s step) {
	if s.finished {
		t.finished++
		t.done += s.total
		delete(t.running, s.part)
		return
	}
	t.running[s.part] = s.done
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

func (l *lines) show(s step) {
	if s.complete {
		if l.tally != nil {
			fmt.Fprintf(l, "%s: %s\n", s.name, s.ended)
		}
		l.tally = nil
		return
	}
	if l.tally == nil {
		l.tally, l.last = newTally(), time.Now()
		fmt.Fprintf(l, "%s: %s %s, %s\n", s.name, s.verb, s.parts, human.Bytes(s.size))
	}
	if s.label == "" {
		return
	}
	l.tally.add(s)
	if now := time.Now(); now.Sub(l.last) >= lineEvery {
		l.last = now
		fmt.Fprintf(l, "%s: %d of %s, %s of %s\n", s.name, l.tally.finished, s.parts, human.Bytes(l.tally.bytes()), human.Bytes(s.size))
	}
}

func (l *lines) close() {}

// plural returns "1 layer" or "2 layers".
func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

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

func (b *bars) show(s step) {
	if s.complete {
		b.end(s)
		return
	}
	if b.total == nil {
		b.begin(s)
	}
	if s.label == "" {
		return
	}
	b.tally.add(s)
	b.total.SetTotal(max(s.size, 1), false)
	b.total.SetCurrent(b.tally.bytes())
	if s.single {
		return
	}
	bar := b.parts[s.part]
	switch {
	case s.finished && bar != nil:
		bar.SetCurrent(max(s.total, 1))
		delete(b.parts, s.part)
	case s.finished:
	case bar == nil:
		bar = b.add(s)
		b.parts[s.part] = bar
		fallthrough
	default:
		// The last byte read isn't the last byte stored.
		bar.SetCurrent(min(s.done, s.total-1))
	}
}

// begin shows the bar of the whole. Its total may change; it is complete when
// end says so.
func (b *bars) begin(s step) {
	b.tally = newTally()
	b.total = b.New(0, barStyle(), mpb.BarPriority(-1), mpb.BarWidth(barWidth),
		mpb.PrependDecorators(decor.Name(fmt.Sprintf("%s, %s", s.name, s.parts), decor.WCSyncSpaceR)),
		mpb.AppendDecorators(decor.Any(counters), decor.AverageSpeed(decor.SizeB1000(0), ", % .0f"), decor.Any(timeLeft(time.Now()))))
	b.total.SetTotal(max(s.size, 1), false)
}

// add shows the bar of a part.
func (b *bars) add(s step) *mpb.Bar {
	return b.New(max(s.total, 1), barStyle(), mpb.BarRemoveOnComplete(), mpb.BarWidth(barWidth),
		mpb.PrependDecorators(decor.Name("  "+s.label, decor.WCSyncSpaceR)),
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
func (b *bars) end(s step) {
	if b.total == nil {
		return // there was nothing to do
	}
	b.total.SetTotal(max(s.size, 1), true)
	b.total, b.tally = nil, nil
}

// close removes the bars of what was given up and waits for the last picture.
func (b *bars) close() {
	for _, bar := range b.parts {
		bar.Abort(true)
	}
	if b.total != nil {
		b.total.Abort(false)
	}
	b.Wait()
}
