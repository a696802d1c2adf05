package serve

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"sluice/internal/node/cri"
	"sluice/internal/node/endpoint"
	"sluice/internal/remote"
)

// listenKubelet listens where kubelet asks for images, if it's listened to.
func (f *Front) listenKubelet() (net.Listener, error) {
	if f.opts.Containerd == "" {
		return nil, nil
	}
	socket := Kubelet(f.opts.Run)
	to, err := filepath.Abs(f.opts.Containerd)
	if err != nil {
		return nil, err
	}
	if to == socket {
		return nil, fmt.Errorf("the CRI socket %s is where this daemon answers kubelet: name containerd's", to)
	}
	return endpoint.Listen(socket)
}

// forgetEvery is how often it is looked which images' credentials are needed.
const forgetEvery = 10 * time.Minute

// serveKubelet forwards kubelet's image service until ctx ends, and forgets what
// it passed for images that left the node.
func (f *Front) serveKubelet(ctx context.Context) error {
	served := make(chan error, 1)
	go func() {
		served <- cri.Serve(ctx, f.kubelet, cri.Options{Socket: f.opts.Containerd, Pull: f.beginPull, Log: f.log})
	}()
	tick := time.NewTicker(forgetEvery)
	defer tick.Stop()
	for {
		select {
		case err := <-served:
			return err
		case <-tick.C:
			f.opts.Passed.Listed(f.opts.References(ctx))
		}
	}
}

// beginPull notes with which credential kubelet pulls an image, if any, and for
// which pod.
func (f *Front) beginPull(p cri.Pull) (end func(error)) {
	noted := func(error) {}
	if p.Credential != (remote.Credential{}) {
		noted = f.opts.Passed.Pull(p.Image, p.Credential)
	}
	ended := f.events.BeginPull(p) // with the credential: it may look the image up
	return func(err error) {
		noted(err)
		ended(err)
	}
}
