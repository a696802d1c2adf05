package credentials

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"go.yaml.in/yaml/v3"

	"sluice/internal/durable"
	"sluice/internal/remote"
)

// Plugins are kubelet's credential-provider plugins: programs that say on their
// standard output which credentials are for an image. Configuration and
// protocol are kubelet's own (kubelet.config.k8s.io/v1 CredentialProviderConfig,
// credentialprovider.kubelet.k8s.io/v1), so both can use the same files. Use
// NewPlugins.
type Plugins struct {
	plugins []*plugin
	problem error // of the configuration
}

// PluginOptions configure Plugins. Config and BinDir are required.
type PluginOptions struct {
	// Config is the file of kubelet's --image-credential-provider-config, in
	// YAML or JSON, or a directory of such files. It is read once.
	Config string

	// BinDir holds the plugins: --image-credential-provider-bin-dir.
	BinDir string

	// Timeout bounds a plugin's run; default 1 minute, as kubelet's.
	Timeout time.Duration

	// Log receives which plugins can't be used here. Nil discards it.
	Log *slog.Logger
}

const (
	pluginTimeout = time.Minute

	// maxPluginCache bounds how long an answer is believed.
	maxPluginCache = 7 * 24 * time.Hour

	pluginAPI = "credentialprovider.kubelet.k8s.io/"
)

// providerConfig is a provider of kubelet's CredentialProviderConfig.
type providerConfig struct {
	Name                 string   `yaml:"name"`
	MatchImages          []string `yaml:"matchImages"`
	DefaultCacheDuration string   `yaml:"defaultCacheDuration"`
	APIVersion           string   `yaml:"apiVersion"`
	Args                 []string `yaml:"args"`
	Env                  []struct {
		Name  string `yaml:"name"`
		Value string `yaml:"value"`
	} `yaml:"env"`
	TokenAttributes *struct {
		RequireServiceAccount bool `yaml:"requireServiceAccount"`
	} `yaml:"tokenAttributes"`
}

// plugin is one provider.
type plugin struct {
	providerConfig
	program string
	cache   time.Duration
	keeper  *keeper[auths]
}

// NewPlugins reads the configuration. If that is wrong no plugin is used, and the
// error is told to those who ask for credentials, too. Plugins that want a
// service account's token are left out: it belongs to a pod, and a node has none.
func NewPlugins(o PluginOptions) (*Plugins, error) {
	if o.Timeout <= 0 {
		o.Timeout = pluginTimeout
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	configs, err := readProviders(o.Config)
	if err != nil {
		return &Plugins{problem: err}, err
	}
	p := new(Plugins)
	seen := make(map[string]bool)
	for _, c := range configs {
		one, err := newPlugin(c, o)
		if err == nil && seen[c.Name] {
			err = errors.New("it's there twice")
		}
		if err != nil {
			err = fmt.Errorf("credential provider %.100q of %s: %w", c.Name, o.Config, err)
			return &Plugins{problem: err}, err
		}
		seen[c.Name] = true
		if c.TokenAttributes != nil && c.TokenAttributes.RequireServiceAccount {
			o.Log.Warn("a credential provider wants a pod's service account and isn't used: images are read when no pod is at hand", "provider", c.Name)
			continue
		}
		p.plugins = append(p.plugins, one)
	}
	return p, nil
}

// readProviders reads the file, or all files of the directory in the order of
// their names.
func readProviders(path string) ([]providerConfig, error) {
	names := []string{path}
	if fi, err := os.Stat(path); err == nil && fi.IsDir() {
		names = nil
		entries, err := os.ReadDir(path)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			switch filepath.Ext(e.Name()) {
			case ".yaml", ".yml", ".json":
				names = append(names, filepath.Join(path, e.Name()))
			}
		}
	}
	var all []providerConfig
	for _, name := range names {
		content, err := durable.ReadFile(name, maxConfig)
		if err != nil {
			return nil, err
		}
		some, err := parseProviders(content)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		all = append(all, some...)
	}
	return all, nil
}

// parseProviders reads kubelet's CredentialProviderConfig.
func parseProviders(content []byte) ([]providerConfig, error) {
	var doc struct {
		Kind      string           `yaml:"kind"`
		Providers []providerConfig `yaml:"providers"`
	}
	if err := yaml.Unmarshal(content, &doc); err != nil {
		return nil, err
	}
	if doc.Kind != "CredentialProviderConfig" {
		return nil, fmt.Errorf("kind is %.100q: it must be CredentialProviderConfig, as for kubelet", doc.Kind)
	}
	return doc.Providers, nil
}

