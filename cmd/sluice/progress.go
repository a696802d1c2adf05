package main

import (
	"fmt"
	"io"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"sluice/internal/convert"
)

// progress shows how far a conversion is. update is called by one at a time.
type progress interface {
	update(convert.Progress)
	close()
}

// lines prints a line when something has been done.
type lines struct{ w io.Writer }

func (l *lines) update(p convert.Progress) {
	switch {
	case p.Stage == convert.StageLayer && p.Finished:
		fmt.Fprintf(l.w, "%s: layer %d of %d, %s, %s: converted\n", platformName(p.Platform), p.Layer+1, p.Layers, shortDigest(p.Digest), megabytes(p.Total))
	case p.Stage == convert.StageBuild:
		fmt.Fprintf(l.w, "%s: making metadata and chunk table\n", platformName(p.Platform))
	case p.Stage == convert.StageDone && !p.Existed:
		fmt.Fprintf(l.w, "%s: published\n", platformName(p.Platform))
	}
}

func (l *lines) close() {}

// bars shows a bar for each layer that is being converted.
type bars struct {
	container *mpb.Progress
	bars      map[string]*mpb.Bar // by platform and layer; those that aren't complete
}

func newBars(w io.Writer) *bars {
	return &bars{container: mpb.New(mpb.WithOutput(w), mpb.WithWidth(80)), bars: make(map[string]*mpb.Bar)}
}

func (b *bars) update(p convert.Progress) {
	if p.Stage != convert.StageLayer {
		return
	}
	name := fmt.Sprintf("%s %d/%d", platformName(p.Platform), p.Layer+1, p.Layers)
	bar := b.bars[name]
	if bar == nil {
		bar = b.container.AddBar(max(p.Total, 1),
			mpb.PrependDecorators(decor.Name(name+" "+shortDigest(p.Digest), decor.WCSyncSpaceR), decor.Counters(decor.SizeB1000(0), "% .1f / % .1f", decor.WCSyncSpace)),
			mpb.AppendDecorators(decor.Percentage(decor.WC{W: 5}), decor.AverageSpeed(decor.SizeB1000(0), "% .1f", decor.WC{W: 12})))
		b.bars[name] = bar
	}
	if p.Finished {
		bar.SetCurrent(max(p.Total, 1))
		delete(b.bars, name)
		return
	}
	// The last byte read isn't the last byte stored: a bar that is full is
	// complete for good.
	bar.SetCurrent(min(p.Done, p.Total-1))
}

// close removes the bars of layers that were given up and waits for the last
// picture.
func (b *bars) close() {
	for _, bar := range b.bars {
		bar.Abort(false)
	}
	b.container.Wait()
}
