package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"

	"github.com/spf13/pflag"

	"sluice/internal/acr"
	"sluice/internal/node/hosts"
	"sluice/internal/node/mount"
	"sluice/internal/node/mount/control"
	"sluice/internal/remote"
	"sluice/oci"
)

// registriesConfig is the flags that say where registries are.
type registriesConfig struct {
	dirs      []string
	plainHTTP []string
}

func (c *registriesConfig) register(f *pflag.FlagSet) {
	f.StringArrayVar(&c.dirs, "hosts-dir", filepath.SplitList(hosts.DefaultDirs), "`DIR` of hosts.toml files and certificates, as\ncontainerd's config_path; may be repeated\n")
	f.StringArrayVar(&c.plainHTTP, "plain-http", nil, "speak HTTP without TLS with registry `HOST`; may\nbe repeated (loopback is by itself)")
}

// open returns where registries are. The caller closes it.
func (c *registriesConfig) open(credentials func(registry, repository string) remote.CredentialFunc, log *slog.Logger) *hosts.Hosts {
	var dirs []string
	for _, list := range c.dirs {
		dirs = append(dirs, filepath.SplitList(list)...)
	}
	return hosts.Open(hosts.Options{Dirs: dirs, PlainHTTP: c.plainHTTP, Credentials: credentials, Log: log})
}

// readRegistries is a mount.Manager's function to find registries.
func readRegistries(h *hosts.Hosts) func(host, repository string) (mount.Registry, error) {
	return func(host, repository string) (mount.Registry, error) {
		r, err := h.Registry(host, repository)
		if err != nil {
			return nil, err
		}
		return r, nil
	}
}

// askConversion asks registries with the management API what became of an image's
// conversion.
func askConversion(h *hosts.Hosts) func(ctx context.Context, host, repository string, subject oci.Digest) (mount.Conversion, error) {
	return func(ctx context.Context, host, repository string, subject oci.Digest) (mount.Conversion, error) {
		r, err := h.Registry(host, repository)
		if err != nil {
			return mount.Conversion{}, err
		}
		client := acr.ClientOf(r.Itself())
		op, err := client.LatestStreaming(ctx, repository, subject)
		if errors.Is(err, acr.ErrOperationUnknown) {
			return mount.Conversion{}, nil
		}
		if err != nil {
			return mount.Conversion{}, otherAPI(err)
		}
		c := mount.Conversion{Pending: !op.Status.Final(), State: string(op.Status)}
		if op.Status == acr.StatusFailed {
			if op, err := client.ImageOperation(ctx, repository, op.ID); err == nil && op.Details != "" {
				c.State += ": " + op.Details
			}
		}
		return c, nil
	}
}

// otherAPI makes oci.ErrUnsupported of the answers of registries that have no
// management API.
func otherAPI(err error) error {
	var coded *oci.Error
	var syntax *json.SyntaxError
	switch {
	case errors.Is(err, oci.ErrUnauthorized), errors.Is(err, oci.ErrDenied), errors.Is(err, oci.ErrTooManyRequests):
	case errors.As(err, &coded), errors.As(err, &syntax): // or a page for people
		return fmt.Errorf("%w: %w", oci.ErrUnsupported, err)
	}
	return err
}

// registryProblems is what is wrong with registries now, for clients.
func registryProblems(h *hosts.Hosts) func() []control.RegistryProblem {
	return func() []control.RegistryProblem {
		var all []control.RegistryProblem
		for _, p := range h.Problems() {
			all = append(all, control.RegistryProblem(p))
		}
		return all
	}
}

// printRegistries tells what is wrong with registries.
func printRegistries(out io.Writer, problems []control.RegistryProblem) error {
	for _, p := range problems {
		what := "its file is wrong and doesn't count"
		if p.Host != "" {
			what = p.Host + " fails"
		}
		if _, err := fmt.Fprintf(out, "\nregistry %s: %s:\n  %s\n", p.Registry, what, indent(p.Error)); err != nil {
			return err
		}
	}
	return nil
}
