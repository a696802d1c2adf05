package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"sluice/internal/convert"
	"sluice/internal/durable"
	"sluice/internal/index"
	"sluice/internal/registry"
	"sluice/internal/remote"
	"sluice/internal/webhook"
)

// watchConfig is the flags of `sluice artifact-streaming watch`.
type watchConfig struct {
	streamingFlags
	listen, data    string
	secretFile      string
	cert, key       string
	repositories    []string
	platforms       []string
	layers, workers int
}

func newArtifactStreamingWatchCommand() *cobra.Command {
	var c watchConfig
	cmd := &cobra.Command{
		Use:   "watch --registry HOST[:PORT]",
		Short: "Convert what is pushed to another registry, as its webhooks tell",
		Long: `Convert what is pushed to another registry, as its webhooks tell.

Point a webhook of the registry at this program: a notification endpoint of
distribution, a webhook policy of Harbor for pushed artifacts (either format),
or a webhook of Azure Container Registry for pushes. Each image that is pushed
is converted on this machine, and its streaming artifact is stored next to it.
A registry of Sluice's does that by itself:
sluice artifact-streaming update --enable-streaming true.

A webhook is answered when what it tells of is on disk, in --data; without that
a restart forgets what waits. Requests are served at every path.`,
		Example: `  sluice artifact-streaming watch --registry https://harbor.example.com --listen :8080 \
    --secret-file /etc/sluice/webhook --data /var/lib/sluice-watch --repository 'team/*'`,
		Args: arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if os.Getenv("GOMEMLIMIT") == "" {
				debug.SetMemoryLimit(softMemory)
			}
			return c.run(cmd)
		},
	}
	f := cmd.Flags()
	f.StringVarP(&c.registry, "registry", "r", "", "the registry that sends the webhooks, `HOST[:PORT]`")
	f.StringVarP(&c.username, "username", "u", "", "`NAME` at the registry (default docker's, \"docker login\")")
	f.BoolVar(&c.passwordStdin, "password-stdin", false, "read the password from standard input")
	f.BoolVar(&c.plainHTTP, "plain-http", false, "speak HTTP without TLS with any registry")
	cmd.MarkFlagsRequiredTogether("username", "password-stdin")
	f.StringVar(&c.listen, "listen", "127.0.0.1:8080", "take webhooks at `ADDRESS`")
	f.StringVar(&c.data, "data", "", "keep what waits in `DIR`")
	f.StringVar(&c.secretFile, "secret-file", "", "want what is in `FILE` in the Authorization header, by\nitself, after \"Bearer \" or as the password of Basic")
	f.StringVar(&c.cert, "tls-cert", "", "certificate `FILE`; without it plain HTTP is served")
	f.StringVar(&c.key, "tls-key", "", "key `FILE` of the certificate")
	cmd.MarkFlagsRequiredTogether("tls-cert", "tls-key")
	f.StringArrayVar(&c.repositories, "repository", nil, "convert only `REPOSITORY`; a trailing * stands for\nanything; may be repeated (default all)")
	f.StringSliceVar(&c.platforms, "platform", nil, "convert only `PLATFORM`, as linux/arm64; may be\nrepeated (default all)")
	f.IntVar(&c.layers, "layers", 0, "convert `N` layers at once (default 2)")
	f.IntVar(&c.workers, "workers", 0, "compress each layer on `N` processors (default all)")
	return noFiles(cmd)
}

func (c *watchConfig) run(cmd *cobra.Command) error {
	log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
	opts, err := c.receiver(cmd, log)
	if err != nil {
		return err
	}
	if host, _, _ := net.SplitHostPort(c.listen); opts.Secret == "" && !isLoopback(host) {
		log.Warn("everybody who reaches this address may have images of the registry converted: set --secret-file", "listen", c.listen)
	}
	url := "sqlite::memory:"
	if c.data != "" {
		if err := durable.MkdirAll(c.data, 0o700); err != nil {
			return err
		}
		url = "sqlite:" + filepath.Join(c.data, "queue.db")
	}
	db, err := index.Open(cmd.Context(), index.Options{URL: url, Log: log})
	if err != nil {
		return err
	}
	defer db.Close()
	return c.serve(cmd.Context(), webhook.New(db, opts), log, cmd.OutOrStdout())
}

// maxSecretFile bounds the file of the secret, in bytes.
const maxSecretFile = 4 << 10

// receiver returns the options of the receiver.
func (c *watchConfig) receiver(cmd *cobra.Command, log *slog.Logger) (opts webhook.Options, err error) {
	if err := c.parseRegistry(); err != nil {
		return opts, err
	}
	if c.registry == "" {
		return opts, errors.New("which registry? Add --registry HOST[:PORT]")
	}
	c.output = "table"
	client, err := c.connection(cmd)
	if err != nil {
		return opts, err
	}
	client.UserAgent = "sluice-watch/" + rand.Text() // which pushes are our own
	client.Log = log
	reg, err := remote.New(c.registry, client)
	if err != nil {
		return opts, err
	}
	opts = webhook.Options{Registry: reg, Agent: client.UserAgent, Repositories: c.repositories, Log: log}
	if c.secretFile != "" {
		if opts.Secret, err = readSecret(c.secretFile); err != nil {
			return opts, err
		}
	}
	platforms, err := parsePlatforms(c.platforms)
	opts.Convert = convert.Options{Platforms: platforms, Layers: c.layers, Workers: c.workers}
	return opts, err
}

// readSecret reads a secret from a file, without the end of its line.
func readSecret(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, maxSecretFile+1))
	secret := strings.TrimRight(string(content), "\r\n")
	if err == nil && (secret == "" || len(content) > maxSecretFile || strings.ContainsAny(secret, "\r\n")) {
		err = fmt.Errorf("%s: want one line with the secret", name)
	}
	return secret, err
}

// serve takes webhooks and converts until ctx ends.
func (c *watchConfig) serve(ctx context.Context, receiver *webhook.Receiver, log *slog.Logger, stdout io.Writer) error {
	listener, err := listen(c.listen)
	if err != nil {
		return err
	}
	defer listener.Close()
	ctx, cancel := context.WithCancel(ctx)
	var background sync.WaitGroup
	defer background.Wait()
	defer cancel()
	background.Go(func() { receiver.Run(ctx) })

	web := registry.NewServer(receiver, log)
	web.ReadTimeout = time.Minute // webhooks are small
	served := make(chan error, 1)
	background.Go(func() {
		if c.cert != "" {
			served <- web.ServeTLS(listener, c.cert, c.key)
			return
		}
		served <- web.Serve(listener)
	})
	fmt.Fprintf(stdout, "listening on %s for webhooks of %s\n", listener.Addr(), c.registry)
	select {
	case err := <-served:
		return fmt.Errorf("serve on %s: %w", listener.Addr(), err)
	case <-ctx.Done():
	}
	last, stop := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
	defer stop()
	if err := web.Shutdown(last); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return web.Close()
	}
	return nil
}
