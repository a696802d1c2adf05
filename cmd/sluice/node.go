package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"sluice/internal/background"
	"sluice/internal/blob"
	"sluice/internal/node/cache"
	"sluice/internal/node/credentials"
	"sluice/internal/node/happening"
	"sluice/internal/node/hosts"
	"sluice/internal/node/mount"
	"sluice/internal/node/mount/control"
	"sluice/internal/node/plane/fanotify"
	"sluice/internal/node/plane/fuse"
	"sluice/internal/node/serve"
	"sluice/internal/node/timeline"
)

// nodeConfig is the flags of `sluice node`.
type nodeConfig struct {
	root, run     string
	quota, free   cache.Space
	low           float64
	fill          int64
	noFill        bool
	disabled      bool
	from          []string
	registries    registriesConfig
	mountOptions  []string
	plane         string
	remapIDs      bool
	standalone    bool
	report        reportConfig
	decide, fetch time.Duration
	read, recheck time.Duration
	credentials   credentialConfig
	events        eventsConfig
}

// The directories of the machine's node daemon, and of the one that `sluice
// mount` and `sluice run` start when there's none.
const (
	nodeRoot       = "/var/lib/sluice"
	nodeRun        = "/run/sluice"
	standaloneRoot = nodeRoot + "/standalone"
)

func newNodeCommand() *cobra.Command {
	var c nodeConfig
	cmd := &cobra.Command{
		Use:   "node",
		Short: "Stream images on this machine: containerd's snapshotter",
		Long: `Stream images on this machine: containerd's snapshotter.

In containerd's config.toml:

  [proxy_plugins.sluice]
    type = "snapshot"
    address = "/run/sluice/snapshotter.sock"
    [proxy_plugins.sluice.exports]
      root = "/var/lib/sluice"
      enable_remote_snapshot_annotations = "true"
  [[plugins."io.containerd.transfer.v1.local".unpack_config]]
    platform = "linux"
    snapshotter = "sluice"

The daemon may be stopped, killed and updated while containers run: their
reads wait for the next one.`,
		Args: arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := c.checkPlane(); err != nil {
				return err
			}
			return runNode(cmd.Context(), c)
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.root, "root", nodeRoot, "`DIR` of images and content; not on overlayfs\n")
	f.StringVar(&c.run, "run", "", "`DIR` of sockets, on a tmpfs (default\n"+nodeRun+"; for another --root one beneath it)")
	c.registerCache(f)
	f.Int64Var(&c.fill, "fill-bandwidth", 0, "`BYTES` per second for content that nobody waits\nfor; 0: no limit")
	f.BoolVar(&c.noFill, "no-fill", false, "fetch content only when it is read")
	f.StringArrayVar(&c.from, "from", nil, "stream only from registry `HOST`, or HOST:PORT; may\nbe repeated; images of others are pulled the\nordinary way (default: any)")
	f.BoolVar(&c.disabled, "disable-streaming", false, "pull new images the ordinary way")
	c.registries.register(f)
	c.credentials.register(f)
	c.events.register(f)
	f.StringArrayVar(&c.mountOptions, "overlay-option", nil, "`OPTION` of overlayfs mounts; may be repeated")
	f.BoolVar(&c.remapIDs, "remap-ids", false, "map IDs of user namespaces; give containerd's\nproxy plugin the capability \"remap-ids\", too")
	c.registerPlane(f)
	f.DurationVar(&c.decide, "decide-timeout", 10*time.Second, "look `TIME` long for a streaming artifact, then\npull the ordinary way")
	f.DurationVar(&c.fetch, "fetch-timeout", time.Minute, "`TIME` that an artifact's metadata may take\n")
	f.DurationVar(&c.read, "read-timeout", time.Minute, "`TIME` that a read of a container waits for content\nbefore it fails with EIO")
	f.DurationVar(&c.recheck, "recheck", time.Minute, "`TIME` after which an image that didn't stream is\nlooked up again")
	c.report.register(f)
	f.BoolVar(&c.standalone, "standalone", false, "no snapshotter; end with the last mount")
	cmd.Flag("standalone").Hidden = true
	cmd.AddCommand(newHolderCommand(), newNodeStatusCommand(), newNodeTraceCommand(), newNodeEventsCommand(), newNodeUninstallCommand(), newNodeInstallCommand(), newSuperviseCommand(), newLaunchCommand(),
		newNodeDiskUsageCommand(), newNodePruneCommand(), newNodePinCommand(true), newNodePinCommand(false), newStayCommand())
	return cmd
}

// newHolderCommand is the process that keeps a plane's connection with the
// kernel.
func newHolderCommand() *cobra.Command {
	kind := planeFUSE
	cmd := &cobra.Command{
		Use:    "holder SOCKET",
		Short:  "Keep a daemon's connection with the kernel while the daemon restarts",
		Hidden: true,
		Args:   arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if kind == planeFanotify {
				return fanotify.RunHolder(cmd.Context(), args[0])
			}
			return fuse.RunHolder(cmd.Context(), args[0])
		},
	}
	cmd.Flags().StringVar(&kind, "plane", kind, "`HOW` the daemon is connected")
	return cmd
}

// runLink, in a daemon's root, points to the directory of its sockets.
const runLink = "sockets"

// runDir is where a daemon with its state in root has its sockets: where it
// said, or where it will if it isn't told otherwise.
func runDir(root string) string {
	if dir, err := os.Readlink(filepath.Join(root, runLink)); err == nil {
		return dir
	}
	if root == nodeRoot {
		return nodeRun
	}
	sum := sha256.Sum256([]byte(root))
	return filepath.Join(nodeRun, fmt.Sprintf("root-%x", sum[:6]))
}

