package main

import (
	"context"
	"net/http"

	"sluice/internal/node/credentials"
	"sluice/internal/node/disks"
	"sluice/internal/node/hosts"
	"sluice/internal/node/mount"
	"sluice/internal/node/report/teleport"
)

// handler answers at the control socket.
func (d *daemon) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", d.control.Handler())
	mux.Handle("GET /metrics", d.metrics())
	return mux
}

// metrics answers with Prometheus metrics.
func (d *daemon) metrics() http.Handler {
	return teleport.Metrics(d.images.Status, &d.connections, d.events)
}

// node is how Teleport fares on this machine.
type node struct {
	Kernel string `json:"kernel"` // release, as uname -r prints it
	Source string `json:"source"` // who speaks with file servers: kernel or userspace

	disks.Status
	NotTeleported []mount.NotStreamed `json:"notTeleported"` // images whose last pull went the ordinary way, by reference

	Credentials []credentials.Status `json:"credentials,omitempty"` // who the machine is to registries
	Registries  []hosts.Problem      `json:"registries,omitempty"`
}

// describe is what clients are told of this machine.
func (d *daemon) describe(ctx context.Context) any {
	n := d.known
	n.Status = d.images.Status(ctx)
	n.NotTeleported = disks.NotTeleported(n.Pulls)
	n.Credentials = d.creds.Status()
	n.Registries = d.hosts.Problems()
	return n
}
