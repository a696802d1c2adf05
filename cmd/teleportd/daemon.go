package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"sluice/internal/background"
	"sluice/internal/blob"
	"sluice/internal/node/cache"
	"sluice/internal/node/credentials"
	"sluice/internal/node/disks"
	"sluice/internal/node/disks/control"
	"sluice/internal/node/happening"
	"sluice/internal/node/hosts"
	"sluice/internal/node/plane/fuse"
	"sluice/internal/node/pulled"
	"sluice/internal/node/serve"
	"sluice/internal/node/smb"
	"sluice/internal/remote"
	"sluice/oci"
)

// daemon is the parts of a running teleportd.
type daemon struct {
	config      config
	log         *slog.Logger
	cache       *cache.Cache
	plane       *fuse.Plane // nil where the kernel can't
	creds       *credentials.Chain
	passed      *credentials.Passed // by kubelet; nil: it isn't listened to
	work        *background.Work    // that renews credentials
	hosts       *hosts.Hosts
	images      *disks.Manager
	connections smb.Tally // with file servers
	unusable    []string  // why the kernel can't
	known       node      // what doesn't change

	ordinary *pulled.Store // images that orca has and that aren't teleported
	events   *happening.Log
	control  *control.Server
}

// runDaemon runs the daemon until ctx ends.
func runDaemon(ctx context.Context, c config) error {
	log, err := c.newLog(os.Stderr)
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("teleportd mounts file systems: run it as root")
	}
	if err := c.makeDirs(); err != nil {
		return err
	}
	return serve.Until(ctx, log, func(ctx context.Context) error { return runOnce(ctx, c, log) })
}

// runOnce runs the daemon until ctx ends or the plane is lost.
func runOnce(ctx context.Context, c config, log *slog.Logger) (err error) {
	d, err := openDaemon(ctx, c, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	if c.standalone {
		return d.serveStandalone(ctx)
	}
	return d.serve(ctx)
}

// openDaemon opens state and plane and goes on with what is mounted.
func openDaemon(ctx context.Context, c config, log *slog.Logger) (_ *daemon, err error) {
	d := &daemon{config: c, log: log, work: background.New(), events: happening.NewLog(happening.Capacity)}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.close())
		}
	}()
	d.cache, err = cache.Open(ctx, cache.Options{Dir: filepath.Join(c.root, "cache"), Quota: c.quota, Free: c.free, FaultTimeout: c.read, Log: log})
	if err != nil {
		return nil, err
	}
	d.creds, d.passed = c.credentials.open(c.run, c.plainHTTP, log)
	d.work.Go(d.creds.Run)
	d.hosts = hosts.Open(hosts.Options{Dirs: c.hostsDirs, PlainHTTP: c.plainHTTP, Credentials: d.creds.For, Log: log})
	images, mode, err := d.openPlane(ctx)
	if err != nil {
		return nil, err
	}
	share, err := d.shares()
	if err != nil {
		return nil, err
	}
	d.images, err = disks.Open(ctx, disks.Options{
		Root: c.root, Cache: d.cache, Plane: images, Registry: d.itself, Share: share, Region: c.region,
		Identity: d.creds.Version, Decide: c.decide, Remember: c.recheck, Retry: c.retry(), Log: log,
	})
	if err != nil {
		return nil, err
	}
	d.ordinary, err = pulled.Open(ctx, pulled.Options{Root: filepath.Join(c.root, "pulled"), Registry: d.registry, Mode: mode, Log: log})
	if err != nil {
		return nil, err
	}
	d.control, err = control.Open(ctx, control.Options{
		Root: filepath.Join(c.root, "claims"), Teleport: d.images, Ordinary: d.ordinary, Events: d.events,
		Info: control.Info{Root: c.root, Standalone: c.standalone, Snapshotter: c.snapshotter(), Unusable: d.unusable}, Node: d.describe, Log: log,
	})
	return d, err
}

// itself is the registry that has a repository, not a mirror of it.
func (d *daemon) itself(host, repository string) (*remote.Registry, error) {
	r, err := d.hosts.Registry(host, repository)
	if err != nil {
		return nil, err
	}
	return r.Itself(), nil
}

// registry is where a repository's images are pulled from the ordinary way.
func (d *daemon) registry(host, repository string) (oci.Registry, error) {
	return d.itself(host, repository)
}

// retry is the patience with the file server: one that is away is asked again and
// again for as long as a read may wait, so that its restart is seen by nobody.
func (c *config) retry() blob.RetryOptions {
	const pause = time.Second
	stall := min(c.read/4, 10*time.Second)
	return blob.RetryOptions{
		FirstByte: stall, Idle: stall, MaxBackoff: pause,
		Attempts: 5 + int(2*c.read/pause), // pauses are up to a half shorter
	}
}

// close ends the daemon's part; mounts stay.
func (d *daemon) close() error {
	var errs []error
	if d.control != nil {
		d.control.Close()
	}
	if d.ordinary != nil {
		errs = append(errs, d.ordinary.Close())
	}
	if d.plane != nil { // before what it reads from: reads under way are left to the next process
		errs = append(errs, d.plane.Close())
	}
	if d.images != nil {
		errs = append(errs, d.images.Close())
	}
	if d.cache != nil {
		errs = append(errs, d.cache.Close())
	}
	if d.hosts != nil {
		d.hosts.Close()
	}
	d.work.Stop()
	return errors.Join(errs...)
}

// serve answers containerd, kubelet and control clients.
func (d *daemon) serve(ctx context.Context) error {
	front, err := serve.Listen(ctx, serve.Options{
		Root: d.config.root, Run: d.config.run, Images: d.images,
		Events: d.events, Namespace: d.config.namespace, Remedy: disks.Remedy,
		Containerd: d.config.credentials.cri, Passed: d.passed, References: d.references,
		Metrics: d.config.metrics, Log: d.log,
	})
	if err != nil {
		return err
	}
	return front.Serve(ctx, d.handler(), d.metrics(), d.lost())
}

// references are the images on the node.
func (d *daemon) references(ctx context.Context) (all []string) {
	for _, i := range d.images.Status(ctx).Images {
		all = append(all, i.Reference)
	}
	return all
}
