package main

import (
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"text/tabwriter"
	"time"

	"github.com/spf13/pflag"

	"sluice/internal/node/credentials"
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

// open makes the chain of sources, which somebody has to Run, and what kubelet
// passes, nil if it isn't listened to. run is the daemon's directory of sockets,
// plainHTTP are the registries without TLS. A source that is configured wrongly is
// told of and doesn't keep the daemon from starting: containers wait for it.
func (c *credentialConfig) open(run string, plainHTTP []string, log *slog.Logger) (*credentials.Chain, *credentials.Passed) {
	var sources []credentials.Source
	var passed *credentials.Passed
	if c.cri != "" {
		passed = credentials.NewPassed(filepath.Join(run, "credentials.json"), log)
		sources = append(sources, passed)
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
	return credentials.New(log, sources...), passed
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
