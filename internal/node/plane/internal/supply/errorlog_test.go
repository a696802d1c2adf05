package supply

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
)

// A container that reads what can't be had again and again must not fill the
// disk with log.
func TestErrorLog(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, nil))
	var e ErrorLog
	for range 100_000 {
		e.Report(log, "read failed")
	}
	// One a second, and this takes much less than ten.
	if n := strings.Count(out.String(), "\n"); n < 1 || n > 10 {
		t.Errorf("%d lines, want about one", n)
	}
}
