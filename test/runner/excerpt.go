package main

import (
	"slices"
	"strings"
)

// Bounds of what is shown of a test that didn't end, in lines: what it printed
// last, and of the dump that follows if it had to be ended. `go test -json` takes
// that for the output of whichever test printed last, all goroutines of it.
const (
	maxSaid = 60
	maxDump = 140
)

// excerpt shortens the output of a test that didn't end. Of a dump it keeps the
// heading, which for a time-out lists the tests that were running, and those
// goroutines first that are in a line of a test.
func excerpt(output []string) []string {
	at := slices.IndexFunc(output, func(s string) bool {
		return strings.HasPrefix(s, "panic: ") || strings.HasPrefix(s, "fatal error: ")
	})
	if at < 0 {
		return last(output, maxSaid+maxDump)
	}
	said, dump := output[:at], output[at:]
	var parts [][]string // the heading, then goroutines
	for _, line := range dump {
		if len(parts) == 0 || strings.HasPrefix(line, "goroutine ") {
			parts = append(parts, nil)
		}
		parts[len(parts)-1] = append(parts[len(parts)-1], line)
	}
	slices.SortStableFunc(parts[1:], func(a, b []string) int { return rank(a) - rank(b) })
	kept := last(said, maxSaid)
	for left, i := maxDump, 0; i < len(parts); i++ {
		n := min(len(parts[i]), left)
		kept = append(kept, parts[i][:n]...)
		if left -= n; left == 0 {
			return append(kept, "…\n")
		}
	}
	return kept
}

// rank sorts a goroutine: the less, the more it says about a test.
func rank(goroutine []string) int {
	if slices.ContainsFunc(goroutine, func(s string) bool { return strings.Contains(s, "_test.go:") }) {
		return 0
	}
	return 1
}

// last returns the last n lines, and says if there were more.
func last(lines []string, n int) []string {
	if len(lines) <= n {
		return slices.Clone(lines)
	}
	return append([]string{"…\n"}, lines[len(lines)-n:]...)
}
