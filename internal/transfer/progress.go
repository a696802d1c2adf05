package transfer

import (
	"sync"

	"sluice/oci"
)

// State is what becomes of a blob.
type State string

// The states of a blob.
const (
	Waiting State = ""
	Copying State = "copying" // bytes are on their way
	Copied  State = "copied"  // all of it has been sent
	Skipped State = "skipped" // the target had it
	Mounted State = "mounted" // the target took it from another repository of its own
)

// Stage is a part of a copy.
type Stage string

// The stages, in order.
const (
	StageBlobs     Stage = "blobs"     // the manifests are known, blobs are being copied
	StageManifests Stage = "manifests" // the manifests are being pushed
	StageDone      Stage = "done"
)

// Progress says how far a copy is.
type Progress struct {
	Stage Stage

	// Blobs is how many blobs the image needs, and Size how many bytes they have
	// together.
	Blobs int
	Size  int64

	// Of StageBlobs, except for the first, which only begins it: one blob, its
	// number from 0 on, what has become of it, and how many of its bytes the
	// target has or is about to have. Each blob is Copied, Skipped or Mounted
	// once. While it is Copying, Done may go back when a connection was lost.
	Blob   oci.Descriptor
	Number int
	State  State
	Done   int64
}

// report reports the progress p.
func (c *copier) report(p Progress) {
	p.Blobs, p.Size = c.total.Blobs, c.total.Size
	c.opts.Progress(p)
}

// serialized returns f, called by one at a time.
func serialized(f func(Progress)) func(Progress) {
	var mu sync.Mutex // held while f runs
	return func(p Progress) {
		mu.Lock()
		defer mu.Unlock()
		f(p)
	}
}
