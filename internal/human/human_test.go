package human_test

import (
	"math"
	"testing"

	"sluice/internal/human"
)

func TestBytes(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", -5: "-5 B", 999: "999 B", 1000: "1.0 kB", 1049: "1.0 kB", 1050: "1.1 kB", 999_949: "999.9 kB", 999_950: "1.0 MB",
		123_456_789: "123.5 MB", 5e12: "5.0 TB", math.MaxInt64: "9.2 EB",
	} {
		if got := human.Bytes(n); got != want {
			t.Errorf("%d bytes are %q, want %q", n, got, want)
		}
	}
}
