package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.opentelemetry.io/otel/trace"

	"sluice/internal/acr"
	"sluice/internal/auth"
	"sluice/internal/config"
	"sluice/internal/durable"
	"sluice/internal/index"
	"sluice/internal/notify"
	"sluice/internal/registry"
	"sluice/internal/stored"
	"sluice/internal/streaming"
	"sluice/internal/teleport"
	"sluice/internal/teleport/mountapi"
	"sluice/internal/teleport/samba"
	"sluice/oci"
)

// shutdownTimeout is how long requests that run have when the registry stops.
const shutdownTimeout = 30 * time.Second

// server is a registry with everything that belongs to it.
type server struct {
	config    *config.Registry
	log       *slog.Logger
	store     store
	index     *index.DB
	registry  *stored.Registry
	authority *auth.Authority // nil: nobody is asked for credentials
	notifier  *notify.Notifier
	streaming *streaming.Service // nil: images aren't converted
	teleport  *teleport.Service  // nil: they aren't expanded
	samba     *samba.Keeper      // nil: likewise, or the file server is told nothing
	manager   *acr.Handler
	metrics   *registry.Metrics
	cert      *registry.Certificate // nil: without TLS
	handler   http.Handler

	closers []func() // in the order of opening
}

// openServer opens what a registry stands on and puts it together. What it
// returns must be closed.
func openServer(ctx context.Context, c *config.Registry, log *slog.Logger) (*server, error) {
	s := &server{config: c, log: log, metrics: registry.NewMetrics()}
	for _, open := range []func(context.Context) error{s.openRegistry, s.openAuthority, s.openNotifier, s.openStreaming, s.openTeleport, s.openCertificate, s.openHandler} {
		if err := open(ctx); err != nil {
			s.close()
			return nil, err
		}
	}
	return s, nil
}

func (s *server) close() {
	for len(s.closers) > 0 {
		last := len(s.closers) - 1
		s.closers[last]()
		s.closers = s.closers[:last]
	}
}

func (s *server) onClose(f func() error, what string) {
	s.closers = append(s.closers, func() {
		if err := f(); err != nil {
			s.log.Error("close "+what, "error", err)
		}
	})
}

// openRegistry opens images and index, and sees to it that the index has what
// the images say.
func (s *server) openRegistry(ctx context.Context) (err error) {
	if s.store, err = openStore(ctx, s.config); err != nil {
		return err
	}
	s.onClose(s.store.Close, "storage")
	if err := s.store.Check(ctx); err != nil {
		return err
	}
	if s.index, err = openIndex(ctx, s.config, s.log); err != nil {
		return err
	}
	s.onClose(s.index.Close, "index")
	s.registry = newStored(s.config, s.store, s.index, s.log)
	known, err := s.index.Repositories(ctx, index.RepositoryQuery{N: 1, All: true})
	if err == nil && len(known) == 0 {
		return s.registry.Rebuild(ctx, nil) // an index that is new, perhaps to images that are not
	}
	if err == nil {
		err = s.registry.Reconcile(ctx)
	}
	return err
}

// openIndex opens the index, in a data directory that is made if it isn't there:
// with object storage nothing else is in it.
func openIndex(ctx context.Context, c *config.Registry, log *slog.Logger) (*index.DB, error) {
	if err := durable.MkdirAll(c.Data, 0o700); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	return index.Open(ctx, index.Options{URL: c.DatabaseURL(), Log: log})
}

func newStored(c *config.Registry, store store, db *index.DB, log *slog.Logger) *stored.Registry {
	return stored.New(store.maintained, db, stored.Options{ // the store itself: it may be a storage.Signer
		AllowSparse: c.Push.AllowSparse, AllowStreamingPush: c.Push.AllowStreaming,
		SoftDelete: days(c.SoftDelete.Days),
		MaxBlob:    int64(c.Limits.MaxBlob), RepositoryQuota: int64(c.Limits.RepositoryQuota),
		Events: len(c.Webhooks) > 0, Convert: c.Streaming.Enabled,
		Expand: c.Teleport.Enabled, ExpandAll: c.Teleport.Enabled && c.Teleport.AutoEnable,
		Log: log,
	})
}

func days(n int) time.Duration { return time.Duration(n) * 24 * time.Hour }

