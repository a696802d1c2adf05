// Command runner is `make test`: it runs everything that this machine can
// run, shows what fails as it fails, and ends with what was skipped and why,
// line by line, so that a green run can't hide what it did not look at.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

func main() {
	src := flag.String("src", "..", "the checkout")
	only := flag.String("only", "", "run only the steps whose name begins with this")
	fuzz := flag.Duration("fuzz", 5*time.Second, "how long each fuzz target runs")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := execute(ctx, *src, *only, *fuzz)
	stop()
	os.Exit(code)
}

// execute runs the steps and returns the exit code.
func execute(ctx context.Context, src, only string, fuzz time.Duration) int {
	abs, err := filepath.Abs(src)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	var total tally
	begin := time.Now()
	for _, s := range steps(abs, fuzz) {
		if !strings.HasPrefix(s.name, only) {
			continue
		}
		fmt.Printf("== %s\n", s.name)
		start := time.Now()
		t := s.run(ctx)
		total.add(t)
		fmt.Printf("   %s in %s\n", t, time.Since(start).Round(time.Second/10))
		if ctx.Err() != nil {
			fmt.Println("interrupted")
			return 1
		}
	}
	fmt.Printf("\n== skipped, and why (%d)\n", len(total.skips))
	for _, s := range total.skips {
		fmt.Println("   " + s)
	}
	fmt.Printf("\n== failed (%d)\n", len(total.failures))
	for _, f := range total.failures {
		fmt.Println("   " + f)
	}
	fmt.Printf("\nall of it took %s\n", time.Since(begin).Round(time.Second))
	fmt.Printf("%d passed, %d failed, %d skipped\n", total.passed, len(total.failures), len(total.skips))
	if len(total.failures) > 0 || total.passed == 0 {
		return 1
	}
	return 0
}
