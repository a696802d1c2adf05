package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"sluice/internal/node/smb"
)

// shareTimeout bounds connecting to a file server, and its answers; less if reads
// aren't to wait for as long.
const shareTimeout = 10 * time.Second

// shares returns how shares are reached, as --source says.
func (d *daemon) shares() (func(login func(ctx context.Context, refused string) (smb.Login, error)) smb.Share, error) {
	kernel := false
	d.known.Source = sourceUserspace
	if d.config.source != sourceUserspace {
		err := smb.KernelSupported()
		if err != nil && d.config.source == sourceKernel {
			return nil, fmt.Errorf("--source kernel: %w", err)
		}
		if kernel = err == nil; !kernel {
			d.log.Info("this program speaks with file servers itself", "kernel", err)
		}
	}
	if kernel {
		d.known.Source = sourceKernel
	}
	d.unmountShares()
	var n atomic.Int64
	return func(login func(ctx context.Context, refused string) (smb.Login, error)) smb.Share {
		o := smb.Options{Login: login, Timeout: min(d.config.read/2, shareTimeout), Tally: &d.connections, Log: d.log}
		if kernel {
			return smb.NewKernel(filepath.Join(d.sharesDir(), fmt.Sprint(n.Add(1))), o)
		}
		return smb.NewClient(o)
	}, nil
}

// sharesDir is where the kernel mounts shares.
func (d *daemon) sharesDir() string { return filepath.Join(d.config.run, "shares") }

// unmountShares takes away what the last process mounted.
func (d *daemon) unmountShares() {
	entries, _ := os.ReadDir(d.sharesDir()) // there's none, in general
	for _, e := range entries {
		dir := filepath.Join(d.sharesDir(), e.Name())
		err := smb.NewKernel(dir, smb.Options{Log: d.log}).Close()
		if err := errors.Join(err, os.Remove(dir)); err != nil {
			d.log.Warn("a share that the last process mounted stays", "dir", dir, "error", err)
		}
	}
}