// newPlugin checks a provider's configuration as kubelet does.
func newPlugin(c providerConfig, o PluginOptions) (*plugin, error) {
	cache, err := time.ParseDuration(c.DefaultCacheDuration)
	switch {
	case c.Name == "" || c.Name != filepath.Base(c.Name) || c.Name == "." || c.Name == "..":
		return nil, errors.New("the name must be that of a file in the bin directory")
	case len(c.MatchImages) == 0:
		return nil, errors.New("matchImages is empty")
	case err != nil || cache < 0:
		return nil, fmt.Errorf("defaultCacheDuration %.100q: write one such as 10m", c.DefaultCacheDuration)
	case !slices.Contains([]string{pluginAPI + "v1", pluginAPI + "v1beta1", pluginAPI + "v1alpha1"}, c.APIVersion):
		return nil, fmt.Errorf("apiVersion %.100q: use %sv1", c.APIVersion, pluginAPI)
	}
	p := &plugin{providerConfig: c, program: filepath.Join(o.BinDir, c.Name), cache: cache}
	p.keeper = newKeeper(o.Timeout, p.ask)
	return p, nil
}

// Name implements Source.
func (*Plugins) Name() string { return "credential providers" }

// Credential implements Source: of several plugins, it's the first credential
// that isn't refused.
func (p *Plugins) Credential(ctx context.Context, req Request) (remote.Credential, time.Time, error) {
	if p.problem != nil {
		return remote.Credential{}, time.Time{}, p.problem
	}
	req = req.ofImage()
	var found remote.Credential
	var until time.Time
	err := ErrNone
	for _, one := range p.plugins {
		if !slices.ContainsFunc(one.MatchImages, func(m string) bool { return matches(m, req) }) {
			continue
		}
		c, u, cerr := one.credential(ctx, req)
		switch {
		case cerr == nil && !req.refused(c):
			return c, u, nil
		case cerr == nil:
			found, until, err = c, u, nil
		case !errors.Is(cerr, ErrNone) && errors.Is(err, ErrNone):
			err = fmt.Errorf("%s: %w", one.Name, cerr)
		}
	}
	return found, until, err
}

func (p *Plugins) run(ctx context.Context) {
	var wg sync.WaitGroup
	for _, one := range p.plugins {
		wg.Go(func() { one.keeper.run(ctx) })
	}
	wg.Wait()
}

// The keys under which answers are kept, by cacheKeyType.
func imageKey(req Request) string    { return "image " + req.Image() }
func registryKey(req Request) string { return "registry " + req.Host }

const globalKey = "global"

func (p *plugin) credential(ctx context.Context, req Request) (remote.Credential, time.Time, error) {
	keys := []string{imageKey(req), registryKey(req), globalKey}
	good := func(a auths) bool {
		c, err := a.find(req)
		return err != nil || !req.refused(c)
	}
	a, until, err := p.keeper.get(ctx, req, keys, good)
	if err != nil {
		return remote.Credential{}, time.Time{}, err
	}
	c, err := a.find(req)
	return c, until, err
}

// ask runs the plugin.
func (p *plugin) ask(ctx context.Context, req Request) (got[auths], error) {
	question, err := json.Marshal(map[string]string{"apiVersion": p.APIVersion, "kind": "CredentialProviderRequest", "image": req.Image()})
	if err != nil {
		return got[auths]{}, err
	}
	env := os.Environ()
	for _, e := range p.Env {
		env = append(env, e.Name+"="+e.Value)
	}
	answer, err := runProgram(ctx, question, env, p.program, p.Args...)
	if err != nil {
		return got[auths]{}, err
	}
	return p.parse(answer, req)
}

// parse reads a plugin's answer.
func (p *plugin) parse(answer []byte, req Request) (got[auths], error) {
	var doc struct {
		APIVersion    string  `json:"apiVersion"`
		Kind          string  `json:"kind"`
		CacheKeyType  string  `json:"cacheKeyType"`
		CacheDuration *string `json:"cacheDuration"`
		Auth          map[string]struct {
			Username string `json:"username"`
			Password string `json:"password"`
		} `json:"auth"`
	}
	if err := json.Unmarshal(answer, &doc); err != nil {
		return got[auths]{}, errors.New("its answer isn't a CredentialProviderResponse in JSON") // the error may quote a secret
	}
	if doc.Kind != "CredentialProviderResponse" || doc.APIVersion != p.APIVersion {
		return got[auths]{}, fmt.Errorf("it answers with kind %.100q of %.100q, not CredentialProviderResponse of %s", doc.Kind, doc.APIVersion, p.APIVersion)
	}
	g := got[auths]{value: make(auths)}
	switch doc.CacheKeyType {
	case "Image":
		g.key = imageKey(req)
	case "Registry":
		g.key = registryKey(req)
	case "Global":
		g.key = globalKey
	default:
		return got[auths]{}, fmt.Errorf("its answer has cacheKeyType %.100q, not Image, Registry or Global", doc.CacheKeyType)
	}
	cache := p.cache
	if doc.CacheDuration != nil {
		d, err := time.ParseDuration(*doc.CacheDuration)
		if err != nil {
			return got[auths]{}, fmt.Errorf("its answer has cacheDuration %.100q", *doc.CacheDuration)
		}
		cache = d
	}
	if cache > 0 { // otherwise it isn't kept
		g.until = time.Now().Add(min(cache, maxPluginCache))
	}
	for key, a := range doc.Auth {
		g.value[key] = authEntry{Username: a.Username, Password: a.Password}
	}
	return g, nil
}
