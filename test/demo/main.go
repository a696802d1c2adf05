// Command demo is `make demo`: one image, in one layer and in 28, pulled the
// traditional way and streamed, over the same shaped link, by the same
// containerd, with what a person waits for in one table. As `make demo-flows` it
// has Project Teleport beside them.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	var o options
	flag.StringVar(&o.src, "src", "..", "the checkout")
	flag.StringVar(&o.image, "image", "", "an OCI layout directory or docker-save tar instead of the Debian image")
	flag.StringVar(&o.command, "cmd", "", "what to run, by /bin/sh; the image's own command if empty (Debian: python3 -c 'print(\"hi\")')")
	flag.Float64Var(&o.rate, "rate", 200, "bandwidth of the link in Mbit/s")
	flag.DurationVar(&o.rtt, "rtt", 10*time.Millisecond, "round-trip time of the link")
	flag.IntVar(&o.rounds, "rounds", 3, "how often everything is measured; medians are shown")
	flag.BoolVar(&o.teleport, "teleport", false, "measure Project Teleport, too")
	flag.BoolVar(&o.json, "json", false, "print the figures as JSON")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := demo(ctx, o)
	if err != nil && ctx.Err() != nil {
		err = errors.New("interrupted; nothing of it is left") // what was broken off doesn't matter
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}
