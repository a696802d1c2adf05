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
)

// progress shows how far a conversion is. update is called by one at a time.
// What is written to it appears as lines among what it shows.
type progress interface {
	io.Writer
	update(convert.Progress)
	close()
}

// newProgress returns what shows a conversion's progress on w: bars on a
// terminal, otherwise lines.
func newProgress(w io.Writer) progress {
	if f, ok := w.(*os.File); ok && isatty.IsTerminal(f.Fd()) {
		return newBars(f)
	}
	return &lines{Writer: w}
}

// tally adds up the progress of one platform's layers.
type tally struct {
	platform string
	size     int64         // of the image's layers
	layers   int           // that it has
	finished int           // of them
	done     int64         // bytes of finished layers
	running  map[int]int64 // bytes of the others by layer
}

func newTally(p convert.Progress) *tally {
	return &tally{platform: platformName(p.Platform), size: p.Size, layers: p.Layers, running: make(map[int]int64)}
}

// add counts the progress of a layer.
func (t *tally) add(p convert.Progress) {
	if p.Finished {
		t.finished++
		t.done += p.Total
		delete(t.running, p.Layer)
		return
	}
	t.running[p.Layer] = p.Done
}

// bytes returns how many bytes of all layers have been read.
func (t *tally) bytes() int64 {
	n := t.done
	for _, r := range t.running {
		n += r
	}
	return n
}

// lineEvery is how often a conversion tells a log that it is at work.
const lineEvery = 10 * time.Second

// lines prints a line when a platform begins and ends, and now and then
// meanwhile, however many layers there are.
type lines struct {
	io.Writer
	tally *tally // of the platform under way
	last  time.Time
}

func (l *lines) update(p convert.Progress) {
	if p.Stage == convert.StageDone {
		if t := l.tally; t != nil {
			fmt.Fprintf(l, "%s: published\n", t.platform)
		}
		l.tally = nil
		return
	}
	if l.tally == nil {
		l.tally, l.last = newTally(p), time.Now()
		fmt.Fprintf(l, "%s: converting %s, %s\n", l.tally.platform, layerCount(p.Layers), size(p.Size))
	}
	if p.Stage != convert.StageLayer {
		return
	}
	l.tally.add(p)
	if now := time.Now(); now.Sub(l.last) >= lineEvery {
		l.last = now
		fmt.Fprintf(l, "%s: %d of %s, %s of %s\n", l.tally.platform, l.tally.finished, layerCount(p.Layers), size(l.tally.bytes()), size(p.Size))
	}
}

func (l *lines) close() {}

func layerCount(n int) string {
	if n == 1 {
		return "1 layer"
	}
	return fmt.Sprintf("%d layers", n)
}

// barWidth is how wide a bar without its texts is at most. It gives way to
// them on narrow terminals.
const barWidth = 32

// bars shows a bar of the image, and beneath it one for each layer that is
// being converted; those disappear when they are complete.
type bars struct {
	*mpb.Progress
	tally  *tally // of the platform under way
	total  *mpb.Bar
	layers map[int]*mpb.Bar
}

func newBars(w io.Writer) *bars {
	return &bars{Progress: mpb.New(mpb.WithOutput(w), mpb.WithAutoRefresh()), layers: make(map[int]*mpb.Bar)}
}

func (b *bars) update(p convert.Progress) {
	if p.Stage == convert.StageDone {
		b.end()
		return
	}
	if b.total == nil {
		b.begin(p)
	}
	if p.Stage != convert.StageLayer {
		return
	}
	b.tally.add(p)
	b.total.SetCurrent(min(b.tally.bytes(), p.Size-1)) // it is complete when all is published
	bar := b.layers[p.Layer]
	switch {
	case p.Finished && bar != nil:
		bar.SetCurrent(max(p.Total, 1))
		delete(b.layers, p.Layer)
	case p.Finished:
	case bar == nil:
		bar = b.add(p)
		b.layers[p.Layer] = bar
		fallthrough
	default:
		// The last byte read isn't the last byte stored.
		bar.SetCurrent(min(p.Done, p.Total-1))
	}
}

// begin shows the bar of a platform.
func (b *bars) begin(p convert.Progress) {
	b.tally = newTally(p)
	b.total = b.New(max(p.Size, 1), barStyle(), mpb.BarPriority(-1), mpb.BarWidth(barWidth),
		mpb.PrependDecorators(decor.Name(fmt.Sprintf("%s, %s", b.tally.platform, layerCount(p.Layers)), decor.WCSyncSpaceR)),
		mpb.AppendDecorators(decor.Any(counters), decor.AverageSpeed(decor.SizeB1000(0), ", % .0f"), decor.Any(timeLeft(time.Now()))))
}

// add shows the bar of a layer.
func (b *bars) add(p convert.Progress) *mpb.Bar {
	return b.New(max(p.Total, 1), barStyle(), mpb.BarRemoveOnComplete(), mpb.BarWidth(barWidth),
		mpb.PrependDecorators(decor.Name(fmt.Sprintf("  layer %d", p.Layer+1), decor.WCSyncSpaceR)),
		mpb.AppendDecorators(decor.Any(counters)))
}

// barStyle is a bar of characters that every terminal has.
func barStyle() mpb.BarFillerBuilder {
	return mpb.BarStyle().Lbound("[").Filler("=").Tip(">").Padding(" ").Rbound("]")
}

// counters shows how many bytes of how many there are.
func counters(s decor.Statistics) string {
	return fmt.Sprintf(" %s of %s", size(s.Current), size(s.Total))
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

// end completes the bar of a platform.
func (b *bars) end() {
	if b.total == nil {
		return // there was nothing to do
	}
	b.total.SetCurrent(max(b.tally.size, 1))
	b.total, b.tally = nil, nil
}

// close removes the bars of what was given up and waits for the last picture.
func (b *bars) close() {
	for _, bar := range b.layers {
		bar.Abort(true)
	}
	if b.total != nil {
		b.total.Abort(false)
	}
	b.Wait()
}
