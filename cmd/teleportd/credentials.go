package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"time"

	"github.com/spf13/pflag"

	"sluice/internal/node/credentials"
	"sluice/internal/node/cri"
	"sluice/internal/node/endpoint"
	"sluice/internal/remote"
)

// credentialConfig is the flags of who this node is to registries.
type credentialConfig struct {
	cri         string // containerd's socket
	docker      string
	pullSecrets []string
	azure       string // azure.json
}

func (c *credentialConfig) register(f *pflag.FlagSet) {
	f.StringVar(&c.azure, "aksConfig", "", "`FILE` azure.json: the managed identity or service\nprincipal that this node is to Azure's registries")
	f.StringVar(&c.docker, "docker-config", "", "`DIR` of docker's config.json (default: docker's own,\n$DOCKER_CONFIG or ~/.docker)")
	f.StringArrayVar(&c.pullSecrets, "pull-secrets", nil, "Kubernetes pull secrets: a `PATH` of one, or of a\ndirectory of secrets; may be repeated")
	f.StringVar(&c.cri, "cri-socket", "", "forward kubelet's image service, at cri.sock beside the\ndaemon's other sockets, to containerd's `SOCKET`; use the\ncredentials that come with pulls, and tell pods apart")
}

// nodeCredentials is who this node is to registries, and what looks after it in
// the background.
type nodeCredentials struct {
	*credentials.Chain
	passed  *credentials.Passed // nil: kubelet isn't listened to
	stop    context.CancelFunc
	running sync.WaitGroup
}

// open makes the chain of sources; run is the daemon's directory of sockets,
// plainHTTP are the registries without TLS.
func (c *credentialConfig) open(run string, plainHTTP []string, log *slog.Logger) *nodeCredentials {
	n := new(nodeCredentials)
	var all []credentials.Source
	if c.cri != "" {
		n.passed = credentials.NewPassed(filepath.Join(run, "credentials.json"), log)
		all = append(all, n.passed)
	}
	all = append(all, credentials.NewDocker(c.docker))
	if len(c.pullSecrets) > 0 {
		all = append(all, credentials.NewPullSecrets(c.pullSecrets...))
	}
	if c.azure != "" {
		all = append(all, credentials.NewAzure(credentials.AzureOptions{Config: c.azure, PlainHTTP: plainHTTP}))
	}
	n.Chain = credentials.New(log, all...)
	ctx, stop := context.WithCancel(context.Background())
	n.stop = stop
	n.running.Go(func() { n.Run(ctx) })
	return n
}

// close ends what runs in the background.
func (n *nodeCredentials) close() {
	n.stop()
	n.running.Wait()
}

// listenCRI listens where kubelet asks for images, if it's to be listened to.
func (d *daemon) listenCRI() (net.Listener, error) {
	if d.creds.passed == nil {
		return nil, nil
	}
	socket := filepath.Join(d.config.run, "cri.sock")
	if to, err := filepath.Abs(d.config.credentials.cri); err != nil || to == socket {
		return nil, errors.Join(fmt.Errorf("--cri-socket %s: that is where this daemon answers; name containerd's socket", to), err)
	}
	return endpoint.Listen(socket)
}

// forgetEvery is how often it is looked which images' credentials are needed.
const forgetEvery = 10 * time.Minute

// serveCRI forwards kubelet's image service until ctx ends, and forgets what it
// passed for images that left the node.
func (d *daemon) serveCRI(ctx context.Context, l net.Listener) error {
	served := make(chan error, 1)
	go func() {
		served <- cri.Serve(ctx, l, cri.Options{Socket: d.config.credentials.cri, Log: d.log, Pull: func(p cri.Pull) func(error) {
			return d.beginPull(p)
		}})
	}()
	tick := time.NewTicker(forgetEvery)
	defer tick.Stop()
	for {
		select {
		case err := <-served:
			return err
		case <-tick.C:
			var here []string
			for _, i := range d.images.Status(ctx).Images {
				here = append(here, i.Reference)
			}
			d.creds.passed.Listed(here)
		}
	}
}

// beginPull notes with which credential kubelet pulls an image, if any, and for
// which pod.
func (d *daemon) beginPull(p cri.Pull) (end func(error)) {
	noted := func(error) {}
	if p.Credential != (remote.Credential{}) {
		noted = d.creds.passed.Pull(p.Image, p.Credential)
	}
	ended := d.events.BeginPull(p) // with the credential: it may look the image up
	return func(err error) {
		noted(err)
		ended(err)
	}
}
