package main

import (
	"log/slog"
	"strings"

	"sluice/internal/node/attribution"
	"sluice/internal/node/cri"
	"sluice/internal/node/disks"
	"sluice/internal/node/happening"
	"sluice/oci"
)

// nodeEvents makes events of what happens to images, and keeps them.
type nodeEvents struct {
	*attribution.Attributor
	namespace string // containerd's; "": all
	kept      *happening.Log
	runtime   *cri.Runtime // nil: nobody knows which pod a container belongs to
}

// openEvents makes a daemon's. The caller closes them.
func (d *daemon) openEvents() (*nodeEvents, error) {
	e := &nodeEvents{namespace: d.config.namespace, kept: happening.NewLog(happening.Capacity)}
	o := attribution.Options{Events: e.kept, Images: d.images, Remedy: disks.Remedy, Log: d.log}
	if socket := d.config.credentials.cri; socket != "" {
		var err error
		if e.runtime, err = cri.NewRuntime(socket); err != nil {
			return nil, err
		}
		o.Containers = e.runtime
	}
	e.Attributor = attribution.New(o)
	return e, nil
}

// Created implements snapshot.Observer: containers of other namespaces aren't told
// of.
func (e *nodeEvents) Created(key string, image oci.Digest) {
	if namespace, _, _ := strings.Cut(key, "/"); e.namespace == "" || namespace == e.namespace {
		e.Attributor.Created(key, image)
	}
}

func (e *nodeEvents) close(log *slog.Logger) {
	if e.runtime == nil {
		return
	}
	if err := e.runtime.Close(); err != nil {
		log.Warn("close the connection to containerd's CRI", "error", err)
	}
}
