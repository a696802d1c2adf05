package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/spf13/pflag"

	"sluice/internal/node/credentials"
	"sluice/internal/node/cri"
	"sluice/internal/node/endpoint"
	"sluice/internal/remote"
)

// credentialConfig is the flags of who this node is to registries.
type credentialConfig struct {
	cri                 string // containerd's socket
	providers, programs string // kubelet's plugins
	docker              string
	pullSecrets         []string
	azure               string
	azureRegistries     []string
}

// systemIdentity is the machine's identity that needs no ID.
const systemIdentity = "system"

func (c *credentialConfig) register(f *pflag.FlagSet) {
	f.StringVar(&c.cri, "cri-socket", "", "forward kubelet's image service, at cri.sock beside the\ndaemon's other sockets, to containerd's `SOCKET`, and\nuse the credentials that come with pulls")
	f.StringVar(&c.providers, "image-credential-provider-config", "", "kubelet's `FILE` of credential-provider plugins")
	f.StringVar(&c.programs, "image-credential-provider-bin-dir", "", "`DIR` of these plugins")
	f.StringVar(&c.docker, "docker-config", "", "`DIR` of docker's config.json (default: docker's own,\n$DOCKER_CONFIG or ~/.docker)")
	f.StringArrayVar(&c.pullSecrets, "pull-secrets", nil, "Kubernetes pull secrets: a `PATH` of one, or of a\ndirectory of secrets; may be repeated")
	f.StringVar(&c.azure, "azure-identity", "", "the machine's managed identity, by its client `ID`\nor \""+systemIdentity+"\", for Azure's registries")
	f.StringArrayVar(&c.azureRegistries, "azure-registry", nil, "and for registry `HOST`; may be repeated")
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
// plainHTTP are the registries without TLS. A source that is configured wrongly is
// told of and doesn't keep the daemon from starting: containers wait for it.
func (c *credentialConfig) open(run string, plainHTTP []string, log *slog.Logger) *nodeCredentials {
	n := new(nodeCredentials)
	var sources []credentials.Source
	if c.cri != "" {
		n.passed = credentials.NewPassed(filepath.Join(run, "credentials.json"), log)
		sources = append(sources, n.passed)
	}
	if c.providers != "" {
		plugins, err := credentials.NewPlugins(credentials.PluginOptions{Config: c.providers, BinDir: c.programs, Log: log})
		if err != nil {
			log.Error("credential-provider plugins can't be used", "error", err)
		}
		sources = append(sources, plugins)
	}
	sources = append(sources, credentials.NewDocker(c.docker))
	if len(c.pullSecrets) > 0 {
		sources = append(sources, credentials.NewPullSecrets(c.pullSecrets...))
	}
	if c.azure != "" {
		o := credentials.AzureOptions{Hosts: c.azureRegistries, PlainHTTP: plainHTTP}
		if c.azure != systemIdentity {
			o.ClientID = c.azure
		}
		sources = append(sources, credentials.NewAzure(o))
	}
	n.Chain = credentials.New(log, sources...)
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
		return nil, fmt.Errorf("--cri-socket %s: that is where this daemon answers; name containerd's socket", to)
	}
	return endpoint.Listen(socket)
}

// beginPull notes with which credential kubelet pulls an image, if any, and for
// which pod.
func (d *daemon) beginPull(events *nodeEvents, p cri.Pull) (end func(error)) {
	noted := func(error) {}
	if p.Credential != (remote.Credential{}) {
		noted = d.creds.passed.Pull(p.Image, p.Credential)
	}
	ended := events.BeginPull(p) // with the credential: it may look the image up
	return func(err error) {
		noted(err)
		ended(err)
	}
}

// forgetEvery is how often it is looked which images' credentials are needed.
const forgetEvery = 10 * time.Minute

// serveCRI forwards kubelet's image service until ctx ends, and forgets what it
// passed for images that left the node.
func (d *daemon) serveCRI(ctx context.Context, l net.Listener, events *nodeEvents) error {
	ctx, cancel := context.WithCancel(ctx)
	served := make(chan error, 1)
	go func() {
		served <- cri.Serve(ctx, l, cri.Options{Socket: d.config.credentials.cri, Log: d.log, Pull: func(p cri.Pull) func(error) {
			return d.beginPull(events, p)
		}})
	}()
	defer cancel()
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

// printCredentials prints who the node is to registries.
func printCredentials(out io.Writer, all []credentials.Status) error {
	if len(all) == 0 {
		return nil
	}
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "\nREGISTRY\tREPOSITORY\tCREDENTIALS\tUNTIL")
	for _, s := range all {
		source, until := s.Source, "-"
		if source == "" {
			source = "none"
		}
		if s.Error != "" {
			source = "none: refused"
		}
		if !s.Until.IsZero() {
			until = s.Until.Local().Format(time.DateTime)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", s.Host, s.Repository, source, until)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, s := range all {
		if len(s.Passed) == 0 && s.Error == "" {
			continue
		}
		if _, err := fmt.Fprintf(out, "\n%s/%s, credentials that aren't used:\n", s.Host, s.Repository); err != nil {
			return err
		}
		for _, p := range s.Passed {
			if _, err := fmt.Fprintf(out, "  %s: %s\n", p.Source, p.Reason); err != nil {
				return err
			}
		}
		if s.Error != "" {
			if _, err := fmt.Fprintf(out, "  %s\n", s.Error); err != nil {
				return err
			}
		}
	}
	return nil
}
