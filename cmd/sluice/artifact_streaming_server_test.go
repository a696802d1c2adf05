package main

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"sluice/cmd/internal/program"
	"sluice/internal/acr"
	"sluice/internal/remote"
	"sluice/oci"
)

// converting starts a registry that converts, and returns its address and a
// client that pushes to it.
func converting(t *testing.T, args ...string) (addr string, reg *remote.Registry) {
	t.Helper()
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	addr, _ = startRegistry(t, append([]string{"--data", filepath.Join(t.TempDir(), "data")}, args...)...)
	reg, err := remote.New(addr, remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return addr, reg
}

func streamingVerb(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	return runSluice(t, append([]string{"artifact-streaming"}, args...)...)
}

func TestTheRegistryConverts(t *testing.T) {
	addr, reg := converting(t)
	subject := pushImage(t, reg, "team/app", "v1", "linux", "one", strings.Repeat("two ", 300_000))

	stdout, stderr, err := streamingVerb(t, "create", "--registry", "http://"+addr, "--image", "team/app:v1", "-o", "json")
	if err != nil {
		t.Fatal(err, stderr)
	}
	var doc struct {
		Subject   oci.Digest
		Artifacts []createdArtifact
	}
	if err := json.Unmarshal([]byte(stdout), &doc); err != nil {
		t.Fatal(err)
	}
	if doc.Subject != subject.Digest || len(doc.Artifacts) != 1 || doc.Artifacts[0].Existed || doc.Artifacts[0].Gunzip != "" || doc.Artifacts[0].OriginalSize == 0 {
		t.Errorf("it printed %s", stdout)
	}
	if stdout, stderr, err = streamingVerb(t, "create", addr+"/team/app:v1"); err != nil || !strings.Contains(stderr, "The streaming artifact for image '"+addr+"/team/app:v1' already exists. Skipping request.") || !strings.Contains(stdout, "existed") {
		t.Errorf("the second time: %q, %q, %v", stdout, stderr, err)
	}

	// The type is the registry's own; who converts by himself learns so at once.
	pushImage(t, reg, "team/app", "v2", "linux", "three")
	if _, _, err := streamingVerb(t, "create", "--local", addr+"/team/app:v2"); err == nil || !strings.Contains(err.Error(), "leave --local, --platform") {
		t.Errorf("--local: %v", err)
	}
	for want, args := range map[string][]string{
		"UNSUPPORTED_PLATFORM": {addr + "/team/app:windows"},
		"RESOURCE_NOT_FOUND":   {addr + "/team/app:nonesuch"},
		"--no-wait is for":     {addr + "/team/app:v2", "--no-wait", "--layers", "1"},
	} {
		pushImage(t, reg, "team/app", "windows", "windows", "four")
		if _, _, err := streamingVerb(t, append([]string{"create"}, args...)...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", args, err, want)
		}
	}
}

func TestOperations(t *testing.T) {
	addr, reg := converting(t)
	pushImage(t, reg, "team/app", "v1", "linux", strings.Repeat("one ", 300_000))
	stdout, stderr, err := streamingVerb(t, "create", "-r", addr, "-t", "team/app:v1", "--no-wait", "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	var op acr.Operation
	if err := json.Unmarshal([]byte(stdout), &op); err != nil || op.ID == "" {
		t.Fatalf("it printed %q, %v", stdout, err)
	}
	hint := regexp.MustCompile("`sluice artifact-streaming operation show -r (\\S+) --repository team/app --id ([0-9a-f-]{36})`").FindStringSubmatch(stderr)
	if hint == nil || hint[1] != addr || hint[2] != op.ID {
		t.Errorf("the hint is %q", stderr)
	}
	for deadline := time.Now().Add(time.Minute); op.Status != acr.StatusSucceeded; time.Sleep(20 * time.Millisecond) {
		if stdout, _, err = streamingVerb(t, "operation", "show", "-r", addr, "--repository", "team/app", "--id", op.ID, "-o", "json"); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal([]byte(stdout), &op); err != nil {
			t.Fatal(err)
		}
		if time.Now().After(deadline) {
			t.Fatalf("it doesn't end: %+v", op)
		}
	}
	if stdout, _, err = streamingVerb(t, "operation", "show", "-t", addr+"/team/app:v1"); err != nil || !strings.Contains(stdout, op.ID) || !strings.Contains(stdout, "Succeeded") {
		t.Errorf("by the image: %q, %v", stdout, err)
	}
	if stdout, _, err = streamingVerb(t, "operation", "cancel", "-t", addr+"/team/app:v1"); err != nil || !strings.Contains(stdout, "Succeeded") {
		t.Errorf("canceling what has ended: %q, %v", stdout, err)
	}
	pushImage(t, reg, "team/app", "v2", "linux", "two")
	for want, args := range map[string][]string{
		"Give either":             {"-r", addr, "--id", op.ID},
		"or --image":              {"-r", addr, "--id", op.ID, "--repository", "team/app", "--image", "team/app:v1"},
		"OPERATION_UNKNOWN":       {"-r", addr, "--id", "nonesuch", "--repository", "team/app"},
		"there was no conversion": {"-t", addr + "/team/app:v2"},
	} {
		if _, _, err := streamingVerb(t, append([]string{"operation", "show"}, args...)...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", args, err, want)
		}
	}
}

func TestShowAndUpdateStreaming(t *testing.T) {
	addr, reg := converting(t)
	old := pushImage(t, reg, "team/app", "old", "linux", "one")
	if stdout, _, err := streamingVerb(t, "show", "-r", addr, "--repository", "team/app", "-o", "json"); err != nil || !strings.Contains(stdout, `"convertPushedImages": false`) {
		t.Errorf("show: %q, %v", stdout, err)
	}
	if _, _, err := streamingVerb(t, "update", addr+"/team/app", "--enable-streaming", "true", "--backfill"); err != nil {
		t.Fatal(err)
	}
	if stdout, _, err := streamingVerb(t, "show", addr+"/team/app"); err != nil || !strings.Contains(stdout, "yes") {
		t.Errorf("show: %q, %v", stdout, err)
	}
	pushed := pushImage(t, reg, "team/app", "new", "linux", "two")
	for _, subject := range []oci.Digest{old.Digest, pushed.Digest} {
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
			if found, err := artifactsOf(t.Context(), reg, "team/app", subject); err == nil && len(found) == 1 {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s was not converted", subject)
			}
		}
	}
	for want, args := range map[string][]string{
		"--enable-streaming true or false": {addr + "/team/app"},
		"needs --enable-streaming true":    {addr + "/team/app", "--enable-streaming", "false", "--backfill"},
		"NAME_UNKNOWN":                     {addr + "/nonesuch", "--enable-streaming", "false"},
	} {
		if _, _, err := streamingVerb(t, append([]string{"update"}, args...)...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", args, err, want)
		}
	}
}

func TestListInspectVerifyDelete(t *testing.T) {
	addr, reg := converting(t)
	pushImage(t, reg, "team/app", "v1", "linux", "base", strings.Repeat("one ", 300_000))
	pushImage(t, reg, "team/app", "v2", "linux", "base", "two")
	pushImage(t, reg, "team/app", "v3", "linux", "three")
	for _, tag := range []string{"v1", "v2"} {
		if _, _, err := streamingVerb(t, "create", addr+"/team/app:"+tag); err != nil {
			t.Fatal(err)
		}
	}
	stdout, _, err := streamingVerb(t, "list", "-r", addr, "team/app", "-o", "json")
	var list []listedImage
	if err := errors.Join(err, json.Unmarshal([]byte(stdout), &list)); err != nil {
		t.Fatal(err)
	}
	if len(list) != 3 || list[0].Image != "team/app:v1" || list[0].Artifacts[0].Artifact == "" || list[0].Artifacts[0].Format != "erofs" ||
		list[2].Artifacts[0].Artifact != "" || list[2].Artifacts[0].Layers != 1 {
		t.Errorf("list: %s", stdout)
	}
	if stdout, _, err = streamingVerb(t, "list", addr+"/team/app:v2"); err != nil || !strings.Contains(stdout, "team/app:v2") || strings.Contains(stdout, ":v1") {
		t.Errorf("list of one: %q, %v", stdout, err)
	}

	stdout, _, err = streamingVerb(t, "inspect", addr+"/team/app:v1", "-o", "json")
	var inspected []inspected
	if err := errors.Join(err, json.Unmarshal([]byte(stdout), &inspected)); err != nil {
		t.Fatal(err)
	}
	if a := inspected[0]; len(a.LayerDetails) != 2 || strings.Join(a.LayerDetails[0].SharedWith, " ") != ":v2" || a.LayerDetails[1].SharedWith != nil ||
		a.LayerDetails[1].TarSize < 1_200_000 || a.LayerDetails[1].Chunks < 4 || a.Mount == 0 || a.Chunks == 0 || a.Artifact != list[0].Artifacts[0].Artifact {
		t.Errorf("inspect: %s", stdout)
	}
	if stdout, _, err = streamingVerb(t, "inspect", addr+"/team/app:v1"); err != nil || !strings.Contains(stdout, "boot pack") {
		t.Errorf("inspect: %q, %v", stdout, err)
	}

	stdout, _, err = streamingVerb(t, "verify", addr+"/team/app:v1", "--mount=false")
	if err != nil || !strings.Contains(stdout, "as it should be") {
		t.Errorf("verify: %q, %v", stdout, err)
	}
	if _, _, err := streamingVerb(t, "verify", addr+"/team/app:v3", "--mount=false"); err == nil || !strings.Contains(err.Error(), "no streaming artifact to verify") {
		t.Errorf("verify of nothing: %v", err)
	}

	if _, _, err := streamingVerb(t, "delete", addr+"/team/app:v1"); err == nil || !strings.Contains(err.Error(), "--yes") {
		t.Errorf("delete without a terminal: %v", err)
	}
	if stdout, _, err = streamingVerb(t, "delete", addr+"/team/app:v1", "--yes"); err != nil || !strings.Contains(stdout, "deleted 1 streaming artifact") {
		t.Errorf("delete: %q, %v", stdout, err)
	}
	if _, _, err := streamingVerb(t, "delete", addr+"/team/app:v1", "--yes"); err == nil || !strings.Contains(err.Error(), "has no streaming artifact") {
		t.Errorf("delete of nothing: %v", err)
	}
	if stdout, _, err = streamingVerb(t, "create", addr+"/team/app:v1"); err != nil || strings.Contains(stdout, "existed") {
		t.Errorf("again: %q, %v", stdout, err)
	}
}

// ^C ends the waiting, says so, and tells what to do.
func TestInterruptedWaiting(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	const id = "7c7f2b0e-0000-4000-8000-000000000000"
	digest := oci.DigestOf(nil).String()
	server := startFake(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		switch p := r.URL.Path; {
		case p == "/acr/v1/app/_streaming":
			w.Write([]byte(`{"convertPushedImages":false}`))
		case p == "/acr/v1/app/_tags/v1":
			w.Write([]byte(`{"tag":{"name":"v1","digest":"` + digest + `"}}`))
		case strings.HasPrefix(p, "/v2/app/referrers/"):
			w.Header().Set("Content-Type", oci.MediaTypeIndex)
			w.Write([]byte(`{"schemaVersion":2,"mediaType":"` + oci.MediaTypeIndex + `","manifests":[]}`))
		case p == "/acr/v1/app/_streaming/"+digest && r.Method == http.MethodGet:
			w.Write([]byte(`{"id":"` + id + `","status":"Running"}`))
		case p == "/acr/v1/app/_operations/"+id:
			w.Write([]byte(`{"id":"` + id + `","status":"Running","progress":"8%"}`))
			cancel()
		default:
			http.NotFound(w, r)
		}
	})
	cmd := newCommand()
	var stderr strings.Builder
	cmd.SetArgs([]string{"artifact-streaming", "create", server + "/app:v1"})
	cmd.SetErr(&stderr)
	err := cmd.ExecuteContext(ctx)
	var coded *program.CodedError
	if !errors.As(err, &coded) || coded.Code != 130 || !strings.Contains(err.Error(), "goes on converting") || !strings.Contains(err.Error(), "operation cancel -r "+server+" --repository app --id "+id) {
		t.Errorf("got %v", err)
	}
	if !strings.Contains(stderr.String(), "is being converted already") {
		t.Errorf("it said %q", &stderr)
	}
}

// startFake serves what a test needs of a registry.
func startFake(t *testing.T, handler http.HandlerFunc) (addr string) {
	t.Helper()
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: handler}
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	t.Cleanup(func() { server.Close(); <-done })
	return listener.Addr().String()
}
