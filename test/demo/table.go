package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"

	"sluice/test/flows"
)

// show prints the table, and what it says.
func show(o options, rows []row) error {
	if o.json {
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		return e.Encode(rows)
	}
	w := os.Stdout
	fmt.Fprintf(w, "\nFrom an empty node to the first output: %g Mbit/s, %s, medians of %d\n", o.rate, o.rtt, o.rounds)
	n := len(o.ways())
	for i := 0; i < len(rows); i += n {
		table(w, rows[i:i+n])
	}
	fmt.Fprintln(w)
	for i := 0; i < len(rows); i += n {
		ratios(w, rows[i:i+n])
	}
	for i := n; i < len(rows); i += n {
		layers(w, rows[i-n:i], rows[i:i+n])
	}
	if o.teleport {
		disks(w, rows[len(rows)-1].image)
		fmt.Fprint(w, reference)
	}
	return nil
}

// table prints what an image took in each way.
func table(w io.Writer, rows []row) {
	fmt.Fprintf(w, "\n%-18s %10s %8s %8s %10s %12s %7s\n", rows[0].Image, "to output", "pull", "run", "fetched", "connections", "mounts")
	for _, r := range rows {
		fmt.Fprintf(w, "  %-16s %8.2f s %6.2f s %6.2f s %7.1f MB %12d %7d\n",
			r.Way, r.TotalSeconds, r.PullSeconds, r.RunSeconds, float64(r.Bytes)/1e6, r.Connections, r.Mounts)
	}
}

// ratios prints how an image's starts compare with the first way's.
func ratios(w io.Writer, rows []row) {
	pulled := rows[0]
	for _, r := range rows[1:] {
		fmt.Fprintf(w, "%s, %s: %.1f times as fast as pulled, %.1f %% of the bytes\n", r.Image, r.Way,
			pulled.TotalSeconds/r.TotalSeconds, 100*float64(r.Bytes)/float64(pulled.Bytes))
	}
}

// layers prints what layers cost: the same content in few and in more.
func layers(w io.Writer, few, more []row) {
	fmt.Fprintf(w, "\n%d layers beside %d\n", more[0].image.Layers, few[0].image.Layers)
	for i, r := range more {
		fmt.Fprintf(w, "  %-16s %8.2f times as long, %+.1f ms for each layer more\n", r.Way, r.TotalSeconds/few[i].TotalSeconds, *r.PerLayerMilliseconds)
	}
}

// disks prints why an image has fewer mounts than layers.
func disks(w io.Writer, i flows.Image) {
	if i.Disks < i.Layers {
		fmt.Fprintf(w, "Of the %d layers, %d are different; Teleport mounts each of those once.\n", i.Layers, i.Disks)
	}
}

// reference is what is known of the original: its documentation's comparison in AKS.
const reference = `
Not measured here: Microsoft's own figures for Project Teleport (2019-2023),
of another image (azure-vote-front, 929 and 944 MB) on other machines
  1 layer             pulled 31.71 s, teleported 1.89 s
  28 layers           pulled 34.74 s, teleported 8.01 s: +226.6 ms a layer
`
