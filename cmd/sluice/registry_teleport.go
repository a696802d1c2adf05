package main

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/spf13/cobra"

	"sluice/internal/config"
	"sluice/internal/teleport"
	"sluice/internal/teleport/mountserver"
	"sluice/internal/teleport/samba"
)

// openTeleport opens what expands images for Teleport's clients, and what the file
// server reads.
func (s *server) openTeleport(ctx context.Context) (err error) {
	c := s.config.Teleport
	if !c.Enabled {
		return nil
	}
	s.teleport, err = teleport.New(s.registry, s.index, teleport.Options{
		Directory: s.config.TeleportDirectory(), Workers: c.Workers, MaxRepositories: c.MaxRepositories, Auto: c.AutoEnable,
		MaxLayer: int64(c.MaxLayer), MaxImage: int64(c.MaxImage), Log: s.log,
	})
	if err != nil {
		return err
	}
	s.teleport.Export(s.metrics.Gauge, s.metrics.Counter)
	if c.Share != "" {
		return nil
	}
	s.samba, err = samba.Open(ctx, s.store, s.index, samba.Options{
		Dir: s.config.SambaDirectory(), Disks: s.config.TeleportDirectory(), Enabled: s.teleport.Enabled, Lifetime: c.CredentialLifetime, Log: s.log,
	})
	return err
}

// mountAPI returns the handler of /mount/v1.
func (s *server) mountAPI() http.Handler {
	c := s.config
	credential := account(c.Teleport)
	if s.samba != nil {
		credential = s.samba.Credential
	}
	opts := mountserver.Options{
		Teleport: s.teleport, Credential: credential, Server: c.Teleport.Server, Region: c.Teleport.Region,
		Service: c.Auth.Service, ExternalURL: c.Auth.ExternalURL, TrustForwarded: c.BehindProxy,
	}
	if s.authority != nil { // not a nil *Authority in an interface
		opts.Authorizer = s.authority
	}
	return mountserver.New(opts)
}

// account gives out the one account of a file server that isn't told anything. It is
// asked for again, and may be another after a restart.
func account(c config.Teleport) func(context.Context, string) (samba.Credential, error) {
	return func(_ context.Context, repo string) (samba.Credential, error) {
		return samba.Credential{
			Share: c.Share, Dir: teleport.RepositoryDir("", repo),
			Username: c.Username, Password: c.Password.Value(), Expires: time.Now().Add(c.CredentialLifetime),
		}, nil
	}
}

func newSMBConfigCommand() *cobra.Command {
	var opts samba.GlobalOptions
	cmd := &cobra.Command{
		Use:   "smb-config",
		Short: "Print a smb.conf for the file server of Project Teleport",
		Long: `Print a smb.conf with which Samba shares Teleport's disks and nothing else: SMB
3.1.1, signed and encrypted, read-only, each repository's disks for those only who
have credentials of that repository from the registry.

Shares, accounts and passwords are in files that the registry keeps and this
configuration refers to, so it needs to be printed once. The accounts must be known
to the system: see docs/teleport.md.`,
		Example: `  sluice registry smb-config --config /etc/sluice/registry.toml > /etc/samba/smb.conf`,
		Args:    arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := loadRegistryConfig(cmd.Flags())
			if err != nil {
				return err
			}
			if c.Teleport.Share != "" {
				return fmt.Errorf("teleport.share is %q: that file server is told nothing by the registry; without it Samba gets shares and accounts", c.Teleport.Share)
			}
			opts.Dir = c.SambaDirectory()
			fmt.Fprint(cmd.OutOrStdout(), samba.Global(opts))
			return nil
		},
	}
	cmd.Flags().IntVar(&opts.Port, "port", 0, "`PORT` that smbd listens on (default 445)")
	cmd.Flags().StringVar(&opts.State, "state", "", "`DIR` for smbd's own files (default Samba's)")
	return cmd
}
