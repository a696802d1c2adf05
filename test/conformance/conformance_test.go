package conformance

import (
	"bufio"
	"context"
	"encoding/xml"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"syscall"
	"testing"
	"time"
)

const suite = "github.com/opencontainers/distribution-spec/conformance"

// everything turns on what the suite leaves out by default: the additions since
// 1.1 (OCI_VERSION=dev: canceling of uploads, tag parameters, digest headers
// demanded) and manifests that refer to what isn't there.
var everything = []string{
	"OCI_VERSION=dev",
	"OCI_API_BLOBS_UPLOAD_CANCEL=true",
	"OCI_API_BLOBS_DIGEST_HEADER=true",
	"OCI_API_MANIFESTS_DIGEST_HEADER=true",
	"OCI_API_MANIFESTS_TAG_PARAM=true",
	"OCI_DATA_SHA512=true",
}

func TestConformance(t *testing.T) {
	dir := t.TempDir()
	sluice, tester := filepath.Join(dir, "sluice"), filepath.Join(dir, "suite")
	build(t, "../..", sluice, "./cmd/sluice")
	build(t, ".", tester, suite)

	for _, tt := range []struct {
		name  string
		flags []string
		env   []string
	}{
		{"Default", nil, append([]string{"OCI_DATA_SPARSE=false"}, everything...)},
		{"Sparse", []string{"--allow-sparse"}, append([]string{"OCI_DATA_SPARSE=true"}, everything...)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			addr := serve(t, sluice, tt.flags...)
			results := t.TempDir()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, tester)
			cmd.Dir = results // it looks for a configuration file where it is
			cmd.Env = append(os.Environ(), tt.env...)
			cmd.Env = append(cmd.Env, "OCI_REGISTRY="+addr, "OCI_TLS=disabled", "OCI_RESULTS_DIR="+results, "OCI_LOG=error")
			output, err := cmd.CombinedOutput()
			report(t, filepath.Join(results, "junit.xml"))
			if err != nil {
				t.Errorf("the suite says: %v", err)
			}
			if t.Failed() {
				t.Logf("its output ends with:\n%s", tail(output, 4000))
			}
		})
	}
}

func build(t *testing.T, dir, output, pkg string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", output, pkg)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", pkg, err, out)
	}
}

var listening = regexp.MustCompile(`^listening on ([^ ,]+),`)

// serve starts the registry on a free port and returns its address.
func serve(t *testing.T, program string, flags ...string) string {
	t.Helper()
	logName := filepath.Join(t.TempDir(), "log")
	log, err := os.Create(logName)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	args := append([]string{"registry", "--data", t.TempDir(), "--listen", "127.0.0.1:0"}, flags...)
	cmd := exec.Command(program, args...)
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		kill := time.AfterFunc(10*time.Second, func() { cmd.Process.Kill() })
		defer kill.Stop()
		if err := cmd.Wait(); err != nil {
			t.Errorf("the registry didn't stop cleanly: %v", err)
		}
		if content, err := os.ReadFile(logName); err == nil && t.Failed() {
			t.Logf("the registry's log ends with:\n%s", tail(content, 4000))
		}
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	m := listening.FindStringSubmatch(line)
	if m == nil {
		t.Fatalf("the registry said %q (%v) instead of where it listens", line, err)
	}
	return m[1]
}

// junit is what we need of the suite's report.
type junit struct {
	Tests    int `xml:"tests,attr"`
	Failures int `xml:"failures,attr"`
	Errors   int `xml:"errors,attr"`
	Skipped  int `xml:"skipped,attr"`
	Disabled int `xml:"disabled,attr"`
	Suites   []struct {
		Cases []struct {
			Name    string `xml:"classname,attr"`
			Part    string `xml:"name,attr"`
			Status  string `xml:"status,attr"`
			Failure *struct {
				Message string `xml:"message,attr"`
				Data    string `xml:",chardata"`
			} `xml:"failure"`
			Error *struct {
				Message string `xml:"message,attr"`
				Data    string `xml:",chardata"`
			} `xml:"error"`
		} `xml:"testcase"`
	} `xml:"testsuite"`
}

// report fails the test for each case that failed, and unless enough passed.
func report(t *testing.T, name string) {
	t.Helper()
	content, err := os.ReadFile(name)
	if errors.Is(err, os.ErrNotExist) {
		t.Error("the suite left no report")
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	var r junit
	if err := xml.Unmarshal(content, &r); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	t.Logf("%d tests: %d failures, %d errors, %d skipped, %d disabled", r.Tests, r.Failures, r.Errors, r.Skipped, r.Disabled)
	for _, s := range r.Suites {
		for _, c := range s.Cases {
			switch {
			case c.Failure != nil:
				t.Errorf("FAILED %s/%s: %s\n%s", c.Name, c.Part, c.Failure.Message, tail([]byte(c.Failure.Data), 3000))
			case c.Error != nil:
				t.Errorf("ERROR %s/%s: %s\n%s", c.Name, c.Part, c.Error.Message, tail([]byte(c.Error.Data), 3000))
			}
		}
	}
	// A suite that finds nothing to test would pass as well.
	const least = 900
	if passed := r.Tests - r.Failures - r.Errors - r.Skipped - r.Disabled; passed < least || r.Failures+r.Errors+r.Skipped+r.Disabled > 0 {
		t.Errorf("%d of %d tests passed, want all of at least %d", passed, r.Tests, least)
	}
}

// tail returns at most the last n bytes.
func tail(b []byte, n int) []byte {
	return b[max(0, len(b)-n):]
}
