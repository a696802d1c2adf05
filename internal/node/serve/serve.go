// Package serve is the front of a node daemon: what answers containerd, as a
// snapshotter; kubelet, whose image service it forwards to containerd to learn for
// which pods and with which credentials images are pulled; control clients; and
// who asks for metrics.
//
// A daemon opens what it serves, its images, and then Listens. From then on
// nobody is refused; they are answered as soon as the daemon Serves. One that was
// lost, because its mounts were taken away, is run anew by Until.
package serve

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"sync"

	"sluice/internal/node/attribution"
	"sluice/internal/node/credentials"
	"sluice/internal/node/cri"
	"sluice/internal/node/endpoint"
	"sluice/internal/node/happening"
	"sluice/internal/node/mount"
	"sluice/internal/node/snapshot"
)

// Images is what a daemon serves: a *mount.Manager or a *disks.Manager.
type Images interface {
	snapshot.Images
	attribution.Images

	// Settled is called once the snapshotter has attached all that it had before
	// the daemon's start.
	Settled()
}

// Options configures a Front. Root, Run, Images and Events are required.
type Options struct {
	Root   string // the daemon's state; the snapshotter's is in it
	Run    string // its sockets: see Snapshotter, Control and Kubelet
	Images Images

	// Events receives what happens to images. It is closed when the daemon ends.
	Events *happening.Log
	// Namespace is containerd's namespace whose containers are told of in Events,
	// empty: all. OptOut is the annotation by which pods don't want their images
	// from here. Remedy says what to do about an image that isn't from here. As
	// attribution.Options has them.
	Namespace, OptOut string
	Remedy            func(mount.Reason) string

	// Containerd is the socket of containerd's CRI. Empty: kubelet isn't listened
	// to, and nobody knows whose containers are.
	Containerd string
	// Passed, required with Containerd, keeps the credentials that kubelet passes;
	// References are the images on the node, for which it keeps them.
	Passed     *credentials.Passed
	References func(context.Context) []string

	// MountOptions and RemapIDs are snapshot.Options' own.
	MountOptions []string
	RemapIDs     bool

	// Metrics is the TCP address at which metrics are served, to whoever asks.
	// Empty: none.
	Metrics string

	// Log receives what operators should know. Nil discards it.
	Log *slog.Logger
}

// Snapshotter is the socket, in the directory run, at which containerd asks.
func Snapshotter(run string) string { return filepath.Join(run, "snapshotter.sock") }

// Control is the socket at which control clients ask.
func Control(run string) string { return filepath.Join(run, "control.sock") }

// Kubelet is the socket at which kubelet asks.
func Kubelet(run string) string { return filepath.Join(run, "cri.sock") }

// Front is what listens. Use Listen.
type Front struct {
	opts        Options
	log         *slog.Logger
	runtime     *cri.Runtime // nil: nobody knows whose containers are
	events      *attribution.Attributor
	snapshotter *snapshot.Snapshotter

	// The listeners that there are.
	snapshots, control, kubelet, metrics net.Listener
}

// Listen opens the snapshotter, which goes on with what it had, and listens
// everywhere or nowhere. The caller calls Serve.
func Listen(ctx context.Context, o Options) (_ *Front, err error) {
	f := &Front{opts: o, log: o.Log}
	if f.log == nil {
		f.log = slog.New(slog.DiscardHandler)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.close())
		}
	}()
	told := attribution.Options{Events: o.Events, Images: o.Images, Namespace: o.Namespace, OptOut: o.OptOut, Remedy: o.Remedy, Log: f.log}
	if o.Containerd != "" {
		if f.runtime, err = cri.NewRuntime(o.Containerd); err != nil {
			return nil, err
		}
		told.Containers = f.runtime
	}
	f.events = attribution.New(told)
	f.snapshotter, err = snapshot.Open(ctx, snapshot.Options{
		Root: o.Root, Images: o.Images, Observer: f.events, MountOptions: o.MountOptions, RemapIDs: o.RemapIDs, Log: f.log,
	})
	if err != nil {
		return nil, err
	}
	o.Images.Settled()
	return f, f.listen(ctx)
}

func (f *Front) listen(ctx context.Context) (err error) {
	if f.kubelet, err = f.listenKubelet(); err != nil {
		return err
	}
	if f.opts.Metrics != "" {
		var c net.ListenConfig
		if f.metrics, err = c.Listen(ctx, "tcp", f.opts.Metrics); err != nil {
			return fmt.Errorf("serve metrics: %w", err)
		}
	}
	if f.control, err = endpoint.Listen(Control(f.opts.Run)); err != nil {
		return err
	}
	f.snapshots, err = endpoint.Listen(Snapshotter(f.opts.Run)) // the last: who waits for it finds the others
	return err
}

// Metrics is the address at which metrics are served, "" if at none.
func (f *Front) Metrics() string {
	if f.metrics == nil {
		return ""
	}
	return f.metrics.Addr().String()
}

// Serve answers until ctx ends, or lost is closed, which is ErrLost, and closes
// everything. It is called once.
func (f *Front) Serve(ctx context.Context, control, metrics http.Handler, lost <-chan struct{}) (err error) {
	defer func() { err = errors.Join(err, f.close()) }()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(ctx, f.opts.Events.Close)() // who follows isn't waited for
	var wg sync.WaitGroup
	wg.Go(func() { f.events.Run(ctx) })
	wg.Go(func() { cancel(snapshot.Serve(ctx, f.snapshots, f.snapshotter)) })
	wg.Go(func() { cancel(endpoint.Serve(ctx, f.control, control)) })
	if f.kubelet != nil {
		wg.Go(func() { cancel(f.serveKubelet(ctx)) })
	}
	if f.metrics != nil {
		wg.Go(func() { cancel(endpoint.Serve(ctx, f.metrics, metrics)) })
	}
	wg.Go(func() { // what a crash left; containerd asks for it only when it has removed something
		if err := f.snapshotter.Cleanup(ctx); err != nil {
			f.log.Warn("left-over directories of snapshots stay", "error", err)
		}
	})
	f.log.Info("ready", "snapshotter", Snapshotter(f.opts.Run), "metrics", f.Metrics(), "root", f.opts.Root)
	select {
	case <-ctx.Done():
	case <-lost:
		cancel(ErrLost)
	}
	wg.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// close closes what there is. A listener that was served is closed already.
func (f *Front) close() error {
	var errs []error
	for _, l := range []net.Listener{f.snapshots, f.control, f.kubelet, f.metrics} {
		if l == nil {
			continue
		}
		if err := l.Close(); !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	if f.snapshotter != nil {
		errs = append(errs, f.snapshotter.Close())
	}
	if f.runtime != nil {
		errs = append(errs, f.runtime.Close())
	}
	return errors.Join(errs...)
}
