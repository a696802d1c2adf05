package mountserver_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice/internal/auth"
	"sluice/internal/index"
	"sluice/internal/registry"
	"sluice/internal/remote"
	"sluice/internal/storage"
	"sluice/internal/stored"
	"sluice/internal/teleport"
	"sluice/internal/teleport/mountapi"
	"sluice/internal/teleport/mountserver"
	"sluice/internal/teleport/samba"
	"sluice/oci"
)

const adminPassword = "the admin's password"

// bench is a registry with the API, nobody at work yet.
type bench struct {
	t         testing.TB
	reg       *stored.Registry
	authority *auth.Authority
	teleport  *teleport.Service
	handler   http.Handler // of the API, without the server's mux
	host      string
}

func newBench(t testing.TB) *bench {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	store := new(storage.Memory)
	db, err := index.Open(t.Context(), index.Options{URL: "sqlite::memory:"})
	check(err)
	t.Cleanup(func() { db.Close() })
	b := &bench{t: t, reg: stored.New(store, db, stored.Options{Expand: true})}
	b.authority, err = auth.Open(t.Context(), store, auth.Options{Admin: auth.Admin{Enabled: true, Password: adminPassword}, HashCost: 4})
	check(err)
	b.teleport, err = teleport.New(b.reg, db, teleport.Options{Directory: t.TempDir(), MaxLayer: 1 << 20})
	check(err)
	keeper, err := samba.Open(t.Context(), store, db, samba.Options{Dir: t.TempDir(), Disks: "/disks", Lifetime: time.Hour, Enabled: b.teleport.Enabled})
	check(err)
	mux := http.NewServeMux()
	api := mountserver.New(mountserver.Options{
		Teleport: b.teleport, Credential: keeper.Credential, Server: "files.example.com", Region: "westeurope", Authorizer: b.authority,
	})
	mux.Handle(mountapi.Prefix, api)
	mux.Handle("/oauth2/", b.authority)
	b.handler = registry.Wrap(api, registry.FrontOptions{Authorizer: b.authority})
	server := httptest.NewServer(registry.Wrap(mux, registry.FrontOptions{Authorizer: b.authority}))
	t.Cleanup(server.Close)
	b.host = strings.TrimPrefix(server.URL, "http://")
	return b
}

// work expands until the test ends.
func (b *bench) work() {
	ctx, cancel := context.WithCancel(context.WithoutCancel(b.t.Context()))
	var running sync.WaitGroup
	running.Go(func() { b.teleport.Run(ctx) })
	b.t.Cleanup(func() { cancel(); running.Wait() })
}

func (b *bench) enable(repo string) {
	b.t.Helper()
	_, err := b.teleport.Change(b.t.Context(), repo, func(a *index.Attributes) error { a.TeleportEnabled = true; return nil })
	if err != nil {
		b.t.Fatal(err)
	}
}

// push pushes an image with one layer of a file of n bytes, for linux/amd64.
func (b *bench) push(repo, tag string, n int) oci.Digest { return b.pushFor(repo, tag, "amd64", n) }

func (b *bench) pushFor(repo, tag, arch string, n int) oci.Digest {
	b.t.Helper()
	var content bytes.Buffer
	w := tar.NewWriter(&content)
	_ = w.WriteHeader(&tar.Header{Name: "file", Size: int64(n), Mode: 0o644})
	_, _ = w.Write(make([]byte, n))
	_ = w.Close()
	blob := func(mediaType string, content []byte) oci.Descriptor {
		desc := oci.Descriptor{MediaType: mediaType, Digest: oci.DigestOf(content), Size: int64(len(content))}
		if _, err := b.reg.PushBlob(b.t.Context(), repo, desc, bytes.NewReader(content)); err != nil {
			b.t.Fatal(err)
		}
		return desc
	}
	var config oci.ImageConfig
	config.OS, config.Architecture = "linux", arch
	config.RootFS.DiffIDs = []oci.Digest{oci.DigestOf(content.Bytes())}
	doc, _ := json.Marshal(config)
	manifest, _ := json.Marshal(oci.ImageManifest{
		Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageManifest,
		Config: blob(oci.MediaTypeImageConfig, doc), Layers: []oci.Descriptor{blob(oci.MediaTypeLayer, content.Bytes())},
	})
	desc, err := b.reg.PushManifest(b.t.Context(), repo, tag, oci.MediaTypeImageManifest, manifest)
	if err != nil {
		b.t.Fatal(err)
	}
	return desc.Digest
}

