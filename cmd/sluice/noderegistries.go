package main

import (
	"log/slog"
	"slices"
	"sync"

	"sluice/internal/node/mount"
	"sluice/internal/remote"
)

// registries returns the function that finds registries by host. They share
// connections.
func registries(plain []string, log *slog.Logger) func(host, repository string) (mount.Registry, error) {
	var mu sync.Mutex
	known := make(map[string]*remote.Registry)
	transport := remote.NewTransport()
	return func(host, _ string) (mount.Registry, error) {
		mu.Lock()
		defer mu.Unlock()
		if r := known[host]; r != nil {
			return r, nil
		}
		opts := remote.Options{Transport: transport, Log: log}
		if slices.Contains(plain, host) {
			opts.PlainHTTP = remote.PlainHTTPAlways
		}
		r, err := remote.New(host, opts)
		if err != nil {
			return nil, err
		}
		known[host] = r
		return r, nil
	}
}