// openAuthority opens the accounts, if callers are asked who they are.
func (s *server) openAuthority(ctx context.Context) (err error) {
	c := s.config.Auth
	if !c.Enabled {
		if host, _, _ := net.SplitHostPort(s.config.Listen); !isLoopback(host) {
			s.log.Warn("everybody who reaches this registry may read, write and delete: set auth.enabled, or listen on 127.0.0.1", "listen", s.config.Listen)
		}
		return nil
	}
	opts := auth.Options{
		Service: c.Service, ExternalURL: c.ExternalURL, TrustForwarded: s.config.BehindProxy,
		AccessLifetime: c.AccessLifetime, RefreshLifetime: c.RefreshLifetime,
		Admin: auth.Admin{Enabled: c.Admin.Enabled, Name: c.Admin.User, Password: c.Admin.Password.Value(), Show: s.showPassword},
		AnonymousPull: func(ctx context.Context, repo string) bool {
			return c.AnonymousPull || s.registry.AnonymousPull(ctx, repo)
		},
		Exclude: s.index.Exclude,
		Log:     s.log,
	}
	if s.config.BehindProxy {
		opts.ClientAddress = registry.ForwardedAddress
	}
	for _, i := range c.Issuers {
		issuer := auth.Issuer{URL: i.URL, Discovery: i.Discovery, Audience: i.Audience, NameClaim: i.NameClaim}
		for _, r := range i.Rules {
			issuer.Rules = append(issuer.Rules, auth.Rule{Claims: r.Claims, ScopeMap: r.ScopeMap})
		}
		opts.Exchange = append(opts.Exchange, issuer)
	}
	if s.authority, err = auth.Open(ctx, s.store, opts); err != nil {
		return fmt.Errorf("accounts: %w", err)
	}
	return nil
}

