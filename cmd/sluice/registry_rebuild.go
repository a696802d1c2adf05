package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"strings"

	"github.com/spf13/cobra"

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
	db, err := index.Open(ctx, index.Options{URL: c.DatabaseURL(), Log: log})
	if errors.Is(err, index.ErrCorrupt) {
		if err := setAside(c.DatabaseURL(), stderr); err != nil {
			return err
		}
		db, err = index.Open(ctx, index.Options{URL: c.DatabaseURL(), Log: log})
	}
	if err != nil {
		return err
	}
	defer db.Close()
	show := newProgress(stderr)
	repositories := 0
	err = newStored(c, opened, db, log).Rebuild(ctx, func(repo string, done int) {
		repositories = done
		show.show(step{name: "index", verb: "indexing", ended: "indexed", parts: countRepositories(done), label: repo, part: done, finished: true})
	})
	show.close()
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

// setAside renames a SQLite database that can't be read, so that somebody may
// look at it.
func setAside(url string, stderr io.Writer) error {
	file, ok := strings.CutPrefix(url, "sqlite:")
	if !ok {
		return errors.New("the index database can't be used: drop its tables, or name another by --database, and try again")
	}
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if err := os.Rename(file+suffix, file+".damaged"+suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	fmt.Fprintf(stderr, "the old index is now %s.damaged\n", file)
	return nil
}
