package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/spf13/cobra"

	"sluice/internal/node/install"
	"sluice/internal/node/install/host"
	"sluice/internal/node/mount/control"
	"sluice/internal/node/serve"
	"sluice/internal/node/snapshot"
)

// supervisedLog is the log of a daemon that systemd doesn't keep.
const supervisedLog = "/var/log/sluice-node.log"

// The time that daemons have to answer after their start.
const (
	daemonTime     = time.Minute
	containerdTime = time.Minute
)

// starter carries out a plan and starts what it concerns: the daemon before
// containerd, which needs it.
type starter struct {
	*installFlags
	plan *install.Plan
}

func (s *starter) install(ctx context.Context) error {
	a, err := s.plan.Begin()
	if err != nil {
		return err
	}
	if err := a.Do(install.StepDaemon); err != nil {
		return err
	}
	if s.noStart {
		return a.Do("", install.StepContainerd, install.StepKubelet)
	}
	if err := s.startDaemon(ctx); err != nil {
		return fmt.Errorf("%w\ncontainerd's configuration wasn't touched; run this again when it's mended, or sluice node uninstall", err)
	}
	if err := a.Do("", install.StepContainerd); err != nil {
		return err
	}
	if s.has(install.StepContainerd) {
		if err := s.restartContainerd(ctx); err != nil {
			err = errors.Join(fmt.Errorf("containerd doesn't start with the new configuration: %w", err), a.TakeBack())
			if rerr := s.restart(ctx); rerr != nil {
				return errors.Join(err, rerr)
			}
			return fmt.Errorf("%w\nits old configuration is back", err)
		}
	}
	if err := a.Do(install.StepKubelet); err != nil {
		return err
	}
	return s.restartKubelet(ctx)
}

func (s *starter) has(step install.Step) bool {
	for _, r := range s.plan.Restart {
		if r == step {
			return true
		}
	}
	return false
}

// startDaemon starts the daemon, or starts it anew, and waits until it answers.
func (s *starter) startDaemon(ctx context.Context) error {
	d := supervised(install.Installation{Program: s.Installed(), Flags: s.Flags, Sockets: s.Sockets})
	anew := s.has(install.StepDaemon)
	var err error
	switch {
	case s.Init == install.Systemd:
		err = startUnit(ctx, d, anew)
	case s.supervise:
		var pid int
		if pid, err = d.Process(ctx); err == nil && pid != 0 && anew {
			err = stop(ctx, pid)
		}
		if err == nil {
			_, err = d.Start(ctx, daemonTime)
		}
	default:
		pid, perr := d.Process(ctx)
		if perr != nil || pid == 0 {
			return errors.Join(fmt.Errorf("without systemd somebody else has to start the daemon, before containerd: %s node %q; or give --supervise", s.Installed(), s.Flags), perr)
		}
		if anew {
			s.plan.Notes = append(s.plan.Notes, "start the daemon anew for what has changed to count")
		}
	}
	if err != nil {
		return err
	}
	return install.Restarted("/", install.StepDaemon)
}

