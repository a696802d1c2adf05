package main

import (
	"bytes"
	"strings"
	"testing"

	"sluice/internal/node/credentials"
)

// Whose credentials are used is in the table, why others aren't beneath it.
func TestStatusShowsCredentials(t *testing.T) {
	var out bytes.Buffer
	err := printCredentials(&out, []credentials.Status{
		{Host: "a.io", Repository: "app", Source: "pull secrets", Passed: []credentials.Outcome{{Source: "CRI", Reason: "refused: HTTP 401"}}},
		{Host: "b.io", Repository: "app", Error: "refused without credentials: HTTP 403"},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"a.io      app         pull secrets   -\n", "b.io      app         none: refused  -\n", "  CRI: refused: HTTP 401\n", "  refused without credentials: HTTP 403\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q isn't in\n%s", want, &out)
		}
	}
}
