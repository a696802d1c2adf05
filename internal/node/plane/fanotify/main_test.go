package fanotify_test

import (
	"context"
	"encoding/json"
	"log/slog"
	"path/filepath"
	"testing"

	"sluice/internal/node/plane/fanotify"
	"sluice/internal/node/plane/fuse"
	"sluice/internal/node/plane/planetest"
)

func TestMain(m *testing.M) { planetest.Main(m, roles()) }

func roles() planetest.Roles {
	return planetest.Roles{Holder: runHolder, Open: openDaemon}
}

// fuseName is the directory of a FUSE plane in a benchmark.
const fuseName = "fuse"

func runHolder(ctx context.Context, socket string) error {
	if filepath.Base(filepath.Dir(socket)) == fuseName {
		return fuse.RunHolder(ctx, socket)
	}
	return fanotify.RunHolder(ctx, socket)
}

// openDaemon opens the plane in a process that is to be killed.
func openDaemon(ctx context.Context, dir string, _ json.RawMessage, log *slog.Logger) (planetest.Served, planetest.Start, error) {
	p, err := fanotify.Open(ctx, options(dir, log))
	if err != nil {
		return nil, planetest.Start{}, err
	}
	return p, planetest.Start{Resumed: p.Start().Resumed, Stale: p.Start().Stale}, nil
}

func options(dir string, log *slog.Logger) fanotify.Options {
	return fanotify.Options{Dir: dir, Files: filepath.Join(dir, "files"), HolderCommand: planetest.HolderCommand(), Log: log}
}