// get asks as the admin user, with headers.
func (b *bench) get(path string, headers ...string) (*http.Response, string) {
	b.t.Helper()
	return b.do("GET", path, append([]string{"user", "admin"}, headers...)...)
}

func (b *bench) do(method, path string, headers ...string) (*http.Response, string) {
	b.t.Helper()
	r, err := http.NewRequestWithContext(b.t.Context(), method, "http://"+b.host+path, nil)
	if err != nil {
		b.t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		if headers[i] == "user" {
			r.SetBasicAuth(headers[i+1], adminPassword)
			continue
		}
		r.Header.Set(headers[i], headers[i+1])
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		b.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	return resp, string(body)
}

// ended asks until nothing is being expanded.
func (b *bench) ended(path string) (*http.Response, string) {
	b.t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		resp, body := b.get(path)
		if resp.StatusCode != http.StatusConflict {
			return resp, body
		}
		if time.Now().After(deadline) {
			b.t.Fatal(body)
		}
	}
}

func TestStates(t *testing.T) {
	b := newBench(t)
	digest := b.push("team/app", "v1", 1000)
	path := "/mount/v1/team/app/_manifests/"
	if resp, body := b.get(path + "v1"); resp.StatusCode != http.StatusNotFound || !strings.Contains(body, mountapi.CodeNotEnabled) {
		t.Errorf("not enabled: %s %s", resp.Status, body)
	}
	b.enable("team/app")
	resp, body := b.get(path + digest.String())
	if resp.StatusCode != http.StatusConflict || !strings.Contains(body, mountapi.CodeExpanding) || !strings.Contains(body, `"progress":"0%"`) || resp.Header.Get("Retry-After") == "" {
		t.Errorf("expanding: %s %s", resp.Status, body)
	}
	b.push("team/app", "large", 2<<20)
	b.work()
	if resp, body := b.ended(path + "large"); resp.StatusCode != http.StatusUnprocessableEntity || !strings.Contains(body, mountapi.CodeFailed) || !strings.Contains(body, teleport.ErrTooLarge.Code) || !strings.Contains(body, "max_layer") {
		t.Errorf("too large: %s %s", resp.Status, body)
	}
	resp, body = b.ended(path + "v1")
	var m mountapi.Mount
	if err := json.Unmarshal([]byte(body), &m); err != nil || resp.StatusCode != http.StatusOK || resp.Header.Get("Cache-Control") != "no-store" {
		t.Fatalf("%s %v %s", resp.Status, err, body)
	}
	l := m.Layers[0]
	if m.Digest != digest || m.Format != mountapi.FormatVHD || m.Repository != "team/app" || m.Platform.Architecture != "amd64" || len(m.Layers) != 1 {
		t.Errorf("%+v", m)
	}
	if want := "smb://files.example.com/" + m.SMB.Share + "/_layers/sha256-" + l.Digest.Encoded() + ".vhd"; l.URL != want || l.Size < 1000 || l.VHDDigest == "" {
		t.Errorf("%+v, want %s", l, want)
	}
	if m.SMB.Username == "" || m.SMB.Password == "" || time.Until(m.SMB.Expires) < 59*time.Minute { // an hour when it was given out
		t.Errorf("%+v", m.SMB)
	}
	for path, want := range map[string]int{
		path + "none":                       404,
		"/mount/v1/none/_manifests/v1":      404,
		"/mount/v1/team/app/_manifests/a/b": 404,
		"/mount/v1/team/app":                404,
		path + "sha256:0":                   400,
		path + "v1?platform=windows/amd64":  400,
		"/mount/v1/TEAM/_manifests/v1":      400,
		path + "v1?platform=linux/s390x":    200, // whoever names an image means it
	} {
		if resp, body := b.get(path); resp.StatusCode != want {
			t.Errorf("%s: %s %s", path, resp.Status, body)
		}
	}
	if resp, _ := b.do("POST", path+"v1", "user", "admin"); resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST: %s", resp.Status)
	}
}

