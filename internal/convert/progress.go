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

	// Layers is how many layers the image has, and Size how many bytes their
	// original blobs have together.
	Layers int
	Size   int64

	// Of StageLayer: which layer, the lowest being 0, and how many bytes of how
	// many of its original blob have been read. Finished says that it has been
	// stored, once for each layer; Done may begin again at 0 when a layer is tried
	// again.
	Layer       int
	Digest      oci.Digest // of the original blob
	Done, Total int64
	Finished    bool

	// Existed, of StageDone, says that nothing had to be done.
	Existed bool
}

// progress returns the progress of an image in a stage.
func (img *image) progress(s Stage) Progress {
	return Progress{Stage: s, Platform: img.platform, Layers: len(img.layers), Size: img.size()}
}

// layerProgress returns the progress of layer i when n bytes of it have been
// read.
func (img *image) layerProgress(i int, n int64) Progress {
	p := img.progress(StageLayer)
	p.Layer, p.Digest, p.Done, p.Total = i, img.layers[i].Digest, n, img.layers[i].Size
	return p
}

// layerFinished returns the progress of layer i when it has been stored.
func (img *image) layerFinished(i int) Progress {
	p := img.layerProgress(i, img.layers[i].Size)
	p.Finished = true
	return p
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