// showPassword keeps the admin user's first password where only whoever may
// read the data directory finds it. Logs are read by more people.
func (s *server) showPassword(password string) error {
	name := filepath.Join(s.config.Data, "admin-password")
	if err := durable.MkdirAll(s.config.Data, 0o700); err != nil {
		return err
	}
	if err := durable.WriteFile(name, []byte(password+"\n"), 0o600); err != nil {
		return fmt.Errorf("%w: set auth.admin.password_file instead", err)
	}
	s.log.Info("the admin user has a new password: read it and remove the file", "user", s.config.Auth.Admin.User, "file", name)
	return nil
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

func (s *server) openNotifier(context.Context) (err error) {
	if len(s.config.Webhooks) == 0 {
		return nil
	}
	instance, _ := os.Hostname()
	opts := notify.Options{URL: s.config.Auth.ExternalURL, Instance: instance, Log: s.log}
	for _, w := range s.config.Webhooks {
		opts.Endpoints = append(opts.Endpoints, notify.Endpoint{
			Name: w.Name, URL: w.URL, Secret: w.Secret.Value(), Headers: w.Headers, Actions: w.Actions, Repositories: w.Repositories,
		})
	}
	s.notifier, err = notify.New(s.index, opts)
	return err
}

func (s *server) openStreaming(context.Context) error {
	c := s.config.Streaming
	if !c.Enabled {
		return nil
	}
	var platforms []oci.Platform
	for _, p := range c.Platforms {
		parts := append(strings.Split(p, "/"), "")
		platforms = append(platforms, oci.Platform{OS: parts[0], Architecture: parts[1], Variant: parts[2]})
	}
	s.streaming = streaming.New(s.registry, s.index, streaming.Options{
		Workers: c.Workers, Layers: c.Layers, Platforms: platforms, Store: s.store, Log: s.log,
	})
	s.streaming.Export(s.metrics.Gauge, s.metrics.Counter)
	return nil
}

func (s *server) openCertificate(context.Context) (err error) {
	if s.config.TLS.Cert != "" {
		s.cert, err = registry.LoadCertificate(s.config.TLS.Cert, s.config.TLS.Key, s.log)
	}
	return err
}

// openHandler puts the APIs behind their common front.
func (s *server) openHandler(ctx context.Context) error {
	c := s.config
	traces, err := s.openTraces(ctx)
	if err != nil {
		return err
	}
	front := registry.FrontOptions{
		Log: s.log, Ready: (&readiness{check: s.check}).ready, Metrics: s.metrics, Traces: traces,
		Limits: registry.Limits{Reads: c.Limits.Reads, Writes: c.Limits.Writes, Referrers: c.Limits.Referrers},
	}
	if c.BehindProxy {
		front.ClientAddress = registry.ForwardedAddress
	}
	manage := acr.Options{
		Authority: s.authority, Streaming: s.streaming, Teleport: s.teleport, Service: c.Auth.Service,
		SoftDelete: days(c.SoftDelete.Days), CollectGrace: c.GarbageCollection.Grace, Log: s.log,
	}
	images := registry.Options{MaxManifest: int64(c.Limits.MaxManifest), Redirect: c.Storage.Redirect}
	if s.authority != nil { // not a nil *Authority in an interface
		front.Authorizer, manage.Authorizer, images.Authorizer = s.authority, s.authority, s.authority
	}
	s.manager = acr.New(s.registry, s.index, s.store, manage)
	v2 := registry.NewHandler(s.registry, images)
	var mount http.Handler // nil: nothing is expanded
	if s.teleport != nil {
		mount = s.mountAPI()
	}
	route := func(w http.ResponseWriter, r *http.Request) {
		// A ServeMux would redirect paths that it finds unclean.
		switch path := r.URL.Path; {
		case strings.HasPrefix(path, "/oauth2/") && s.authority != nil:
			s.authority.ServeHTTP(w, r)
		case strings.HasPrefix(path, "/acr/v1/"):
			s.manager.ServeHTTP(w, r)
		case strings.HasPrefix(path, mountapi.Prefix) && mount != nil:
			mount.ServeHTTP(w, r)
		default:
			v2.ServeHTTP(w, r)
		}
	}
	s.handler = registry.Wrap(http.HandlerFunc(route), front)
	return nil
}

// check tells whether requests can be served.
func (s *server) check(ctx context.Context) error {
	return errors.Join(s.store.Check(ctx), s.index.Check(ctx))
}

// openTraces returns what spans are sent to, nil if nowhere.
func (s *server) openTraces(ctx context.Context) (trace.TracerProvider, error) {
	if s.config.Traces.Endpoint == "" {
		return nil, nil
	}
	provider, err := newTraces(ctx, "sluice-registry", s.config.Traces.Endpoint)
	if err != nil {
		return nil, fmt.Errorf("traces to %s: %w", s.config.Traces.Endpoint, err)
	}
	s.onClose(func() error {
		last, stop := context.WithTimeout(context.Background(), 5*time.Second)
		defer stop()
		return provider.Shutdown(last)
	}, "traces")
	return provider, nil
}

// run serves until ctx ends, and the requests under way have.
func (s *server) run(ctx context.Context, stdout io.Writer) error {
	listener, err := listen(s.config.Listen)
	if err != nil {
		return err
	}
	defer listener.Close()
	ctx, cancel := context.WithCancel(ctx)
	var background sync.WaitGroup
	defer background.Wait()
	defer cancel()
	if s.config.Metrics.Listen != "" {
		if err := s.serveMetrics(ctx, &background); err != nil {
			return err
		}
	}
	s.maintain(ctx, &background)

	web := registry.NewServer(s.handler, s.log)
	served := make(chan error, 1)
	background.Go(func() {
		if s.cert == nil {
			served <- web.Serve(listener)
			return
		}
		web.TLSConfig = s.cert.TLSConfig()
		served <- web.ServeTLS(listener, "", "")
	})
	addr := listener.Addr()
	fmt.Fprintf(stdout, "listening on %s, %s. Push with: docker push %s/NAME:TAG\n", addr, s.store.where, reachable(addr))

	reload := make(chan os.Signal, 1)
	signal.Notify(reload, syscall.SIGHUP)
	defer signal.Stop(reload)
	for {
		select {
		case <-reload:
			s.reload()
			continue
		case err := <-served:
			return fmt.Errorf("serve on %s: %w", addr, err)
		case <-ctx.Done():
		}
		return s.shutdown(ctx, web)
	}
}

// reload is for SIGHUP. Everything but the certificate is read at the start.
func (s *server) reload() {
	if s.cert == nil {
		return
	}
	if err := s.cert.Reload(); err != nil {
		s.log.Error("the TLS certificate can't be read again: the old one is used on", "error", err)
	}
}

// shutdown waits for the requests under way.
func (s *server) shutdown(ctx context.Context, web *http.Server) error {
	// The signal's context is over; the requests get a time of their own.
	last, stop := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
	defer stop()
	if err := web.Shutdown(last); err != nil {
		s.log.Warn("requests were broken off at shutdown", "after", shutdownTimeout)
		return web.Close()
	}
	return nil
}

// serveMetrics serves /metrics on an address of its own until ctx ends.
func (s *server) serveMetrics(ctx context.Context, background *sync.WaitGroup) error {
	listener, err := listen(s.config.Metrics.Listen)
	if err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", s.metrics.Handler())
	web := registry.NewServer(mux, s.log)
	background.Go(func() {
		if err := web.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			s.log.Error("metrics are no longer served", "error", err)
		}
	})
	background.Go(func() {
		<-ctx.Done()
		web.Close()
	})
	return nil
}

// listen listens on an address, with errors for whoever wrote it.
func listen(address string) (net.Listener, error) {
	listener, err := net.Listen("tcp", address)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("%s is in use by another program: stop it, or choose another --listen", address)
	}
	if err != nil {
		return nil, fmt.Errorf("can't listen on %s: %w", address, err)
	}
	return listener, nil
}

// reachable returns an address that a client on this machine can use.
func reachable(addr net.Addr) string {
	if tcp, ok := addr.(*net.TCPAddr); ok && tcp.IP.IsUnspecified() {
		return fmt.Sprintf("localhost:%d", tcp.Port)
	}
	return addr.String()
}
