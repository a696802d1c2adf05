package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"sluice/internal/acr"
	"sluice/internal/auth"
	"sluice/internal/index"
	"sluice/internal/registry"
	"sluice/internal/storage"
	"sluice/internal/stored"
	"sluice/oci"
)

// managedRegistry serves a registry with management until the test ends, and
// logs the admin user in as docker would.
func managedRegistry(t *testing.T) (reg *stored.Registry, host string) {
	t.Helper()
	ctx := t.Context()
	store := new(storage.Memory)
	db, err := index.Open(ctx, index.Options{URL: "sqlite::memory:"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	reg = stored.New(store, db, stored.Options{SoftDelete: 24 * time.Hour})
	authority, err := auth.Open(ctx, store, auth.Options{Admin: auth.Admin{Enabled: true, Password: "secret"}, HashCost: 4})
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle("/acr/v1/", acr.New(reg, db, store, acr.Options{Authorizer: authority, Authority: authority, SoftDelete: 24 * time.Hour}))
	mux.Handle("/oauth2/", authority)
	server := httptest.NewServer(registry.Wrap(mux, registry.FrontOptions{Authorizer: authority}))
	t.Cleanup(server.Close)
	host = strings.TrimPrefix(server.URL, "http://")

	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	config := `{"auths":{"` + host + `":{"auth":"YWRtaW46c2VjcmV0"}}}` // admin:secret
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	return reg, host
}

// says runs the program and compares what it prints, with times replaced.
func says(t *testing.T, want string, args ...string) {
	t.Helper()
	stdout, stderr, err := runSluice(t, args...)
	got := regexp.MustCompile(`\d{4}-\d\d-\d\d \d\d:\d\d`).ReplaceAllString(stdout, "2026-01-02 03:04")
	if err != nil || got != want {
		t.Errorf("%s\n got %q\nwant %q\n%s %v", strings.Join(args, " "), got, want, stderr, err)
	}
}

// refuses runs the program and looks into its error.
func refuses(t *testing.T, want string, args ...string) {
	t.Helper()
	stdout, _, err := runSluice(t, args...)
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%s: %q, %v; want %q", strings.Join(args, " "), stdout, err, want)
	}
}

func TestRepositoryCommands(t *testing.T) {
	reg, host := managedRegistry(t)
	pushImage(t, reg, "team/app", "v1", "linux", "one")
	pushImage(t, reg, "team/app", "v2", "linux", "two")
	pushImage(t, reg, "tool", "v1", "linux", "one")

	says(t, "team/app\ntool\n", "repository", "list", "-r", host)
	says(t, "team/app\n", "repository", "list", "-r", host, "--top", "1")
	says(t, "[\n  \"team/app\",\n  \"tool\"\n]\n", "repository", "list", "-r", host, "-o", "json")
	shown := "repository      team/app\ncreated         2026-01-02 03:04\nupdated         2026-01-02 03:04\nmanifests       2\ntags            2\n" +
		"locked          -\nstreaming       no\nteleport        no\nanonymous pull  no\n"
	says(t, shown, "repository", "show", host+"/team/app")
	says(t, shown, "repository", "show", "team/app", "-r", host)
	says(t, shown, "repository", "show", host+"/team/app", "-r", host)

	refuses(t, "nothing to change", "repository", "update", host+"/team/app")
	refuses(t, "write true or false", "repository", "update", host+"/team/app", "--write-enabled", "maybe")
	says(t, strings.NewReplacer("locked          -", "locked          write,delete", "streaming       no", "streaming       yes").Replace(shown),
		"repository", "update", host+"/team/app", "--write-enabled", "false", "--delete-enabled=false", "--streaming-enabled", "true")
	refuses(t, "deleteEnabled", "repository", "delete", host+"/team/app", "--yes")
	says(t, strings.Replace(shown, "streaming       no", "streaming       yes", 1),
		"repository", "update", host+"/team/app", "--write-enabled", "true", "--delete-enabled", "true")

	stdout, _, err := runSluice(t, "repository", "usage", "-r", host)
	if lines := strings.Split(strings.TrimSpace(stdout), "\n"); err != nil || len(lines) != 4 ||
		!strings.HasPrefix(lines[0], "REPOSITORY") || !strings.HasPrefix(lines[3], "(the whole registry)") {
		t.Errorf("usage: %q, %v", stdout, err)
	}
	stdout, _, err = runSluice(t, "repository", "usage", host+"/tool", "-o", "json")
	var u acr.Usage
	if err == nil {
		err = json.Unmarshal([]byte(stdout), &u)
	}
	if err != nil || u.Repository != "tool" || u.Size < 2048 || u.Shared < 1024 || u.Shared >= u.Size {
		t.Errorf("usage: %s, %v", stdout, err)
	}

	refuses(t, "add --yes", "repository", "delete", host+"/team/app")
	says(t, "deleted team/app: 2 manifests, 2 tags\n", "repository", "delete", host+"/team/app", "-y")
	refuses(t, "repository team/app is unknown", "repository", "show", host+"/team/app")
	says(t, "REPOSITORY  DELETED\nteam/app    2026-01-02 03:04\n", "repository", "list-deleted", "-r", host)
	says(t, "restored 2 manifests of 2 in team/app\n", "repository", "restore", host+"/team/app")
	says(t, "team/app\ntool\n", "repository", "list", "-r", host)
	refuses(t, "no deleted manifests", "repository", "restore", host+"/team/app")

	refuses(t, "which registry", "repository", "list")
	refuses(t, "names no registry", "repository", "show", "team/app")
	refuses(t, "no tag and no digest", "repository", "show", host+"/team/app:v1")
	refuses(t, "usage: sluice repository show", "repository", "show")
	refuses(t, "--output \"xml\"", "repository", "list", "-r", host, "-o", "xml")
}

func TestManifestAndTagCommands(t *testing.T) {
	reg, host := managedRegistry(t)
	one := pushImage(t, reg, "app", "v1", "linux", "one").Digest
	two := pushImage(t, reg, "app", "v2", "windows", "two", "three").Digest
	time.Sleep(time.Millisecond)
	if _, err := reg.PushManifest(t.Context(), "app", "latest", oci.MediaTypeImageManifest, contentOf(t, reg, "app", two)); err != nil {
		t.Fatal(err)
	}

	stdout, _, err := runSluice(t, "manifest", "list", host+"/app", "--orderby", "time-asc")
	lines := strings.Split(strings.TrimSpace(stdout), "\n")
	if err != nil || len(lines) != 3 || !strings.HasPrefix(lines[1], shortDigest(one)+"  linux/amd64") || !strings.HasSuffix(lines[2], "  latest,v2") {
		t.Errorf("%q, %v", stdout, err)
	}
	stdout, _, err = runSluice(t, "manifest", "show", host+"/app:latest", "-o", "json")
	var m acr.Manifest
	if err == nil {
		err = json.Unmarshal([]byte(stdout), &m)
	}
	if err != nil || m.Digest != two || m.OS != "windows" || !slices.Equal(m.Tags, []string{"latest", "v2"}) {
		t.Errorf("%s, %v", stdout, err)
	}
	stdout, _, err = runSluice(t, "manifest", "update", host+"/app:v1", "--delete-enabled", "false")
	if err != nil || !strings.Contains(stdout, "locked      delete\n") {
		t.Errorf("%s, %v", stdout, err)
	}
	refuses(t, "deleteEnabled", "manifest", "delete", host+"/app@"+one.String(), "--yes")

	says(t, "TAG     DIGEST               UPDATED           LOCKED\n"+
		"v1      "+shortDigest(one)+"  2026-01-02 03:04  -\nv2      "+shortDigest(two)+"  2026-01-02 03:04  -\nlatest  "+shortDigest(two)+"  2026-01-02 03:04  -\n",
		"tag", "list", "-r", host, "app", "--orderby", "time_asc")
	says(t, "tag      v2\ndigest   "+two.String()+"\ncreated  2026-01-02 03:04\nupdated  2026-01-02 03:04\nlocked   delete\n",
		"tag", "update", host+"/app:v2", "--delete-enabled", "false")
	says(t, "deleted tag latest of app\n", "tag", "delete", host+"/app:latest", "-y")
	refuses(t, "has no tag latest", "tag", "show", host+"/app:latest")

	refuses(t, "add --yes", "manifest", "delete", host+"/app:v2")
	refuses(t, "deleteEnabled", "manifest", "delete", host+"/app:v2", "--yes")
	says(t, "tag      v2\ndigest   "+two.String()+"\ncreated  2026-01-02 03:04\nupdated  2026-01-02 03:04\nlocked   -\n",
		"tag", "update", host+"/app:v2", "--delete-enabled", "true")
	says(t, "deleted app@"+two.String()+", tags: v2\n", "manifest", "delete", host+"/app:v2", "--yes")
	stdout, _, err = runSluice(t, "manifest", "list-deleted", host+"/app")
	if err != nil || !strings.Contains(stdout, two.String()) || !strings.HasSuffix(stdout, "  v2\n") {
		t.Errorf("%q, %v", stdout, err)
	}
	refuses(t, "no deleted manifest that had the tag none", "manifest", "restore", host+"/app:none")
	says(t, "restored app:v2, "+two.String()+"\n", "manifest", "restore", host+"/app:v2")

	refuses(t, "which one", "manifest", "show", host+"/app")
	refuses(t, "name a tag", "tag", "show", host+"/app@"+one.String())
	refuses(t, "--orderby \"size\"", "tag", "list", host+"/app", "--orderby", "size")
	refuses(t, "has no manifest", "manifest", "show", host+"/app@"+oci.DigestOf(nil).String())
}

func contentOf(t *testing.T, reg oci.Registry, repo string, digest oci.Digest) []byte {
	t.Helper()
	m, err := reg.GetManifest(t.Context(), repo, digest.String())
	if err != nil {
		t.Fatal(err)
	}
	return m.Content
}

func TestTokenAndScopeMapCommands(t *testing.T) {
	reg, host := managedRegistry(t)
	pushImage(t, reg, "team/app", "v1", "linux", "one")
	says(t, "scope map    readers\ndescription  who reads\nrights       team/*=metadata/read,content/read\n             tool=content/read\n",
		"scope-map", "create", "-r", host, "readers", "--description", "who reads", "--repository", "team/*=metadata/read,content/read", "--repository", "tool=content/read")
	refuses(t, "exists already", "scope-map", "create", "-r", host, "readers", "--repository", "x=content/read")
	says(t, "scope map    readers\ndescription  who reads\nrights       team/*=metadata/read,content/read,metadata/write\n",
		"scope-map", "update", "-r", host, "readers", "--add-repository", "team/*=metadata/write", "--remove-repository", "tool=content/read")
	refuses(t, "isn't one of content/read", "scope-map", "create", "-r", host, "x", "--repository", "x=pull")
	refuses(t, "which rights", "scope-map", "create", "-r", host, "x")
	refuses(t, "no rights left", "scope-map", "update", "-r", host, "readers", "--remove-repository", "team/*=metadata/read,content/read,metadata/write")
	stdout, _, err := runSluice(t, "scope-map", "list", "-r", host)
	if err != nil || !strings.Contains(stdout, "_repositories_pull ") || !strings.Contains(stdout, "readers ") {
		t.Errorf("%s, %v", stdout, err)
	}

	stdout, _, err = runSluice(t, "token", "create", "-r", host, "ci", "--scope-map", "readers", "--expires-in", "90d", "-o", "json")
	var made acr.Token
	if err == nil {
		err = json.Unmarshal([]byte(stdout), &made)
	}
	if err != nil || len(made.Passwords) != 2 || made.Passwords[0].Value == "" || time.Until(made.Passwords[1].Expiry).Round(time.Hour) != 90*24*time.Hour {
		t.Fatalf("%s, %v", stdout, err)
	}
	stdout, _, err = runSluice(t, "token", "list", "-r", host)
	if err != nil || !regexp.MustCompile(`(?m)^ci +enabled +readers +[-0-9: ]+  until [-0-9: ]+  until [-0-9: ]+$`).MatchString(stdout) {
		t.Errorf("%s, %v", stdout, err)
	}

	// The token by its password, of which there's nothing in docker's configuration.
	password := made.Passwords[0].Value
	asToken := func(password string, args ...string) (string, error) {
		cmd := newCommand()
		cmd.SetArgs(append(args, "--username", "ci", "--password-stdin"))
		cmd.SetIn(strings.NewReader(password + "\n"))
		var out strings.Builder
		cmd.SetOut(&out)
		cmd.SetErr(&out)
		err := cmd.ExecuteContext(t.Context())
		return out.String(), err
	}
	if out, err := asToken(password, "repository", "show", host+"/team/app"); err != nil {
		t.Errorf("%s, %v", out, err)
	}
	if _, err := asToken(password, "repository", "list", "-r", host); err == nil {
		t.Error("a token lists the catalog")
	}
	if _, err := asToken("wrong", "repository", "show", host+"/team/app"); err == nil {
		t.Error("a wrong password is good")
	}
	if _, err := asToken("", "repository", "show", host+"/team/app"); err == nil || !strings.Contains(err.Error(), "no password on standard input") {
		t.Errorf("without a password: %v", err)
	}

	refuses(t, "add --yes", "token", "credential", "generate", "-r", host, "ci", "--password1")
	if stdout, _, err = runSluice(t, "token", "credential", "generate", "-r", host, "ci", "--password1", "--yes"); err != nil || !strings.Contains(stdout, "  (never expires)") || strings.Contains(stdout, "password2") {
		t.Errorf("%s, %v", stdout, err)
	}
	if _, err := asToken(password, "repository", "show", host+"/team/app"); err == nil {
		t.Error("the replaced password is good")
	}
	says(t, "deleted password2 of token ci\n", "token", "credential", "delete", "-r", host, "ci", "--password2", "-y")
	says(t, "token      ci\nscope map  readers\nstatus     disabled\ncreated    2026-01-02 03:04\npassword1  made 2026-01-02 03:04  (never expires)\n",
		"token", "update", "-r", host, "ci", "--status", "disabled")
	refuses(t, "token ci has it", "scope-map", "delete", "-r", host, "readers", "--yes")

	// With a scope map of its own.
	says(t, "token      bot\nscope map  bot-scope-map\nstatus     enabled\ncreated    2026-01-02 03:04\npasswords  none: see sluice token credential generate\n",
		"token", "create", "-r", host, "bot", "--repository", "team/*=content/read", "--no-passwords")
	says(t, "scope map    bot-scope-map\ndescription  rights of token bot\nrights       team/*=content/read\n", "scope-map", "show", "-r", host, "bot-scope-map")
	says(t, "deleted token bot\n", "token", "delete", "-r", host, "bot", "--yes")
	says(t, "deleted scope map bot-scope-map\n", "scope-map", "delete", "-r", host, "bot-scope-map", "--yes")

	refuses(t, "which rights", "token", "create", "-r", host, "x")
	refuses(t, "there is no scope map", "token", "create", "-r", host, "x", "--scope-map", "none")
	refuses(t, "--expires-in \"soon\"", "token", "create", "-r", host, "x", "--scope-map", "readers", "--expires-in", "soon")
	refuses(t, "expired", "token", "credential", "generate", "-r", host, "ci", "-y", "--expires", "2020-01-31")
	refuses(t, "not found", "token", "show", "-r", host, "none")
	refuses(t, "--status \"on\"", "token", "update", "-r", host, "ci", "--status", "on")
}

func TestAdminCommands(t *testing.T) {
	_, host := managedRegistry(t)
	says(t, "removed 0 blobs of 0 B, and for good 0 deleted manifests\n", "admin", "gc", "-r", host)
	stdout, stderr, err := runSluice(t, "admin", "import", "-r", host, "--no-wait", "127.0.0.1:1/library/debian:12", "mirror/debian:12", "-o", "json")
	var op acr.Operation
	if err == nil {
		err = json.Unmarshal([]byte(stdout), &op)
	}
	if err != nil || op.Resource != "mirror/debian:12" || op.Status != acr.StatusNotStarted || !strings.Contains(stderr, "sluice admin operation show -r "+host+" "+op.ID) {
		t.Fatalf("%s, %s, %v", stdout, stderr, err)
	}
	says(t, "operation  "+op.ID+"\nresource   mirror/debian:12\nstatus     NotStarted\nstarted    2026-01-02 03:04\n", "admin", "operation", "show", "-r", host, op.ID)
	says(t, "operation  "+op.ID+"\nresource   mirror/debian:12\nstatus     Canceled\nstarted    2026-01-02 03:04\n", "admin", "operation", "cancel", "-r", host, op.ID)
	refuses(t, "does not exist", "admin", "operation", "show", "-r", host, "none")
	refuses(t, "target", "admin", "import", "-r", host, "127.0.0.1:1/a:b", "C:d")
}

// The shell completes verbs and the values of flags.
func TestManagementCompletes(t *testing.T) {
	for want, args := range map[string][]string{
		"list-deleted":                      {"repository", ""},
		"json":                              {"tag", "list", "-o", ""},
		"time-desc":                         {"manifest", "list", "--orderby", "time"},
		"false":                             {"repository", "update", "--write-enabled", ""},
		"disabled":                          {"token", "update", "--status", ""},
		"team/*=content/read,metadata/read": {"scope-map", "create", "--repository", "team/*=content/read,"},
	} {
		stdout, _, err := runSluice(t, append([]string{"__complete"}, args...)...)
		if err != nil || !strings.Contains(stdout, want) {
			t.Errorf("%v completes to %q, %v", args, stdout, err)
		}
	}
}
