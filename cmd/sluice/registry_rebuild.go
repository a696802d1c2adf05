package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/spf13/cobra"

	"sluice/cmd/internal/progress"
	"sluice/internal/config"
	"sluice/internal/index"
)

func newRebuildIndexCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rebuild-index",
		Short: "Make the index anew from what is stored",
		Long: `Make the index anew from what is stored: after the database was lost or damaged.

Everything that the registry must not lose is in its storage; the index only
makes it quick to ask for. Stop the registry first (all replicas). Webhooks that
were not delivered yet, and imports that were not done, are lost with an index
that is damaged.`,
		Args: arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := loadRegistryConfig(cmd.Flags())
			if err != nil {
				return err
			}
			return rebuildIndex(cmd.Context(), c, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
}

func rebuildIndex(ctx context.Context, c *config.Registry, stdout, stderr io.Writer) error {
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	opened, err := openStore(ctx, c) // holds local storage for itself: no registry runs on it
	if err != nil {
		return err
	}
	defer opened.Close()
	db, err := openIndex(ctx, c, log)
	if errors.Is(err, index.ErrCorrupt) {
		if err := index.Reset(ctx, index.Options{URL: c.DatabaseURL(), Log: log}); err != nil {
			return err
		}
		db, err = openIndex(ctx, c, log)
	}
	if err != nil {
		return err
	}
	defer db.Close()
	show := progress.New(stderr)
	repositories := 0
	err = newStored(c, opened, db, log).Rebuild(ctx, func(repo string, done int) {
		repositories = done
		show.Show(progress.Step{Name: "index", Verb: "indexing", Ended: "indexed", Parts: countRepositories(done), Label: repo, Part: done, Finished: true})
	})
	show.Close()
	if err != nil {
		return fmt.Errorf("the index is not complete: %w", err)
	}
	fmt.Fprintf(stdout, "indexed %s\n", countRepositories(repositories))
	return nil
}

func countRepositories(n int) string {
	if n == 1 {
		return "1 repository"
	}
	return fmt.Sprintf("%d repositories", n)
}
