package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"sluice/internal/node/cache"
	"sluice/internal/node/hosts"
	"sluice/internal/node/serve"
)

// The directories of the machine's teleportd.
const (
	defaultRoot = "/var/lib/teleportd"
	defaultRun  = "/run/teleportd"
)

// defaultMetrics is where --metrics without an address serves them.
const defaultMetrics = "127.0.0.1:9799"

// The values of --source.
const (
	sourceAuto      = "auto"
	sourceKernel    = "kernel"
	sourceUserspace = "userspace"
)

func sources() []string { return []string{sourceAuto, sourceKernel, sourceUserspace} }

// The values of --log.
const (
	logAuto    = "auto"
	logJournal = "journal"
	logStderr  = "stderr"
)

func logs() []string { return []string{logAuto, logJournal, logStderr} }

// config is the flags of the daemon.
type config struct {
	root, run    string
	quota, free  cache.Space
	hostsDirs    []string
	plainHTTP    []string
	credentials  credentialConfig
	source       string
	region       string
	decide, read time.Duration
	recheck      time.Duration
	namespace    string
	metrics      string // address; "": none
	log          string
	debug        bool
	standalone   bool
}

func (c *config) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&c.root, "root", defaultRoot, "`DIR` of images and content; not on overlayfs\n")
	f.StringVar(&c.run, "run", defaultRun, "`DIR` of sockets, on a tmpfs\n")
	f.TextVar(&c.quota, "cache-quota", cache.Space{}, "`SPACE` that content may take, as 50GiB or 30% of the\ndisk; 0: as much as --cache-free leaves")
	f.TextVar(&c.free, "cache-free", cache.Space{Percent: 17}, "`SPACE` of the disk that stays free: when less is,\ndisks that nobody uses are evicted; 0: none")
	f.StringArrayVar(&c.hostsDirs, "hosts-dir", filepath.SplitList(hosts.DefaultDirs), "`DIR` of hosts.toml files and certificates, as\ncontainerd's config_path; may be repeated\n")
	f.StringArrayVar(&c.plainHTTP, "plain-http", nil, "speak HTTP without TLS with registry `HOST`; may\nbe repeated (loopback is by itself)")
	c.credentials.register(f)
	f.StringVar(&c.source, "source", sourceAuto, "`WHO` speaks SMB with the file server: kernel (CIFS),\nuserspace, or auto: the kernel if it can")
	f.StringVar(&c.region, "region", "", "`NAME` of the region that this machine is in; the disks\nof another one aren't used (default: the registry's)")
	f.DurationVar(&c.decide, "decide-timeout", 10*time.Second, "ask `TIME` long where an image's disks are, then\npull the ordinary way")
	f.DurationVar(&c.read, "read-timeout", time.Minute, "`TIME` that a read of a container waits for content\nbefore it fails with EIO")
	f.DurationVar(&c.recheck, "recheck", time.Minute, "`TIME` after which the registry is asked again about\nan image that it had no disks of")
	f.StringVar(&c.namespace, "namespace", "k8s.io", "the `NAME` of the namespace of containerd's whose\ncontainers are told of in events; empty: all\n")
	f.StringVar(&c.metrics, "metrics", "", "serve Prometheus metrics at `ADDRESS`, to whoever asks;\nwithout one at "+defaultMetrics)
	f.Lookup("metrics").NoOptDefVal = defaultMetrics
	f.StringVar(&c.log, "log", logAuto, "log `WHERE`: journal, stderr, or auto: the journal if\nsystemd connected the program with it")
	f.BoolVar(&c.debug, "debug", false, "log what goes well, too")
	f.BoolVar(&c.standalone, "standalone", false, "no snapshotter; end with the last mount")
	f.Lookup("standalone").Hidden = true
	f.SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		if name == "aksconfig" { // as it was spelled in 2020
			name = "aksConfig"
		}
		return pflag.NormalizedName(name)
	})
	complete(cmd, "source", sources())
	complete(cmd, "log", logs())
}

// complete has the shell complete a flag's values.
func complete(cmd *cobra.Command, flag string, values []string) {
	if err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err) // there is no such flag: a mistake of the program
	}
}

// check says what is wrong with the flags.
func (c *config) check() error {
	switch c.metrics { // the original's flag is a bool
	case "true":
		c.metrics = defaultMetrics
	case "false":
		c.metrics = ""
	}
	switch {
	case !slices.Contains(sources(), c.source):
		return fmt.Errorf("--source %q: use one of %s", c.source, strings.Join(sources(), ", "))
	case !slices.Contains(logs(), c.log):
		return fmt.Errorf("--log %q: use one of %s", c.log, strings.Join(logs(), ", "))
	case c.decide <= 0 || c.read <= 0 || c.recheck <= 0:
		return errors.New("--decide-timeout, --read-timeout and --recheck are more than 0")
	}
	return nil
}

// snapshotter is where containerd asks; "" if nobody does.
func (c *config) snapshotter() string {
	if c.standalone {
		return ""
	}
	return serve.Snapshotter(c.run)
}

// makeDirs makes the daemon's directories.
func (c *config) makeDirs() (err error) {
	for _, dir := range []*string{&c.root, &c.run} {
		if *dir, err = filepath.Abs(*dir); err != nil {
			return err
		}
		if err := os.MkdirAll(*dir, 0o711); err != nil {
			return err
		}
	}
	return nil
}
