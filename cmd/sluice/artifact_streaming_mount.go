package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"sluice/internal/node/endpoint"
	"sluice/internal/node/mount"
	"sluice/internal/node/mount/control"
)

// mountVerifier returns what compares an artifact that is mounted with the
// original layers: by a daemon of its own, whose cache is empty, so that every
// byte comes from the registry. Its files lie in the temporary directory.
func mountVerifier(f *streamingFlags, p *place) func(context.Context, *verifier, *streamed) (int, error) {
	return func(ctx context.Context, v *verifier, s *streamed) (files int, err error) {
		work, err := os.MkdirTemp("", "sluice-verify-")
		if err != nil {
			return 0, err
		}
		defer os.RemoveAll(work)
		var plain []string
		if f.plainHTTP {
			plain = []string{p.host}
		}
		daemon := daemonFlags{root: filepath.Join(work, "daemon"), run: filepath.Join(work, "run")}
		client, err := connect(ctx, daemon, plain)
		if err != nil {
			return 0, &cannotMount{err}
		}
		defer awaitEnd(ctx, client)
		dir := filepath.Join(work, "mount")
		if err := os.Mkdir(dir, 0o700); err != nil {
			return 0, err
		}
		reference := fmt.Sprintf("%s/%s@%s", p.host, v.ref.Repository, s.image.Digest)
		if _, err := client.Mount(ctx, control.Mount{Reference: reference, Dir: dir}); err != nil {
			if mount.ReasonOf(err) == mount.PlatformUnsupported {
				return 0, &cannotMount{err}
			}
			return 0, fmt.Errorf("mounting it: %w", err)
		}
		defer func() {
			err = errors.Join(err, client.Unmount(context.WithoutCancel(ctx), dir))
		}()
		fmt.Fprintf(v.stderr, "%s: comparing the mounted files with the original layers\n", platformName(s.platform))
		want, err := readOriginal(ctx, v.reg, v.ref.Repository, s)
		if err != nil {
			return 0, err
		}
		return want.compare(ctx, dir)
	}
}

// cannotMount is the error for an artifact that can't be mounted here, whatever
// it is.
type cannotMount struct{ error }

func (e *cannotMount) Unwrap() error { return e.error }

// awaitEnd waits for the daemon, which ends when nothing has been mounted for a
// while, so that its files can be removed.
func awaitEnd(ctx context.Context, client *control.Client) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endpoint.IdleTime+10*time.Second)
	defer cancel()
	for ctx.Err() == nil {
		if _, err := client.Status(ctx); errors.Is(err, control.ErrNoDaemon) {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
}
