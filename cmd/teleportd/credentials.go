package main

import (
	"log/slog"
	"path/filepath"

	"github.com/spf13/pflag"

	"sluice/internal/node/credentials"
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

// open makes the chain of sources, which somebody has to Run, and what kubelet
// passes, nil if it isn't listened to. run is the daemon's directory of sockets,
// plainHTTP are the registries without TLS.
func (c *credentialConfig) open(run string, plainHTTP []string, log *slog.Logger) (*credentials.Chain, *credentials.Passed) {
	var all []credentials.Source
	var passed *credentials.Passed
	if c.cri != "" {
		passed = credentials.NewPassed(filepath.Join(run, "credentials.json"), log)
		all = append(all, passed)
	}
	all = append(all, credentials.NewDocker(c.docker))
	if len(c.pullSecrets) > 0 {
		all = append(all, credentials.NewPullSecrets(c.pullSecrets...))
	}
	if c.azure != "" {
		all = append(all, credentials.NewAzure(credentials.AzureOptions{Config: c.azure, PlainHTTP: plainHTTP}))
	}
	return credentials.New(log, all...), passed
}
