package journal_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"sluice/internal/journal"
)

// The tests' process runs twice: as itself, and in a mount namespace with a
// journald of its own, where TestInJournal writes what TestJournal reads.
const inNamespace = "SLUICE_TEST_JOURNAL"

// journald is where Debian has it.
const journald = "/lib/systemd/systemd-journald"

func TestJournal(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("NOT TESTED: what a journald makes of the log: this needs root, for a mount namespace")
	}
	for _, program := range []string{journald, "journalctl", "unshare"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip("NOT TESTED: what a journald makes of the log: ", err)
		}
	}
	ctx := t.Context()
	cmd := exec.CommandContext(ctx, "unshare", "-m", os.Args[0], "-test.run=^TestInJournal$", "-test.count=1")
	cmd.Env = append(os.Environ(), inNamespace+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("in a namespace with a journald: %v\n%s", err, out)
	}
	if !bytes.Contains(out, []byte("PASS")) || bytes.Contains(out, []byte("SKIP")) {
		t.Errorf("in a namespace with a journald:\n%s", out)
	}
}

// TestInJournal is run by TestJournal.
func TestInJournal(t *testing.T) {
	if os.Getenv(inNamespace) == "" {
		t.Skip("TestJournal runs it in a namespace of its own")
	}
	startJournald(t)
	if !journal.Reachable() {
		t.Fatal("a journald runs and isn't reachable")
	}
	if journal.Connected() {
		t.Error("standard error isn't the journal's, but Connected says so")
	}
	log := slog.New(journal.New("teleport-test", slog.LevelInfo))
	log.Debug("not wanted")
	layer := "sha256:" + strings.Repeat("ab", 32)
	log.With("image", "r.test/app:1").WithGroup("share").Warn("a layer's disk can't be read",
		"layer", layer, "error", errors.New("first line\nsecond = \"line\""), "took", 1500*time.Millisecond,
		slog.Group("login", "user-name", "sluice-1"), "_PID", 1, "message", "x", "99", "", "bad", "\xff\xfe")
	log.Error("large", "value", strings.Repeat("v", 3<<20))
	read := func(match ...string) (all []map[string]any) {
		t.Helper()
		for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
			out, err := exec.CommandContext(t.Context(), "journalctl", append([]string{"-o", "json", "--all", "-D", "/run/log/journal"}, match...)...).Output()
			if err == nil && len(out) > 0 {
				d := json.NewDecoder(bytes.NewReader(out))
				for d.More() {
					var entry map[string]any
					if err := d.Decode(&entry); err != nil {
						t.Fatal(err)
					}
					all = append(all, entry)
				}
				return all
			}
			if time.Now().After(end) {
				t.Fatalf("journalctl %s finds nothing: %v", match, err)
			}
		}
	}
	found := read("SHARE_LAYER=" + layer)
	if len(found) != 1 {
		t.Fatalf("%d entries, want 1: %v", len(found), found)
	}
	for field, want := range map[string]string{
		"IMAGE": "r.test/app:1", "SHARE_ERROR": "first line\nsecond = \"line\"", "SHARE_TOOK": "1.5s",
		"SHARE_LOGIN_USER_NAME": "sluice-1", "PRIORITY": "4", "SYSLOG_IDENTIFIER": "teleport-test", "SHARE_BAD": "�",
		"MESSAGE": `a layer's disk can't be read image=r.test/app:1 share.layer=` + layer + ` share.error="first line\nsecond = \"line\"" share.took=1.5s share.login.user-name=sluice-1 share._PID=1 share.message=x share.99="" share.bad=�`,
	} {
		if got := fmt.Sprint(found[0][field]); got != want {
			t.Errorf("%s is %q, want %q", field, got, want)
		}
	}
	large := read("SYSLOG_IDENTIFIER=teleport-test", "PRIORITY=3")
	if v := fmt.Sprint(large[0]["VALUE"]); len(large) != 1 || len(v) != 8<<10 {
		t.Errorf("%d large entries, the first of %d bytes; want 1 of %d", len(large), len(v), 8<<10)
	}
	if all := read("SYSLOG_IDENTIFIER=teleport-test"); len(all) != 2 {
		t.Errorf("%d entries, want 2", len(all))
	}
	startConnected(t)
}

// startConnected runs TestConnectedChild as systemd starts a service: standard error
// is a stream of the journal's (sd_journal_stream_fd), which JOURNAL_STREAM names.
func startConnected(t *testing.T) {
	t.Helper()
	conn, err := net.Dial("unix", "/run/systemd/journal/stdout")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "teleport-stream\n\n6\n0\n0\n0\n0\n"); err != nil {
		t.Fatal(err)
	}
	stream, err := conn.(*net.UnixConn).File()
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	fi, err := stream.Stat()
	if err != nil {
		t.Fatal(err)
	}
	st := fi.Sys().(*syscall.Stat_t)
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestConnectedChild$", "-test.v")
	cmd.Env = append(os.Environ(), fmt.Sprintf("JOURNAL_STREAM=%d:%d", st.Dev, st.Ino))
	cmd.Stderr = stream
	out, err := cmd.Output()
	if err != nil || !bytes.Contains(out, []byte("--- PASS")) {
		t.Errorf("a service: %v\n%s", err, out)
	}
}

// TestConnectedChild is run by startConnected.
func TestConnectedChild(t *testing.T) {
	if os.Getenv("JOURNAL_STREAM") == "" || os.Getenv(inNamespace) == "" {
		t.Skip("TestJournal runs it as a service")
	}
	if !journal.Connected() {
		t.Error("standard error is the journal's, and Connected doesn't say so")
	}
}

// startJournald starts one for this mount namespace, until the test ends.
func startJournald(t *testing.T) {
	t.Helper()
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", "/run", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"/run/systemd/journal", "/run/log/journal"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	cmd := exec.Command(journald)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat("/run/systemd/journal/socket"); err == nil && journal.Reachable() {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s isn't there: %s", journald, out.Bytes())
		}
	}
}

// What JOURNAL_STREAM says is believed only of standard error itself.
func TestConnected(t *testing.T) {
	for _, stream := range []string{"", "nonsense", "1:1", "-1:99999999999999999999"} {
		t.Setenv("JOURNAL_STREAM", stream)
		if journal.Connected() {
			t.Errorf("JOURNAL_STREAM=%q: standard error goes to the journal", stream)
		}
	}
}
