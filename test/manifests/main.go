// Command manifests writes the plain manifests of deploy/manifests, for those
// who use no helm: what the chart of deploy/chart renders, without helm's marks.
// Its test holds that they are current, that the chart says what is wrong with
// values, and that programs take the flags and settings that it gives them.
//
//	go run -C test ./manifests --src CHECKOUT
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"

	"sluice/test/bed"
)

func main() {
	src := flag.String("src", "..", "checkout of Sluice")
	flag.Parse()
	if err := write(context.Background(), *src); err != nil {
		fmt.Fprintln(os.Stderr, "manifests:", err)
		os.Exit(1)
	}
}

// write writes all manifests of a checkout.
func write(ctx context.Context, src string) error {
	src, err := filepath.Abs(src)
	if err != nil {
		return err
	}
	h, err := bed.NewHelm(ctx, src, func(s string) { fmt.Println(s) })
	if err != nil {
		return err
	}
	for _, m := range manifests() {
		content, err := m.render(ctx, h)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(src, "deploy/manifests", m.file), content, 0o644); err != nil {
			return err
		}
	}
	return nil
}