// startUnit has systemd start the daemon.
func startUnit(ctx context.Context, d host.Daemon, anew bool) error {
	how := "start"
	if anew {
		how = "restart"
	}
	for _, args := range [][]string{{"daemon-reload"}, {"enable", install.UnitName}, {how, install.UnitName}} {
		if err := host.Systemctl(ctx, args...); err != nil {
			return err
		}
	}
	for end := time.Now().Add(daemonTime); ; {
		pid, err := d.Process(ctx)
		if err == nil && pid != 0 {
			return nil
		}
		if time.Now().After(end) || ctx.Err() != nil {
			return errors.Join(fmt.Errorf("%s doesn't answer within %v; the end of its journal:\n%s", install.UnitName, daemonTime, host.Journal(context.WithoutCancel(ctx), install.UnitName)), err, ctx.Err())
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// restart restarts containerd.
func (s *starter) restart(ctx context.Context) error {
	c := machineContainerd{init: s.Init, unit: s.ContainerdUnit, command: s.installFlags.restart, socket: s.ContainerdSocket}
	return c.restart(ctx)
}

// restartContainerd restarts it and waits until it knows the snapshotter.
func (s *starter) restartContainerd(ctx context.Context) error {
	if s.Init != install.Systemd && s.installFlags.restart == "" {
		s.plan.Notes = append(s.plan.Notes, "restart containerd now: images stream from then on. --restart-command does it, too")
		return nil
	}
	if err := s.restart(ctx); err != nil {
		return err
	}
	known, err := snapshot.Registered(ctx, s.ContainerdSocket, "sluice")
	if err == nil && !known {
		err = errors.New("it doesn't know the snapshotter sluice: does it read the file that --containerd-config names?")
	}
	if err != nil {
		return err
	}
	return install.Restarted("/", install.StepContainerd)
}

// machineContainerd is the machine's containerd, and how it's restarted.
type machineContainerd struct {
	init    install.Init
	unit    string // of systemd
	command string // without systemd
	socket  string // "": nobody knows
}

// settle is how long a command that has ended may take to have any effect.
const settle = 15 * time.Second

// restart restarts it and waits until it answers: the new process, because the
// old one may go on for a while.
func (c machineContainerd) restart(ctx context.Context) error {
	before := ""
	if c.socket != "" {
		before, _ = snapshot.Process(ctx, c.socket) // it may be down
	}
	var err error
	if c.init == install.Systemd {
		err = host.Systemctl(ctx, "restart", c.unit)
	} else {
		err = host.Run(ctx, "/bin/sh", "-c", c.command)
	}
	if err != nil || c.socket == "" {
		return err
	}
	for begin := time.Now(); ; {
		now, err := snapshot.Process(ctx, c.socket)
		switch {
		case err == nil && (now != before || time.Since(begin) > settle):
			return nil
		case time.Since(begin) > containerdTime || ctx.Err() != nil:
			return err
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (s *starter) restartKubelet(ctx context.Context) error {
	if !s.has(install.StepKubelet) {
		return nil
	}
	if s.Init != install.Systemd {
		s.plan.Notes = append(s.plan.Notes, "restart kubelet now")
		return nil
	}
	if err := host.Systemctl(ctx, "restart", s.KubeletUnit); err != nil {
		return err
	}
	return install.Restarted("/", install.StepKubelet)
}

// supervised is the daemon of an installation.
func supervised(i install.Installation) host.Daemon {
	return host.Daemon{
		Command: append([]string{i.Program, "node", "launch", "--", i.Program, "node"}, i.Flags...),
		Log:     supervisedLog,
		Process: func(ctx context.Context) (int, error) {
			pid, err := control.NewClient(serve.Control(i.Sockets)).Process(ctx)
			if errors.Is(err, control.ErrNoDaemon) {
				return 0, nil
			}
			if err == nil && pid == 0 {
				err = errors.New("the node daemon runs in another PID namespace: stop it there first")
			}
			return pid, err
		},
		Wanted: func() (bool, error) {
			i, found, err := install.Find("/")
			return found && !i.Removing, err
		},
	}
}

// newSuperviseCommand is what sluice node install --supervise becomes.
func newSuperviseCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "supervise",
		Short:  "Keep the installed node daemon running",
		Hidden: true,
		Args:   arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return supervise(cmd.Context(), cmd.ErrOrStderr())
		},
	}
}

func supervise(ctx context.Context, out io.Writer) error {
	log := slog.New(slog.NewTextHandler(out, nil))
	i, found, err := install.Find("/")
	if err != nil || !found {
		return errors.Join(errors.New("sluice node isn't installed here: sluice node install"), err)
	}
	if i.Init == install.Systemd {
		log.Info("systemd keeps the node daemon running", "unit", install.UnitName)
		<-ctx.Done()
		return nil
	}
	err = supervised(i).Supervise(ctx, out, log)
	if errors.Is(err, host.ErrNotWanted) {
		// Whoever started this process mustn't start it again: that would
		// install what is being uninstalled.
		log.Info(err.Error())
		<-ctx.Done()
		return nil
	}
	return err
}

// newLaunchCommand starts a program that outlives the container it's started in.
func newLaunchCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "launch -- PROGRAM [ARG...]",
		Short:  "Start a program outside of this container's control group",
		Hidden: true,
		Args:   cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if os.Geteuid() != 0 {
				return errNotRoot
			}
			return host.Launch(args[0], args[1:])
		},
	}
}
