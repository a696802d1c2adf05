package fuse_test

import (
	"context"
	"encoding/json"
	"log/slog"
	"testing"
	"time"

	"sluice/internal/node/plane"
	"sluice/internal/node/plane/fuse"
	"sluice/internal/node/plane/planetest"
)

func TestMain(m *testing.M) { planetest.Main(m, roles()) }

func roles() planetest.Roles {
	return planetest.Roles{Holder: fuse.RunHolder, Open: openDaemon}
}

// daemonOptions are the options of a daemon process of the tests.
type daemonOptions struct {
	DirectIO bool
	Mode     plane.Mode
	// NoResend: as on a kernel before 6.9.
	NoResend bool
	// OrphanGrace as in fuse.Options.
	OrphanGrace time.Duration
}

func (o daemonOptions) encode(t *testing.T) json.RawMessage {
	t.Helper()
	text, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// openDaemon opens the plane in a process that is to be killed.
func openDaemon(ctx context.Context, dir string, text json.RawMessage, log *slog.Logger) (planetest.Served, planetest.Start, error) {
	var o daemonOptions
	if err := json.Unmarshal(text, &o); err != nil {
		return nil, planetest.Start{}, err
	}
	opts := fuse.Options{Dir: dir, HolderCommand: planetest.HolderCommand(), DirectIO: o.DirectIO, Mode: o.Mode, OrphanGrace: o.OrphanGrace, Log: log}
	if o.NoResend {
		opts = opts.WithoutResend()
	}
	p, err := fuse.Open(ctx, opts)
	if err != nil {
		return nil, planetest.Start{}, err
	}
	return p, planetest.Start{Resumed: p.Start().Resumed, Stale: p.Start().Stale}, nil
}

const killDeviceSize = 8 << 30

// TestKill: SLUICE_KILLS sets the number of kills; 1,000 was done by hand.
func TestKill(t *testing.T) {
	needRoot(t)
	kills := planetest.Kills(t)
	for _, test := range []struct {
		name    string
		kills   int
		options daemonOptions
	}{
		{"buffered", kills, daemonOptions{}},
		{"direct", max(kills/5, 2), daemonOptions{DirectIO: true}},
		{"loop", max(kills/5, 2), daemonOptions{Mode: plane.Loop}},
		{"loop without resend", max(kills/5, 2), daemonOptions{Mode: plane.Loop, NoResend: true}},
	} {
		t.Run(test.name, func(t *testing.T) {
			planetest.Stress{
				Roles: roles(), Options: test.options.encode(t), Kills: test.kills, DeviceSize: killDeviceSize, MayRefuse: test.options.NoResend,
			}.Run(t)
		})
	}
}
