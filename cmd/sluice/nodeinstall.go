package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"sluice/internal/node/install"
	"sluice/internal/node/install/host"
)

// installFlags are the flags of `sluice node install`.
type installFlags struct {
	install.Options
	host, init         string
	from, registries   []string
	restart            string
	supervise, noStart bool
	dryRun             bool
	output             string
}

// installed is what sluice node install did, or with DryRun would.
type installed struct {
	DryRun bool `json:"dry_run"`
	*install.Plan
}

func newNodeInstallCommand() *cobra.Command {
	var f installFlags
	cmd := &cobra.Command{
		Use: "install [flags] [-- FLAG...]", DisableFlagsInUseLine: true,
		Short: "Install sluice node on this machine, and tell containerd",
		Long: `Install sluice node on this machine, and tell containerd.

It copies this program, makes a systemd unit that runs sluice node with the FLAGs
behind --, adds a drop-in to containerd's configuration (2.1 or newer), starts the
daemon, and, when that answers, restarts containerd. Running containers go on.
containerd itself checks the new configuration before it is in force; if it
doesn't start with it, the old one comes back.

The second time there is nothing to do. After an update of this program, or with
other FLAGs, what has changed is replaced. sluice node uninstall gives back what
was there before.`,
		Example: `  sluice node install --dry-run
  sluice node install
  sluice node install -- --from registry.example.com --cache-quota 80GiB
  sluice node install --registry registry.example.com:5000   # speaks plain HTTP
  sluice node install --host /host --supervise               # in a privileged pod`,
		Args: func(cmd *cobra.Command, args []string) error {
			if n := cmd.ArgsLenAtDash(); n > 0 || n < 0 && len(args) > 0 {
				return fmt.Errorf("unexpected %q: flags of sluice node come behind --\nusage: %s\nmore:  %s --help", args[0], cmd.UseLine(), cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(f.output); err != nil {
				return err
			}
			if os.Geteuid() != 0 {
				return errNotRoot
			}
			if err := f.complete(args); err != nil {
				return err
			}
			if live := f.host != "/" && host.Live(f.host); live {
				return host.Enter(f.host, withoutHost(os.Args[1:]))
			}
			return f.run(cmd.Context(), cmd.OutOrStdout())
		},
	}
	f.register(cmd)
	return cmd
}

func (f *installFlags) register(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.StringVar(&f.host, "host", "/", "the machine's file system is at `DIR`: in a pod with\nall privileges and hostPID. If nothing runs there, as\nin an image of a machine, nothing is started")
	fs.StringArrayVar(&f.from, "from", nil, "stream only from registry `HOST`; may be repeated")
	fs.StringArrayVar(&f.registries, "registry", nil, "write a hosts.toml for the registry `HOST[=URL]`: it\nspeaks HTTP without TLS, or is at URL; may be\nrepeated; a file that is there stays")
	fs.BoolVar(&f.ReplaceSnapshotter, "replace-snapshotter", false, "take the place of another snapshotter that is the\nCRI's default")
	fs.BoolVar(&f.Kubelet, "kubelet", false, "send kubelet's image service through the daemon, so\nthat it has the credentials of pulls; kubelet can't\npull while the daemon is down")
	fs.StringVar(&f.KubeletConfigDir, "kubelet-config-dir", "", "kubelet's --config-dir is `DIR` (default: what the\nkubelet that runs was told)")
	fs.StringVar(&f.KubeletUnit, "kubelet-unit", "kubelet.service", "`NAME` of kubelet's systemd unit\n")
	fs.StringVar(&f.BinDir, "bin-dir", "/usr/local/bin", "put the program into `DIR`\n")
	fs.StringVar(&f.ContainerdConfig, "containerd-config", "/etc/containerd/config.toml", "containerd's main configuration `FILE`\n")
	fs.StringVar(&f.ContainerdBinary, "containerd-binary", "", "containerd's program is `FILE` (default: searched)")
	fs.StringVar(&f.ContainerdSocket, "containerd", "/run/containerd/containerd.sock", "containerd's `SOCKET`\n")
	fs.StringVar(&f.ContainerdUnit, "containerd-unit", "containerd.service", "`NAME` of containerd's systemd unit\n")
	fs.StringVar(&f.restart, "restart-command", "", "without systemd, restart containerd with the shell\n`COMMAND` (default: say that it must be restarted)")
	fs.StringVar(&f.init, "init", "auto", "`WHAT` starts daemons: systemd, none, or auto")
	fs.BoolVar(&f.supervise, "supervise", false, "don't end: without systemd, run the daemon and start\nit again when it ends. It survives this process")
	fs.BoolVar(&f.noStart, "no-start", false, "only write files, start nothing")
	fs.BoolVar(&f.dryRun, "dry-run", false, "only say what would be done")
	registerOutput(cmd, &f.output)
	complete(cmd, "init", "auto", "systemd", "none")
}

// complete makes Options of the flags. flags are those of sluice node.
func (f *installFlags) complete(flags []string) (err error) {
	for _, from := range f.from {
		flags = append(flags, "--from", from)
	}
	node := newNodeCommand()
	if err := node.ParseFlags(flags); err != nil {
		return fmt.Errorf("flags of sluice node: %w", err)
	}
	if rest := node.Flags().Args(); len(rest) > 0 {
		return fmt.Errorf("flags of sluice node: unexpected %q", rest[0])
	}
	if f.Kubelet && !node.Flags().Changed("cri-socket") {
		flags = append(flags, "--cri-socket", f.ContainerdSocket)
	}
	f.Flags = flags
	f.State, _ = node.Flags().GetString("root")
	if f.Sockets, _ = node.Flags().GetString("run"); f.Sockets == "" {
		f.Sockets = runDir(f.State)
	}
	for _, r := range f.registries {
		registry, err := install.ParseRegistry(r)
		if err != nil {
			return fmt.Errorf("--registry: %w", err)
		}
		f.Registries = append(f.Registries, registry)
	}
	f.Root, f.Program = f.host, "/proc/self/exe"
	switch install.Init(f.init) {
	case "auto":
		f.Init = install.NoInit
		if host.HasSystemd(f.Root) || f.Root != "/" && !host.Live(f.Root) {
			f.Init = install.Systemd
		}
	case install.Systemd, install.NoInit:
		f.Init = install.Init(f.init)
	default:
		return fmt.Errorf("--init %q: use auto, systemd or none", f.init)
	}
	return nil
}

// withoutHost removes --host from arguments: on the machine it's not needed.
func withoutHost(args []string) []string {
	var rest []string
	for i := 0; i < len(args); i++ {
		switch {
		case args[i] == "--":
			return append(rest, args[i:]...)
		case args[i] == "--host":
			i++
		case !strings.HasPrefix(args[i], "--host="):
			rest = append(rest, args[i])
		}
	}
	return rest
}

// run is all of it: plan, change, start.
func (f *installFlags) run(ctx context.Context, out io.Writer) error {
	p, err := install.MakePlan(ctx, f.Options)
	if err != nil {
		return err
	}
	if f.Root != "/" {
		f.noStart = true
		p.Notes = append(p.Notes, fmt.Sprintf("nothing runs at %s: on the machine itself run sluice node install again, which starts what has to be", f.Root))
	}
	if !f.dryRun {
		s := starter{installFlags: f, plan: p}
		if err := s.install(ctx); err != nil {
			return err
		}
	}
	if err := f.print(out, installed{DryRun: f.dryRun, Plan: p}); err != nil {
		return err
	}
	if f.dryRun || !f.supervise || f.noStart {
		return nil
	}
	// From the machine's own copy: a process in memory takes as much of it as
	// the program is large.
	err = syscall.Exec(f.Installed(), []string{f.Installed(), "node", "supervise"}, os.Environ())
	return fmt.Errorf("go on as %s: %w", f.Installed(), err)
}

func (f *installFlags) print(out io.Writer, i installed) error {
	if f.output == "json" {
		return printJSON(out, i)
	}
	return printPlan(out, i.Plan, i.DryRun, !f.noStart)
}

// printPlan prints a plan for people. start: daemons are started anew, too.
func printPlan(out io.Writer, p *install.Plan, dryRun, start bool) error {
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	if len(p.Changes) > 0 {
		fmt.Fprintln(w, "ACTION\tFILE\tWHY")
	}
	for _, c := range p.Changes {
		fmt.Fprintf(w, "%s\t%s\t%s\n", c.Action, c.Path, c.Why)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	var b strings.Builder
	if dryRun {
		for _, c := range p.Changes {
			if c.Diff != "" {
				fmt.Fprintf(&b, "\n%s:\n%s", c.Path, c.Diff)
			}
		}
	}
	if len(p.Restart) > 0 {
		var names []string
		for _, s := range p.Restart {
			names = append(names, string(s))
		}
		started := "started anew"
		switch {
		case dryRun:
			started = "would be started anew"
		case !start:
			started = "to be started anew"
		}
		fmt.Fprintf(&b, "\n%s: %s\n", started, strings.Join(names, ", "))
	}
	for _, n := range p.Notes {
		fmt.Fprintf(&b, "\nnote: %s\n", n)
	}
	if len(p.Changes) == 0 && len(p.Restart) == 0 {
		fmt.Fprintln(&b, "Nothing to do.")
	} else if !dryRun && start && slices.Contains(p.Restart, install.StepContainerd) {
		fmt.Fprintln(&b, "\nSee whether images stream: sluice node status")
	}
	text := b.String()
	if len(p.Changes) == 0 {
		text = strings.TrimPrefix(text, "\n")
	}
	_, err := io.WriteString(out, text)
	return err
}