// Of an index the image is meant that is for the client's platform.
func TestPlatforms(t *testing.T) {
	b := newBench(t)
	images := map[string]oci.Digest{"": b.push("team/app", "amd", 1000), "linux/arm64": b.pushFor("team/app", "arm", "arm64", 2000)}
	b.enable("team/app")
	index := oci.Index{Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeIndex}
	for _, tag := range []string{"amd", "arm"} {
		desc, err := b.reg.ResolveManifest(t.Context(), "team/app", tag)
		if err != nil {
			t.Fatal(err)
		}
		index.Manifests = append(index.Manifests, desc)
	}
	doc, err := json.Marshal(index)
	if err != nil {
		t.Fatal(err)
	}
	desc, err := b.reg.PushManifest(t.Context(), "team/app", "all", oci.MediaTypeIndex, doc)
	if err != nil {
		t.Fatal(err)
	}
	b.work()
	for platform, want := range images {
		for _, reference := range []string{"all", desc.Digest.String()} {
			path := "/mount/v1/team/app/_manifests/" + reference + "?platform=" + platform
			resp, body := b.ended(path)
			var m mountapi.Mount
			if err := json.Unmarshal([]byte(body), &m); err != nil || resp.StatusCode != http.StatusOK || m.Digest != want {
				t.Errorf("%s: %s %s, want %s", path, resp.Status, body, want)
			}
			head, none := b.do("HEAD", path, "user", "admin")
			if head.StatusCode != http.StatusOK || none != "" || head.ContentLength != int64(len(body)) {
				t.Errorf("HEAD %s: %s, %d bytes", path, head.Status, head.ContentLength)
			}
		}
	}
	if resp, body := b.get("/mount/v1/team/app/_manifests/all?platform=linux/s390x"); resp.StatusCode != http.StatusUnprocessableEntity || !strings.Contains(body, "NO_SUPPORTED_PLATFORM_FOUND") {
		t.Errorf("a platform that it doesn't have: %s %s", resp.Status, body)
	}
}

// What was canceled waits for somebody who wants it.
func TestCanceled(t *testing.T) {
	b := newBench(t)
	digest := b.push("team/app", "v1", 1000)
	b.enable("team/app")
	path := "/mount/v1/team/app/_manifests/v1"
	if resp, body := b.get(path); resp.StatusCode != http.StatusConflict {
		t.Fatalf("%s %s", resp.Status, body)
	}
	op, err := b.teleport.Latest(t.Context(), "team/app", digest)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.teleport.Cancel(t.Context(), "team/app", op.ID); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if resp, body := b.get(path); resp.StatusCode != http.StatusNotFound || !strings.Contains(body, mountapi.CodeNotExpanded) {
			t.Errorf("%s %s", resp.Status, body)
		}
	}
	if _, err := b.teleport.Start(t.Context(), "team/app", "v1"); err != nil {
		t.Fatal(err)
	}
	b.work()
	if resp, body := b.ended(path); resp.StatusCode != http.StatusOK {
		t.Errorf("%s %s", resp.Status, body)
	}
}