// daemon is the parts of a running node daemon.
type daemon struct {
	config nodeConfig
	log    *slog.Logger
	cache  *cache.Cache
	self   string      // this program's file
	plane  servedPlane // nil where the kernel can't
	creds  *credentials.Chain
	passed *credentials.Passed // by kubelet; nil: it isn't listened to
	work   *background.Work    // that renews credentials
	hosts  *hosts.Hosts
	images *mount.Manager
	info   control.Info

	recorder timeline.Recorder        // the last starts
	traces   *sdktrace.TracerProvider // makes their spans
}

// runNode runs the daemon until ctx ends.
func runNode(ctx context.Context, c nodeConfig) error {
	log, err := c.report.newLog(os.Stderr)
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("the node daemon mounts file systems: run it as root")
	}
	if err := c.makeDirs(); err != nil {
		return err
	}
	return serve.Until(ctx, log, func(ctx context.Context) error { return runDaemon(ctx, c, log) })
}

// runDaemon runs the daemon until ctx ends or the plane is lost.
func runDaemon(ctx context.Context, c nodeConfig, log *slog.Logger) (err error) {
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

// retry is the patience with a registry: there must be time for another attempt
// before a read gives up.
func (c *nodeConfig) retry() blob.RetryOptions {
	stall := min(c.read/4, 10*time.Second)
	return blob.RetryOptions{FirstByte: stall, Idle: stall}
}

// makeDirs makes the daemon's directories.
func (c *nodeConfig) makeDirs() (err error) {
	if c.root, err = filepath.Abs(c.root); err != nil {
		return err
	}
	if c.run == "" {
		c.run = runDir(c.root)
	}
	if c.run, err = filepath.Abs(c.run); err != nil {
		return err
	}
	for _, dir := range []string{c.root, c.run} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return err
		}
	}
	link := filepath.Join(c.root, runLink)
	if have, err := os.Readlink(link); err == nil && have == c.run {
		return nil
	}
	if err := os.Remove(link); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return os.Symlink(c.run, link)
}

// openDaemon opens state and plane and goes on with what is mounted.
func openDaemon(ctx context.Context, c nodeConfig, log *slog.Logger) (_ *daemon, err error) {
	d := &daemon{config: c, log: log, work: background.New(), info: control.Info{Root: c.root, Standalone: c.standalone}}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.close())
		}
	}()
	d.cache, err = cache.Open(ctx, cache.Options{Dir: filepath.Join(c.root, "cache"), Quota: c.quota, Free: c.free, Low: c.low, FillBandwidth: c.fill, FaultTimeout: c.read, Log: log})
	if err != nil {
		return nil, err
	}
	d.creds, d.passed = c.credentials.open(c.run, c.registries.plainHTTP, log)
	d.work.Go(d.creds.Run)
	d.hosts = c.registries.open(d.creds.For, log)
	d.info.Credentials, d.info.Registries = d.creds.Status, registryProblems(d.hosts)
	images, err := d.openPlane(ctx)
	if err != nil {
		return nil, err
	}
	if d.traces, err = newTraces(ctx, "sluice-node", c.report.traces, &d.recorder); err != nil {
		return nil, fmt.Errorf("--traces-endpoint: %w", err)
	}
	options := mount.Options{
		Root: c.root, Cache: d.cache, Plane: images, PlaneName: d.info.Plane.Name, Registry: readRegistries(d.hosts),
		Decide: c.decide, Fetch: c.fetch, Remember: c.recheck, Identity: d.creds.Version, Retry: c.retry(), Disabled: c.disabled, From: c.from, NoFill: c.noFill,
		Conversion: askConversion(d.hosts), Tracer: d.traces.Tracer("sluice/internal/node/mount"), Log: log,
	}
	if c.standalone {
		options.Linger = 30 * 24 * time.Hour // nobody else remembers which images are wanted
	}
	d.images, err = mount.Open(ctx, options)
	return d, err
}

// flushTime bounds how long the daemon's end waits for traces to be sent.
const flushTime = 2 * time.Second

// close ends the daemon's part; mounts stay.
func (d *daemon) close() error {
	var errs []error
	if d.plane != nil { // before what it reads from: reads under way are left to the next process
		errs = append(errs, d.plane.Close())
	}
	if d.images != nil {
		errs = append(errs, d.images.Close())
	}
	if d.traces != nil {
		// What can't be sent by then is lost.
		ctx, cancel := context.WithTimeout(context.Background(), flushTime)
		defer cancel()
		if err := d.traces.Shutdown(ctx); err != nil {
			d.log.Warn("the last traces weren't sent", "error", err)
		}
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
	d.info.Events = happening.NewLog(happening.Capacity)
	front, err := serve.Listen(ctx, serve.Options{
		Root: d.config.root, Run: d.config.run, Images: d.images,
		Events: d.info.Events, OptOut: d.config.events.optOut,
		Containerd: d.config.credentials.cri, Passed: d.passed, References: d.references,
		MountOptions: d.config.mountOptions, RemapIDs: d.config.remapIDs,
		Metrics: d.config.report.metrics, Log: d.log,
	})
	if err != nil {
		return err
	}
	d.info.Snapshotter = serve.Snapshotter(d.config.run)
	if address := front.Metrics(); address != "" {
		d.info.Metrics = "http://" + address + "/metrics"
	}
	return front.Serve(ctx, d.controlHandler(), d.metricsHandler(), d.lost())
}

// references are the images on the node.
func (d *daemon) references(ctx context.Context) (all []string) {
	for _, i := range d.images.Status(ctx).Images {
		all = append(all, i.Reference)
	}
	return all
}
