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
	"slices"
	"syscall"
	"testing"
	"time"

	"sluice/test/bed"
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
	sluice, tester := programs(t)
	for _, tt := range []struct {
		name string
		env  []string // of the suite
		more []string // of the registry
	}{
		{"Default", []string{"OCI_DATA_SPARSE=false"}, nil},
		{"Sparse", []string{"OCI_DATA_SPARSE=true"}, []string{"SLUICE_REGISTRY_PUSH_ALLOW_SPARSE=true"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conforms(t, tester, serve(t, sluice, tt.more...), tt.env...)
		})
	}
}

// TestBackends runs the suite on a registry on each of the real backends.
func TestBackends(t *testing.T) {
	sluice, tester := programs(t)
	for name, env := range map[string]func(t *testing.T) []string{
		"Azurite":    azurite,
		"MinIO":      minio,
		"PostgreSQL": postgres,
	} {
		t.Run(name, func(t *testing.T) {
			conforms(t, tester, serve(t, sluice, env(t)...), "OCI_DATA_SPARSE=false")
		})
	}
}

// The backends are empty, end with the test, and make a registry use them by
// its environment.

func azurite(t *testing.T) []string {
	t.Helper()
	a, err := bed.StartAzurite(t.Context(), "../..", t.TempDir(), func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Stop)
	if err := a.NewContainer(t.Context(), "images"); err != nil {
		t.Fatal(err)
	}
	return a.RegistryEnv("images")
}

func minio(t *testing.T) []string {
	t.Helper()
	m, err := bed.StartMinIO(t.Context(), "../..", t.TempDir(), func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Stop)
	if err := m.NewBucket("images"); err != nil {
		t.Fatal(err)
	}
	return m.RegistryEnv("images")
}

func postgres(t *testing.T) []string {
	t.Helper()
	p, err := bed.StartPostgres(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	url, err := p.NewDatabase(t.Context(), "registry")
	if err != nil {
		t.Fatal(err)
	}
	return []string{"SLUICE_REGISTRY_DATABASE_URL=" + url}
}

// programs builds the registry and the suite.
func programs(t *testing.T) (sluice, tester string) {
	t.Helper()
	dir := t.TempDir()
	sluice, err := bed.BuildSluice(t.Context(), "../..", dir)
	if err != nil {
		t.Fatal(err)
	}
	tester = filepath.Join(dir, "suite")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", tester, suite).CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", suite, err, out)
	}
	return sluice, tester
}

// conforms runs the suite on the registry at addr.
func conforms(t *testing.T, tester, addr string, env ...string) {
	t.Helper()
	results := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, tester)
	cmd.Dir = results // it looks for a configuration file where it is
	cmd.Env = slices.Concat(os.Environ(), everything, env,
		[]string{"OCI_REGISTRY=" + addr, "OCI_TLS=disabled", "OCI_RESULTS_DIR=" + results, "OCI_LOG=error"})
	output, err := cmd.CombinedOutput()
	report(t, filepath.Join(results, "junit.xml"))
	if err != nil {
		t.Errorf("the suite says: %v", err)
	}
	if t.Failed() {
		t.Logf("its output ends with:\n%s", tail(output, 4000))
	}
}

var listening = regexp.MustCompile(`^listening on ([^ ,]+),`)

// serve starts the registry on a free port and returns its address.
// env is its configuration beyond an empty data directory.
func serve(t *testing.T, program string, env ...string) string {
	t.Helper()
	logName := filepath.Join(t.TempDir(), "log")
	log, err := os.Create(logName)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(program, "registry", "--data", t.TempDir(), "--listen", "127.0.0.1:0")
	cmd.Env = append(os.Environ(), env...)
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
		kill := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() })
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
