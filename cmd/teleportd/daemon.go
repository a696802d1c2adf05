package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"sluice/internal/blob"
	"sluice/internal/node/cache"
	"sluice/internal/node/disks"
	"sluice/internal/node/disks/control"
	"sluice/internal/node/endpoint"
	"sluice/internal/node/hosts"
	"sluice/internal/node/plane/fuse"
	"sluice/internal/node/pulled"
	"sluice/internal/node/smb"
	"sluice/internal/node/snapshot"
	"sluice/internal/remote"
	"sluice/oci"
)

// daemon is the parts of a running teleportd.
type daemon struct {
	config      config
	log         *slog.Logger
	cache       *cache.Cache
	plane       *fuse.Plane // nil where the kernel can't
	creds       *nodeCredentials
	hosts       *hosts.Hosts
	images      *disks.Manager
	connections smb.Tally // with file servers
	unusable    []string  // why the kernel can't
	known       node      // what doesn't change

	ordinary *pulled.Store // images that orca has and that aren't teleported
	events   *nodeEvents
	control  *control.Server
}

// errLost ends a daemon whose FUSE mount was taken away. The next one makes a new
// one.
var errLost = errors.New("the FUSE connection is lost: somebody unmounted or aborted it")

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
	for {
		err := runOnce(ctx, c, log)
		if !errors.Is(err, errLost) || ctx.Err() != nil {
			return err
		}
		log.Error("starting anew with fresh mounts; containers that run have lost their images and must be restarted", "error", err)
	}
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
	d := &daemon{config: c, log: log}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.close())
		}
	}()
	d.cache, err = cache.Open(ctx, cache.Options{Dir: filepath.Join(c.root, "cache"), Quota: c.quota, Free: c.free, FaultTimeout: c.read, Log: log})
	if err != nil {
		return nil, err
	}
	d.creds = c.credentials.open(c.run, c.plainHTTP, log)
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
	if d.events, err = d.openEvents(); err != nil {
		return nil, err
	}
	d.control, err = control.Open(ctx, control.Options{
		Root: filepath.Join(c.root, "claims"), Teleport: d.images, Ordinary: d.ordinary, Events: d.events.kept,
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
	if d.events != nil {
		d.events.close(d.log)
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
	if d.creds != nil {
		d.creds.close()
	}
	return errors.Join(errs...)
}

// listeners are where the daemon answers.
type listeners struct{ snapshots, controls, kubelet, metrics net.Listener }

// listen listens everywhere, or nowhere.
func (d *daemon) listen(ctx context.Context) (l listeners, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, l.close())
		}
	}()
	if l.kubelet, err = d.listenCRI(); err != nil {
		return l, err
	}
	if l.metrics, err = d.listenMetrics(ctx); err != nil {
		return l, err
	}
	if l.controls, err = endpoint.Listen(controlSocket(d.config.run)); err != nil {
		return l, err
	}
	l.snapshots, err = endpoint.Listen(d.config.snapshotter()) // the last: who waits for it finds the others
	return l, err
}

// address is where metrics are served, "" if nowhere but at the control socket.
func (l listeners) address() string {
	if l.metrics == nil {
		return ""
	}
	return l.metrics.Addr().String()
}

func (l listeners) close() error {
	var errs []error
	for _, one := range []net.Listener{l.snapshots, l.controls, l.kubelet, l.metrics} {
		if one != nil {
			errs = append(errs, one.Close())
		}
	}
	return errors.Join(errs...)
}

// listenMetrics listens where --metrics says; nil without it.
func (d *daemon) listenMetrics(ctx context.Context) (net.Listener, error) {
	if d.config.metrics == "" {
		return nil, nil
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", d.config.metrics)
	if err != nil {
		return nil, fmt.Errorf("--metrics: %w", err)
	}
	return l, nil
}

// serve answers containerd and control clients.
func (d *daemon) serve(ctx context.Context) error {
	sn, err := snapshot.Open(ctx, snapshot.Options{Root: d.config.root, Images: d.images, Observer: d.events, Log: d.log})
	if err != nil {
		return err
	}
	defer func() {
		if err := sn.Close(); err != nil {
			d.log.Error("close the snapshotter", "error", err)
		}
	}()
	d.images.Settled()
	l, err := d.listen(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(ctx, d.events.kept.Close)() // who follows isn't waited for
	var wg sync.WaitGroup
	wg.Go(func() { d.events.Run(ctx) })
	wg.Go(func() { cancel(snapshot.Serve(ctx, l.snapshots, sn)) })
	wg.Go(func() { cancel(endpoint.Serve(ctx, l.controls, d.handler())) })
	if l.kubelet != nil {
		wg.Go(func() { cancel(d.serveCRI(ctx, l.kubelet)) })
	}
	if l.metrics != nil {
		wg.Go(func() { cancel(endpoint.Serve(ctx, l.metrics, d.metrics())) })
	}
	wg.Go(func() { // what a crash left; containerd asks for it only when it has removed something
		if err := sn.Cleanup(ctx); err != nil {
			d.log.Warn("left-over directories of snapshots stay", "error", err)
		}
	})
	d.log.Info("ready", "snapshotter", d.config.snapshotter(), "metrics", l.address(), "root", d.config.root)
	select {
	case <-ctx.Done():
	case <-d.lost():
		cancel(errLost)
	}
	wg.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}
