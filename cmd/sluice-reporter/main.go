// Command sluice-reporter tells a Kubernetes API server what happens to pods'
// images on a node: it follows the events of the machine's `sluice node`, or of
// teleportd, and makes Events, pod conditions and the node's label of them. Package
// internal/kube is what it does; here are its flags and the wiring.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"

	"sluice/cmd/internal/program"
	"sluice/internal/kube"
	"sluice/internal/kube/apiserver"
	teleport "sluice/internal/node/disks/control"
	"sluice/internal/node/mount/control"
)

// memory is how much the heap may take before it's collected as often as need
// be, in bytes: with the program itself that is less than 40 MB.
const memory = 24 << 20

func main() {
	debug.SetMemoryLimit(memory)
	program.Main(newCommand())
}

// flags are the command's flags.
type flags struct {
	daemon                                  string // whose events are told
	node, socket, kubeconfig, state, health string
	label, optOut                           string
	grace                                   time.Duration
	rate                                    float64
	burst                                   int
	logFormat                               string
	verbose                                 bool
}

// newCommand returns the command.
func newCommand() *cobra.Command {
	var f flags
	cmd := &cobra.Command{
		Use:   "sluice-reporter",
		Short: "Tell Kubernetes which images stream on this node, and why others don't",
		Long: `Follows the events of this machine's sluice node and tells the Kubernetes API server:
Events and the condition ` + kube.ConditionType + ` on pods whose images are streamed,
or should be, and a label on the node while it streams. With --for teleport, those of
teleportd: Events on pods, and a label on the node.`,
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       program.Version(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			f.choose(cmd.Flags().Changed)
			if err := f.check(); err != nil {
				return err
			}
			log, err := f.open(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			cluster, err := apiserver.Open(f.kubeconfig, "sluice-reporter")
			if err != nil {
				return err
			}
			return errors.Join(f.run(cmd.Context(), cluster, log), cluster.Close())
		},
	}
	cmd.SetVersionTemplate("sluice-reporter {{.Version}}\n")
	f.register(cmd)
	cmd.AddCommand(newUnlabelCommand())
	return cmd
}

func (f *flags) register(cmd *cobra.Command) {
	s := cmd.Flags()
	f.registerNode(cmd)
	s.StringVar(&f.socket, "control-socket", "", "`SOCKET` at which the daemon answers (default:\n"+nodeSocket+"\nor "+teleportSocket+")")
	s.StringVar(&f.state, "state", "", "`FILE` for what was reported, which a restarted reporter\ndoesn't tell again; such as /run/sluice/reporter.json")
	s.StringVar(&f.optOut, "opt-out-label", kube.DefaultOptOutLabel, "the node's label `KEY` that switches streaming off\nif it's \"false\"; empty: none")
	s.DurationVar(&f.grace, "label-grace", kube.DefaultGrace, "`TIME` that sluice node may be away without the node\nlosing its label")
	s.Float64Var(&f.rate, "api-rate", kube.DefaultRate, "`N` requests in a second to the API server at most")
	s.IntVar(&f.burst, "api-burst", kube.DefaultBurst, "`N` requests at once after a pause")
	s.StringVar(&f.health, "health-listen", "", "`ADDRESS` for GET /healthz and /readyz, such as :9798;\nempty: none")
	s.StringVar(&f.logFormat, "log-format", "text", "text, or json: one object a line")
	s.BoolVar(&f.verbose, "verbose", false, "log what goes well, too")
}

// registerNode registers the flags that name the node and its cluster.
func (f *flags) registerNode(cmd *cobra.Command) {
	s := cmd.Flags()
	s.StringVar(&f.node, "node", os.Getenv("NODE_NAME"), "this node's `NAME` in the cluster\n(default: environment variable NODE_NAME)")
	s.Lookup("node").DefValue = ""
	s.StringVar(&f.kubeconfig, "kubeconfig", "", "`FILE` that says where the API server is and who asks\n(default: the pod's service account)")
	s.StringVar(&f.daemon, "for", forStreaming, "which `DAEMON` is reported of: "+forStreaming+" (sluice node)\nor "+forTeleport+" (teleportd)\n")
	s.StringVar(&f.label, "node-label", "", "label `KEY` that the node has, \"true\", while the daemon\nworks; empty: none (default:\n"+kube.Streaming().Label+"\nor "+kube.Teleport().Label+")")
}

// The values of --for, and where these daemons answer.
const (
	forStreaming = "streaming"
	forTeleport  = "teleport"

	nodeSocket     = "/run/sluice/control.sock"
	teleportSocket = "/run/teleportd/control.sock"
)

// feature is what the daemon does.
func (f *flags) feature() kube.Feature {
	if f.daemon == forTeleport {
		return kube.Teleport()
	}
	return kube.Streaming()
}

// choose sets what follows from --for where it wasn't said.
func (f *flags) choose(said func(flag string) bool) {
	teleport := f.daemon == forTeleport
	if !said("control-socket") {
		f.socket = nodeSocket
		if teleport {
			f.socket = teleportSocket
		}
	}
	if !said("node-label") {
		f.label = f.feature().Label
	}
	if !said("opt-out-label") && teleport {
		f.optOut = ""
	}
}

// client returns the daemon.
func (f *flags) client() kube.Daemon {
	if f.daemon == forTeleport {
		return teleportDaemon{teleport.NewClient(f.socket)}
	}
	return daemon{control.NewClient(f.socket)}
}

// checkDaemon says what is wrong with --for.
func (f *flags) checkDaemon() error {
	if f.daemon != forStreaming && f.daemon != forTeleport {
		return fmt.Errorf("--for %s: it's %s or %s", f.daemon, forStreaming, forTeleport)
	}
	return nil
}

// checkNode says what is wrong with the flags of registerNode.
func (f *flags) checkNode() error {
	if f.node == "" {
		return errors.New(`which node is this? Set NODE_NAME, in a DaemonSet by
  env: [{name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}]
or use --node`)
	}
	return nil
}

// check says what is wrong with the flags.
func (f *flags) check() error {
	if err := f.checkDaemon(); err != nil {
		return err
	}
	switch {
	case f.daemon == forTeleport && f.optOut != "":
		return errors.New("--opt-out-label: teleportd can't be switched off by a label of the node")
	case !(f.rate > 0): // nor is it NaN
		return fmt.Errorf("--api-rate %v: at least a little more than 0", f.rate)
	case f.burst < 1:
		return fmt.Errorf("--api-burst %d: at least 1", f.burst)
	case f.grace < 0:
		return fmt.Errorf("--label-grace %v: 0 or more", f.grace)
	case f.label != "" && f.label == f.optOut:
		return fmt.Errorf("--node-label and --opt-out-label are both %s: what the reporter says and what it's told need labels of their own", f.label)
	}
	return f.checkNode()
}

// open returns the log.
func (f *flags) open(w io.Writer) (*slog.Logger, error) {
	opts := &slog.HandlerOptions{}
	if f.verbose {
		opts.Level = slog.LevelDebug
	}
	switch f.logFormat {
	case "text":
		return slog.New(slog.NewTextHandler(w, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	}
	return nil, fmt.Errorf("--log-format %s: it's text or json", f.logFormat)
}

// run reports until ctx ends.
func (f *flags) run(ctx context.Context, cluster kube.Cluster, log *slog.Logger) error {
	reporter := kube.New(kube.Options{
		Cluster: cluster, Daemon: f.client(), Feature: f.feature(), Node: f.node, State: f.state,
		Label: f.label, OptOutLabel: f.optOut, Grace: f.grace, Rate: f.rate, Burst: f.burst, Log: log,
	})
	stop, err := serveHealth(f.health, reporter.Ready, log)
	if err != nil {
		return err
	}
	defer stop()
	log.Info("reporting", "node", f.node, "socket", f.socket, "version", program.Version())
	err = reporter.Run(ctx)
	log.Info("ended", "error", err)
	return err
}

// newUnlabelCommand returns the verb that a node is uninstalled with.
func newUnlabelCommand() *cobra.Command {
	var f flags
	cmd := &cobra.Command{
		Use:   "unlabel",
		Short: "Take the label away that says that this node streams",
		Long: `Takes the node's label away, as must be done when Sluice is removed from it: a reporter
that ends leaves it, because the next one of a rolling update is about to come.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			f.choose(cmd.Flags().Changed)
			if err := errors.Join(f.checkDaemon(), f.checkNode()); err != nil {
				return err
			}
			if f.label == "" {
				return errors.New("--node-label is empty: which one is to be taken away?")
			}
			cluster, err := apiserver.Open(f.kubeconfig, "sluice-reporter")
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), 30*time.Second)
			defer cancel()
			return errors.Join(cluster.SetNodeLabel(ctx, f.node, f.label, nil), cluster.Close())
		},
	}
	f.registerNode(cmd)
	return cmd
}
