package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"sluice/internal/node/install"
	"sluice/internal/node/install/host"
	"sluice/internal/node/snapshot"
)

// installed sets what sluice node install has recorded and no flag says. A daemon
// with another root than the installation's isn't the installed one.
func (f *uninstallFlags) installed(flags *pflag.FlagSet) error {
	i, found, err := install.Find(f.host)
	if err != nil || !found || flags.Changed("root") && f.root != i.State {
		return err
	}
	f.found = &i
	for name, value := range map[string]string{"root": i.State, "run": i.Sockets, "containerd": i.ContainerdSocket} {
		if !flags.Changed(name) && value != "" {
			if err := flags.Set(name, value); err != nil {
				return err
			}
		}
	}
	return nil
}

// ownPod returns the Kubernetes pod that this process was started in. Its
// containers don't count as users: they end when this process has.
func (f *uninstallFlags) ownPod(ctx context.Context) (snapshot.Pod, error) {
	if f.containerd == "" {
		return snapshot.Pod{}, nil
	}
	groups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return snapshot.Pod{}, err
	}
	pod, err := snapshot.PodOf(ctx, f.containerd, string(groups))
	if snapshot.Unavailable(err) {
		return snapshot.Pod{}, nil // survey says so, better
	}
	return pod, err
}

// The time between two looks at who still uses the snapshotter, and between two
// lines about it.
const (
	lookTime     = time.Second
	progressTime = 15 * time.Second
)

// await returns when nobody uses the snapshotter, as survey does, or with --wait
// after a while; then it has containerd use the one that it had before.
func (f *uninstallFlags) await(ctx context.Context, pod string, progress io.Writer) (snapshot.Withdrawn, error) {
	w, err := survey(ctx, *f, pod)
	var used *snapshot.InUseError
	if f.wait <= 0 || f.dryRun || !errors.As(err, &used) {
		return w, err
	}
	if err := f.retreat(ctx); err != nil {
		return w, err
	}
	end, said := time.Now().Add(f.wait), time.Time{}
	for errors.As(err, &used) {
		if time.Now().After(end) {
			return w, fmt.Errorf("after %v %w", f.wait, err)
		}
		if time.Since(said) > progressTime {
			said = time.Now()
			fmt.Fprintf(progress, "waiting for %s: %s\n", plural(len(used.Containers), "container"), strings.Join(used.Containers[:min(5, len(used.Containers))], ", "))
		}
		select {
		case <-ctx.Done():
			return w, ctx.Err()
		case <-time.After(lookTime):
		}
		w, err = survey(ctx, *f, pod)
	}
	return w, err
}

// retreat has containerd use the snapshotter that it had before for whatever is
// started from now on. Images are pulled again for it.
func (f *uninstallFlags) retreat(ctx context.Context) error {
	if f.found == nil {
		return nil
	}
	p, err := install.MakeRetreat("/")
	if err != nil {
		return err
	}
	if len(p.Changes) > 0 {
		a, err := p.Begin()
		if err == nil {
			err = a.Do(install.StepContainerd)
		}
		if err != nil {
			return err
		}
	}
	if slices.Contains(p.Restart, install.StepContainerd) {
		done, err := f.restartContainerd(ctx)
		if err != nil {
			return err
		}
		if !done {
			return errors.New("containerd has to be restarted, so that it uses sluice no more for new containers: do it, or give --restart-command, and run this again")
		}
		if err := install.Restarted("/", install.StepContainerd); err != nil {
			return err
		}
	}
	_, err = snapshot.WithdrawImages(ctx, f.containerd, f.snapshotter)
	return err
}

// restartContainerd restarts it, if there's a way; done is false if there isn't.
func (f *uninstallFlags) restartContainerd(ctx context.Context) (done bool, err error) {
	c := machineContainerd{init: f.found.Init, unit: f.found.ContainerdUnit, command: f.restart, socket: f.containerd}
	if c.init != install.Systemd && c.command == "" {
		return false, nil
	}
	return true, c.restart(ctx)
}

// releaseKubelet has kubelet ask containerd again, while the daemon still answers:
// kubelet starts no container, not even this one again, without its image service.
func (f *uninstallFlags) releaseKubelet(ctx context.Context, p *install.Plan, progress io.Writer) ([]install.Change, error) {
	if !slices.Contains(p.Restart, install.StepKubelet) {
		return nil, nil
	}
	if err := install.Pend("/", install.StepKubelet); err != nil {
		return nil, err
	}
	changes, err := p.RemoveFor(install.StepKubelet)
	if err != nil {
		return changes, err
	}
	if f.found.Init == install.Systemd && host.HasSystemd("/") {
		err = host.Systemctl(ctx, "restart", f.found.KubeletUnit)
	} else {
		fmt.Fprintln(progress, "restart kubelet now: the daemon that it asks for images is about to end")
	}
	if err != nil {
		return changes, err
	}
	return changes, install.Restarted("/", install.StepKubelet)
}

// stopDaemons stops the daemons, and sees to it that nobody starts them again.
func (f *uninstallFlags) stopDaemons(ctx context.Context, pids []int) error {
	if f.found != nil {
		if err := install.Removing("/"); err != nil {
			return err
		}
		if f.found.Init == install.Systemd && host.HasSystemd("/") {
			if err := host.Systemctl(ctx, "disable", "--now", install.UnitName); err != nil && ctx.Err() != nil {
				return err // otherwise the unit is gone, by an uninstall that was broken off
			}
		}
	}
	for _, pid := range pids {
		if err := stop(ctx, pid); err != nil {
			return err
		}
	}
	return nil
}

// removeInstallation takes away what sluice node install did; kubelet is what
// releaseKubelet has done of it.
func (f *uninstallFlags) removeInstallation(ctx context.Context, p *install.Plan, kubelet []install.Change) error {
	if f.found == nil {
		return nil
	}
	// Containerd's files may have changed since: by await, or by somebody.
	now, err := install.MakeRemoval("/")
	if err != nil {
		return err
	}
	*p = *now
	if err := p.Remove(); err != nil {
		return err
	}
	if f.found.Init == install.Systemd && host.HasSystemd("/") {
		if err := host.Systemctl(ctx, "daemon-reload"); err != nil {
			return err
		}
	}
	if slices.Contains(p.Restart, install.StepContainerd) {
		done, err := f.restartContainerd(ctx)
		if err != nil {
			return err
		}
		if !done {
			p.Notes = append(p.Notes, "restart containerd now")
		}
	}
	if len(kubelet) > 0 {
		p.Changes, p.Restart = append(kubelet, p.Changes...), append(p.Restart, install.StepKubelet)
	}
	if err := os.Remove(supervisedLog); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.Remove(supervisedLog + ".1"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return errors.Join(install.Forget("/"), host.RemoveGroup())
}
