// Package human says quantities as people read them. Programs are told the numbers
// themselves.
package human

import "fmt"

// Bytes says a number of bytes in the decimal unit that fits: 1.2 MB.
func Bytes(n int64) string {
	const units = "kMGTPE"
	if n < 1000 {
		return fmt.Sprintf("%d B", n)
	}
	f, u := float64(n), -1
	for f >= 999.95 && u < len(units)-1 {
		f /= 1000
		u++
	}
	return fmt.Sprintf("%.1f %cB", f, units[u])
}
