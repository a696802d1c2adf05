package fuse_test

import (
	"context"
	"fmt"
	"os"
	"testing"

	"sluice/internal/node/plane/fuse"
	"sluice/internal/node/plane/planetest"
)

// The test binary is also the holder and the daemon of the tests: real
// processes that can be killed.
const roleVariable = "SLUICE_TEST_ROLE"

func TestMain(m *testing.M) {
	planetest.Child()
	switch os.Getenv(roleVariable) {
	case "":
		os.Exit(m.Run())
	case "holder":
		if err := fuse.RunHolder(context.Background(), os.Args[len(os.Args)-1]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	case "daemon":
		runDaemon()
	}
}