// Whoever is elsewhere, or can't mount, gets the layers as they were pushed, and
// has nothing expanded.
func TestWhoPulls(t *testing.T) {
	b := newBench(t)
	b.push("team/app", "v1", 1000)
	b.enable("team/app")
	for _, c := range []struct {
		header, value string
		want          int
	}{
		{mountapi.HeaderCapable, "false", 200},
		{mountapi.HeaderRegion, "eastus", 200},
		{mountapi.HeaderCapable, "perhaps", 400},
		{mountapi.HeaderCapable, "true", 409},
		{mountapi.HeaderRegion, "WestEurope", 409},
	} {
		resp, body := b.get("/mount/v1/team/app/_manifests/v1", c.header, c.value)
		if resp.StatusCode != c.want {
			t.Errorf("%s: %s: %s %s", c.header, c.value, resp.Status, body)
		}
		if c.want != 200 {
			continue
		}
		var m mountapi.Mount
		if err := json.Unmarshal([]byte(body), &m); err != nil {
			t.Fatal(err)
		}
		l := m.Layers[0]
		if m.Format != mountapi.FormatBlob || m.SMB != nil || l.URL != "http://"+b.host+"/v2/team/app/blobs/"+l.Digest.String() || l.MediaType != oci.MediaTypeLayer {
			t.Errorf("%s", body)
		}
	}
}

func TestWhoMayAsk(t *testing.T) {
	b := newBench(t)
	b.push("team/app", "v1", 1000)
	b.enable("team/app")
	resp, body := b.do("GET", "/mount/v1/team/app/_manifests/v1")
	challenges := resp.Header.Values("Www-Authenticate")
	if resp.StatusCode != http.StatusUnauthorized || len(challenges) != 2 || !strings.Contains(challenges[0], `scope="repository:team/app:pull"`) || !strings.HasPrefix(challenges[1], "Basic realm=") {
		t.Errorf("%s %q %s", resp.Status, challenges, body)
	}
	none, noneBody := b.do("GET", "/mount/v1/team/none/_manifests/v1")
	if none.StatusCode != http.StatusUnauthorized || strings.ReplaceAll(noneBody, "none", "app") != body {
		t.Errorf("who may not ask learns what exists: %s", noneBody)
	}
	for scope, want := range map[string]int{"repository:team/app:pull": 409, "repository:team/other:pull": 401} {
		resp, body := b.do("GET", "/oauth2/token?service="+b.host+"&scope="+scope, "user", "admin")
		var token struct {
			Access string `json:"access_token"`
		}
		if err := json.Unmarshal([]byte(body), &token); err != nil || token.Access == "" {
			t.Fatalf("%s %s", resp.Status, body)
		}
		if resp, body := b.do("GET", "/mount/v1/team/app/_manifests/v1", "Authorization", "Bearer "+token.Access); resp.StatusCode != want {
			t.Errorf("a token for %s: %s %s", scope, resp.Status, body)
		}
	}
}

// Our client gets along with it.
func TestClient(t *testing.T) {
	b := newBench(t)
	b.push("team/app", "v1", 1000)
	client, err := remote.New(b.host, remote.Options{Credentials: func(context.Context, string) (remote.Credential, error) {
		return remote.Credential{Username: "admin", Password: adminPassword}, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	code := func() string {
		_, err := mountapi.Get(t.Context(), client, mountapi.Query{Repository: "team/app", Reference: "v1", Platform: "linux/amd64"})
		var coded *oci.Error
		if errors.As(err, &coded) {
			return coded.Code
		}
		return ""
	}
	if got := code(); got != mountapi.CodeNotEnabled {
		t.Error(got)
	}
	b.enable("team/app")
	if got := code(); got != mountapi.CodeExpanding {
		t.Error(got)
	}
	b.work()
	b.ended("/mount/v1/team/app/_manifests/v1")
	q := mountapi.Query{Repository: "team/app", Reference: "v1"}
	if m, err := mountapi.Get(t.Context(), client, q); err != nil || m.SMB == nil || len(m.Layers) != 1 {
		t.Errorf("%+v, %v", m, err)
	}
	q.Region = "elsewhere"
	if m, err := mountapi.Get(t.Context(), client, q); err != nil || m.Format != mountapi.FormatBlob || len(m.Layers) != 1 {
		t.Errorf("from another region: %+v, %v", m, err)
	}
}
