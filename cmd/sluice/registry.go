package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"sluice/internal/registry"
	"sluice/internal/storage"
	"sluice/internal/stored"
)

// registryConfig is the flags of `sluice registry`.
type registryConfig struct {
	data, listen    string
	tlsCert, tlsKey string
	allowSparse     bool
	uploadAge       time.Duration
	quiet           bool
}

// shutdownTimeout is how long requests that run have when the registry stops.
const shutdownTimeout = 30 * time.Second

func newRegistryCommand() *cobra.Command {
	var c registryConfig
	cmd := &cobra.Command{
		Use:   "registry",
		Short: "Serve an OCI registry from a directory",
		Long: `Serve an OCI registry from a directory.

Any OCI client can push to it and pull from it. There is no authentication:
without TLS and a proxy that asks for credentials, listen on the loopback
interface only.`,
		Args: arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runRegistry(cmd.Context(), c, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.data, "data", "/var/lib/sluice/registry", "`DIR` of images; made if it doesn't exist\n")
	f.StringVar(&c.listen, "listen", "127.0.0.1:5000", "`HOST:PORT` to listen on; port 0 takes a free one\n")
	f.StringVar(&c.tlsCert, "tls-cert", "", "`FILE` with the TLS certificate chain (PEM)")
	f.StringVar(&c.tlsKey, "tls-key", "", "`FILE` with the TLS private key (PEM)")
	f.BoolVar(&c.allowSparse, "allow-sparse", false, "accept manifests without their layers or platforms")
	f.DurationVar(&c.uploadAge, "upload-age", 24*time.Hour, "discard uploads that nobody continued for `TIME`\n")
	f.BoolVar(&c.quiet, "quiet", false, "log warnings and errors only, not every request")
	cmd.MarkFlagsRequiredTogether("tls-cert", "tls-key")
	return cmd
}

// runRegistry serves until ctx ends.
func runRegistry(ctx context.Context, c registryConfig, stdout, stderr io.Writer) error {
	level := slog.LevelInfo
	if c.quiet {
		level = slog.LevelWarn
	}
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))

	store, err := storage.OpenLocal(c.data, storage.LocalOptions{Identity: stored.BlobIdentity})
	if errors.Is(err, storage.ErrLocked) {
		return fmt.Errorf("%w: is another registry running on it? Choose another --data", err)
	}
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("%w: choose another --data, or run as a user who may write there", err)
	}
	if err != nil {
		return err
	}
	defer store.Close()

	listener, err := net.Listen("tcp", c.listen)
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("%s is in use by another program: stop it, or choose another --listen", c.listen)
	}
	if _, _, split := net.SplitHostPort(c.listen); split != nil {
		return fmt.Errorf("can't listen on %s: write HOST:PORT, such as 127.0.0.1:5000", c.listen)
	}
	if err != nil {
		return fmt.Errorf("can't listen on %s: %w", c.listen, err)
	}
	handler := registry.Wrap(
		registry.NewHandler(stored.New(store, stored.Options{AllowSparse: c.allowSparse}), registry.Options{}),
		registry.FrontOptions{Log: log, Ready: store.Check},
	)
	server := registry.NewServer(handler, log)

	ctx, cancel := context.WithCancel(ctx)
	var background sync.WaitGroup
	defer background.Wait()
	defer cancel()
	background.Go(func() { sweepRegistry(ctx, store, c.uploadAge, log) })

	served := make(chan error, 1)
	background.Go(func() {
		if c.tlsCert != "" {
			served <- server.ServeTLS(listener, c.tlsCert, c.tlsKey)
		} else {
			served <- server.Serve(listener)
		}
	})
	addr := listener.Addr()
	fmt.Fprintf(stdout, "listening on %s, images in %s. Push with: docker push %s/NAME:TAG\n", addr, c.data, reachable(addr))

	select {
	case err := <-served:
		return fmt.Errorf("serve on %s: %w", addr, err)
	case <-ctx.Done():
	}
	// The signal's context is over; the requests get a time of their own.
	last, stop := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
	defer stop()
	if err := server.Shutdown(last); err != nil {
		log.Warn("requests were broken off at shutdown", "after", shutdownTimeout)
		return server.Close()
	}
	return nil
}

// reachable returns an address that a client on this machine can use.
func reachable(addr net.Addr) string {
	if tcp, ok := addr.(*net.TCPAddr); ok && tcp.IP.IsUnspecified() {
		return fmt.Sprintf("localhost:%d", tcp.Port)
	}
	return addr.String()
}

// sweepRegistry clears away abandoned uploads, now and every hour.
func sweepRegistry(ctx context.Context, store *storage.Local, uploadAge time.Duration, log *slog.Logger) {
	tick := time.NewTicker(time.Hour)
	defer tick.Stop()
	for {
		r, err := store.Sweep(ctx, uploadAge)
		if err != nil && ctx.Err() == nil {
			log.Error("sweep", "error", err)
		}
		if r != (storage.SweepResult{}) {
			log.Info("swept", "uploads", r.Uploads, "temporary", r.Temporary, "shared", r.Shared)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
