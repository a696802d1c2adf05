package convert

import (
	"sync"

	"sluice/oci"
)

// Stage is a part of a conversion.
type Stage string

// The stages, in order.
const (
	StageLayer   Stage = "layer"   // a layer is being read and converted
	StageBuild   Stage = "build"   // metadata, chunk table, boot pack
	StagePublish Stage = "publish" // the manifest is being pushed
	StageDone    Stage = "done"    // the platform's artifact is complete
)

// Progress says how far a conversion is.
type Progress struct {
	Stage    Stage
	Platform oci.Platform

	// Layers is how many layers the image has.
	Layers int

	// Of StageLayer: which layer, the lowest being 0, and how many bytes of how
	// many of its original blob have been read. Finished says that it has been
	// stored; Done may begin again at 0 when a layer is tried again.
	Layer       int
	Digest      oci.Digest // of the original blob
	Done, Total int64
	Finished    bool

	// Existed, of StageDone, says that nothing had to be done.
	Existed bool
}

// reporter returns the progress function, called by one at a time.
func (c *converter) reporter() func(Progress) {
	var mu sync.Mutex // held while Progress runs
	return func(p Progress) {
		mu.Lock()
		defer mu.Unlock()
		c.opts.Progress(p)
	}
}
