package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"sluice/internal/config"
)

// registryFlags are the flags that are keys of the configuration by another
// name.
func registryFlags() map[string]string {
	return map[string]string{
		"data": "data", "listen": "listen", "tls-cert": "tls.cert", "tls-key": "tls.key",
		"allow-sparse": "push.allow_sparse", "allow-streaming": "push.allow_streaming", "upload-age": "push.upload_age",
		"auth": "auth.enabled", "database": "database.url",
	}
}

func newRegistryCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "registry",
		Short: "Serve an OCI registry",
		Long: `Serve an OCI registry.

Any OCI client can push to it and pull from it. Without configuration it keeps
images in a directory of this machine and asks nobody for credentials, so it
listens on the loopback interface. Every setting can be made in a file (see
docs/registry.toml), by SLUICE_REGISTRY_… in the environment, or by --set.`,
		Example: `  sluice registry --data /srv/images
  sluice registry --config /etc/sluice/registry.toml
  sluice registry --auth --set auth.admin.enabled=true --set soft_delete.days=7`,
		Args: arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := loadRegistryConfig(cmd.Flags())
			if err != nil {
				return err
			}
			return runRegistry(cmd.Context(), c, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	addRegistryFlags(cmd.PersistentFlags())
	cmd.AddCommand(newCheckConfigCommand(), newRebuildIndexCommand(), newSMBConfigCommand())
	return cmd
}

// addRegistryFlags adds what says how a registry is configured. Their defaults
// are the configuration's.
func addRegistryFlags(f *pflag.FlagSet) {
	d := config.Default()
	f.StringP("config", "c", "", "configuration `FILE` (default $"+config.EnvFile+")")
	f.StringArray("set", nil, "set a key of the configuration, as `KEY=VALUE`; may be repeated")
	f.String("data", d.Data, "`DIR` of images and of the index; made if it doesn't exist\n")
	f.String("listen", d.Listen, "`HOST:PORT` to listen on; port 0 takes a free one\n")
	f.String("tls-cert", "", "`FILE` with the TLS certificate chain (PEM)")
	f.String("tls-key", "", "`FILE` with the TLS private key (PEM)")
	f.Bool("auth", d.Auth.Enabled, "ask for credentials (see docs/registry.md)")
	f.String("database", "", "`URL` of the index, sqlite:FILE or postgres://…\n(default index.db in --data)")
	f.Bool("allow-sparse", d.Push.AllowSparse, "accept manifests without their layers or platforms")
	f.Bool("allow-streaming", d.Push.AllowStreaming, "let clients push streaming artifacts")
	f.Duration("upload-age", d.Push.UploadAge, "discard uploads that nobody continued for `TIME`\n")
	f.Bool("quiet", false, "log warnings and errors only, not every request")
}

// loadRegistryConfig puts together flags, environment and file.
func loadRegistryConfig(flags *pflag.FlagSet) (*config.Registry, error) {
	keys := registryFlags()
	set := map[string]string{}
	flags.Visit(func(f *pflag.Flag) {
		if key, ok := keys[f.Name]; ok {
			set[key] = f.Value.String()
		}
	})
	if quiet, _ := flags.GetBool("quiet"); quiet {
		set["log.level"] = "warn"
	}
	pairs, _ := flags.GetStringArray("set")
	for _, pair := range pairs {
		key, value, ok := strings.Cut(pair, "=")
		if !ok {
			return nil, fmt.Errorf("--set %s: write KEY=VALUE, with a key of docs/registry.toml", pair)
		}
		set[key] = value
	}
	file, _ := flags.GetString("config")
	if file == "" {
		file = os.Getenv(config.EnvFile)
	}
	c, err := config.Load(file, os.Environ(), set)
	var problems config.Problems
	if errors.As(err, &problems) {
		return nil, fmt.Errorf("the configuration can't be used:\n  %s", strings.ReplaceAll(problems.Error(), "\n", "\n  "))
	}
	return c, err
}

func newCheckConfigCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "check-config",
		Short: "Say whether the configuration can be used, and what it is",
		Long: `Say whether the configuration can be used, and print all of it, with where each
value came from. Secrets are not shown. Nothing is started or changed.`,
		Args: arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := loadRegistryConfig(cmd.Flags())
			if err != nil {
				return err
			}
			fmt.Fprint(cmd.OutOrStdout(), c)
			return nil
		},
	}
}

// garbagePercent is how much the heap may grow before it is collected. What a
// registry keeps is a few megabytes, so Go's 100 would collect many times a
// second. GOGC in the environment has precedence.
const garbagePercent = 400

// runRegistry serves until ctx ends.
func runRegistry(ctx context.Context, c *config.Registry, stdout, stderr io.Writer) error {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(garbagePercent)
	}
	log, flush := openLog(c.Log, stderr)
	defer flush()
	s, err := openServer(ctx, c, log)
	if err != nil {
		return err
	}
	defer s.close()
	return s.run(ctx, stdout)
}
