package credentials

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"sluice/internal/durable"
	"sluice/internal/remote"
)

// Docker is docker's configuration, with the credential helpers that it names.
// Keys in its "auths" may have a path, as kubelet allows: such an entry is for
// the repositories that begin with it. What is written in the file goes before
// what a helper knows. All is read anew each time. Use NewDocker.
type Docker struct {
	config string // file; empty: there's none
	helped *keeper[remote.Credential]
}

// helperTimeout is how long a credential helper may run.
const helperTimeout = 30 * time.Second

// NewDocker returns the configuration in a directory, which need not be there
// yet, as a source. An empty dir is docker's own: $DOCKER_CONFIG, or .docker in
// the home of the user that the node runs as.
func NewDocker(dir string) *Docker {
	d := new(Docker)
	if dir = cmp.Or(dir, os.Getenv("DOCKER_CONFIG")); dir != "" {
		d.config = filepath.Join(dir, "config.json")
	} else if home := os.Getenv("HOME"); home != "" { // a daemon may have none
		d.config = filepath.Join(home, ".docker", "config.json")
	}
	d.helped = newKeeper(helperTimeout, d.ask)
	return d
}

// Name implements Source.
func (*Docker) Name() string { return "docker's configuration" }

// Credential implements Source.
func (d *Docker) Credential(ctx context.Context, req Request) (remote.Credential, time.Time, error) {
	if d.config == "" {
		return remote.Credential{}, time.Time{}, ErrNone
	}
	written, err := fileAuths(d.config, req)
	if err == nil && !req.refused(written) || d.helper(req.Host) == "" {
		return written, time.Time{}, err
	}
	helped, _, herr := d.helped.get(ctx, req, []string{registryKey(req)}, nil)
	if herr == nil || errors.Is(err, ErrNone) {
		return helped, time.Time{}, herr
	}
	return written, time.Time{}, err
}

// version implements versioned. A helper isn't asked.
func (d *Docker) version(Request) string { return fileVersion(d.config) }

func (d *Docker) run(ctx context.Context) { d.helped.run(ctx) }

// helper returns the name of a registry's credential helper, or "".
func (d *Docker) helper(host string) string {
	content, err := durable.ReadFile(d.config, maxConfig)
	if err != nil {
		return ""
	}
	var doc struct {
		Helpers map[string]string `json:"credHelpers"`
		Store   string            `json:"credsStore"`
	}
	if json.Unmarshal(content, &doc) != nil {
		return ""
	}
	return cmp.Or(doc.Helpers[host], doc.Helpers[helperKey(host)], doc.Store)
}

// helperKey is how docker calls a registry to helpers.
func helperKey(host string) string {
	if dockerHub(host) == "docker.io" {
		return "https://index.docker.io/v1/"
	}
	return host
}

// ask asks the credential helper (docker's documentation, "Credential helper
// protocol"). Its answer isn't kept: it doesn't say for how long it is good.
func (d *Docker) ask(ctx context.Context, req Request) (got[remote.Credential], error) {
	var none got[remote.Credential]
	helper := d.helper(req.Host)
	if helper == "" {
		return none, ErrNone
	}
	out, err := runProgram(ctx, []byte(helperKey(req.Host)), nil, "docker-credential-"+filepath.Base(helper), "get")
	if err != nil {
		if strings.Contains(string(out), "credentials not found") {
			return none, ErrNone
		}
		return none, fmt.Errorf("credential helper %.100q: %w", helper, err)
	}
	var answer struct{ Username, Secret string }
	if json.Unmarshal(out, &answer) != nil {
		return none, fmt.Errorf("credential helper %.100q: its answer isn't JSON", helper) // the error may quote a secret
	}
	c := remote.Credential{Username: answer.Username, Password: answer.Secret}
	if answer.Username == "<token>" {
		c = remote.Credential{RefreshToken: answer.Secret}
	}
	return got[remote.Credential]{value: c, key: registryKey(req)}, nil
}
