package main

import (
	"log/slog"
	"slices"
	"sync"

	"sluice/internal/node/mount"
	"sluice/internal/remote"
)

// registries returns the function that finds registries by host, for one
// repository each. They share connections.
func registries(plain []string, credentials func(repository string) remote.CredentialFunc, log *slog.Logger) func(host, repository string) (mount.Registry, error) {
	var mu sync.Mutex
	known := make(map[string]*remote.Registry)
	transport := remote.NewTransport()
	return func(host, repository string) (mount.Registry, error) {
		name := host + "/" + repository
		mu.Lock()
		defer mu.Unlock()
		if r := known[name]; r != nil {
			return r, nil
		}
		opts := remote.Options{Transport: transport, Credentials: credentials(repository), Log: log}
		if slices.Contains(plain, host) {
			opts.PlainHTTP = remote.PlainHTTPAlways
		}
		r, err := remote.New(host, opts)
		if err != nil {
			return nil, err
		}
		known[name] = r
		return r, nil
	}
}
