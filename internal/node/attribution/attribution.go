// Package attribution makes Events of what happens to images on this node: it
// finds out for which container of which pod an image was pulled, or is used, and
// puts that into a happening.Log.
//
// Three tell it what happens, and none of them waits for it. kubelet's pulls come
// with their pod (BeginPull, from package cri). The snapshotter tells of each
// layer that containerd asks it for (Asked), which is how a pull turns out to be
// of an image that isn't here yet, and to stream or not; and of each snapshot that
// a container gets (Created). Whose container that is, containerd's CRI knows a
// moment later: Run asks for it, a few times with growing pauses. While no
// container starts nothing is asked.
//
// A start belongs to the pull that its pod made of its image just before (kubelet
// makes one for each container, unless the image is there). Without kubelet's
// pulls, where it doesn't pull through this daemon or containerd belongs to
// somebody else, it's the last that the snapshotter has seen of that image.
//
// Of which images to tell at all is for mount.Manager.Judges to say.
package attribution

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"sync"

	"sluice/internal/node/cri"
	"sluice/internal/node/happening"
	"sluice/internal/node/mount"
	"sluice/oci"
)

// Images is what is asked of a *mount.Manager.
type Images interface {
	Expect(ref string)
	OptOut(ref, why string) (end func())
	Judges(registry string, streams bool) bool
	LastPull(ref string) (mount.Outcome, bool)
	WhyPresent(ctx context.Context, ref string) error
	Arrived(ctx context.Context, id oci.Digest) (image mount.Image, here, size int64, err error)
}

// Containers is what is asked of containerd's CRI: a *cri.Runtime.
type Containers interface {
	Find(ctx context.Context, id string) (cri.Container, error)
}

// Options configures an Attributor. Events and Images are required.
type Options struct {
	Events *happening.Log
	Images Images

	// Containers knows whose containers are. Nil: nobody does, and Events have
	// no pod.
	Containers Containers

	// Namespace is containerd's namespace whose containers are told of. Empty:
	// all.
	Namespace string

	// OptOut is the annotation by which pods say, with the value "false", that
	// what is pulled for them isn't to be streamed. Empty: they can't.
	OptOut string

	// Remedy says what to do about an image that goes the ordinary way for a reason.
	// Nil: mount.Reason's own, which is about streaming.
	Remedy func(mount.Reason) string

	// Log receives what can't be told. Nil discards it.
	Log *slog.Logger
}

// Attributor makes Events. Use New. Its methods may be called concurrently.
type Attributor struct {
	opts   Options
	log    *slog.Logger
	starts chan start

	mu    sync.Mutex
	pulls []*pull // oldest first
}

// maxStarts bounds the starts that wait to be asked about; maxAsking those that
// are asked about at a time.
const (
	maxStarts = 1024
	maxAsking = 64
)

// New returns an Attributor. Somebody has to Run it.
func New(o Options) *Attributor {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Remedy == nil {
		o.Remedy = mount.Reason.Remedy
	}
	return &Attributor{opts: o, log: o.Log, starts: make(chan start, maxStarts)}
}

// BeginPull is for a pull that kubelet asks for; it returns what is to be called
// when that ends. A pull for a pod that opts out goes the ordinary way; others are
// expected. It's quick.
func (a *Attributor) BeginPull(p cri.Pull) (end func(error)) {
	optIn := func() {}
	if why := a.optsOut(p); why != "" {
		optIn = a.opts.Images.OptOut(p.Image, why)
	} else {
		a.opts.Images.Expect(p.Image)
	}
	ended := a.begin(p)
	return func(err error) {
		ended(err)
		optIn()
	}
}

// optsOut says why a pull isn't to be streamed; "" if it may be.
func (a *Attributor) optsOut(p cri.Pull) string {
	value, ok := p.Annotations[a.opts.OptOut]
	if a.opts.OptOut == "" || !ok {
		return ""
	}
	streams, err := strconv.ParseBool(value)
	if err != nil {
		a.log.Warn("a pod's annotation is neither true nor false, and doesn't count", "namespace", p.Pod.Namespace, "pod", p.Pod.Name, "annotation", a.opts.OptOut, "value", fmt.Sprintf("%.40q", value))
		return ""
	}
	if streams {
		return ""
	}
	return fmt.Sprintf("pod %s/%s opts out by its annotation %s: %q", p.Pod.Namespace, p.Pod.Name, a.opts.OptOut, value)
}

// canonical is an image's name in full and its registry; the name as it is, and
// no registry, if it can't be read.
func canonical(image string) (name, registry string) {
	r, err := oci.ParseReference(image)
	if err != nil {
		return image, ""
	}
	return r.String(), r.Registry
}
