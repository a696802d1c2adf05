package acr_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/acr"
	"sluice/internal/stored"
	"sluice/oci"
)

// The JSON is what Azure's clients read: names and kinds of members.
func TestDocuments(t *testing.T) {
	b := newBench(t, stored.Options{})
	digest := push(t, b.reg, "team/app", "layer", "v1")
	index := oci.Index{Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeIndex}
	m, err := b.reg.ResolveManifest(t.Context(), "team/app", "v1")
	if err != nil {
		t.Fatal(err)
	}
	index.Manifests = []oci.Descriptor{{MediaType: m.MediaType, Digest: m.Digest, Size: m.Size, Platform: &oci.Platform{OS: "linux", Architecture: "arm64"}}}
	list := pushDocument(t, b.reg, "team/app", index.MediaType, index, "all")

	const locks = `"changeableAttributes":{"deleteEnabled":true,"listEnabled":true,"readEnabled":true,"writeEnabled":true}`
	const image = `"imageName":"team/app","registry":"HOST"`
	manifest := fmt.Sprintf(`{"architecture":"arm64",%s,"configMediaType":"application/vnd.oci.image.config.v1+json","createdTime":"TIME","digest":%q,`+
		`"imageSize":"SIZE","lastUpdateTime":"TIME","mediaType":"application/vnd.oci.image.manifest.v1+json","os":"linux","tags":["v1"]}`, locks, digest)
	tag := func(name string, digest oci.Digest) string {
		return fmt.Sprintf(`{%s,"createdTime":"TIME","digest":%q,"lastUpdateTime":"TIME","name":%q,"signed":false}`, locks, digest, name)
	}
	for path, want := range map[string]string{
		"_catalog": `{"repositories":["team/app"]}`,
		"team/app": `{"changeableAttributes":{"anonymousPullEnabled":false,"deleteEnabled":true,"listEnabled":true,"readEnabled":true,` +
			`"streamingEnabled":false,"teleportEnabled":false,"writeEnabled":true},"createdTime":"TIME",` + image + `,"lastUpdateTime":"TIME","manifestCount":2,"tagCount":2}`,
		"team%2Fapp/_tags/v1":                      "{" + image + `,"tag":` + tag("v1", digest) + "}",
		"team/app/_tags":                           "{" + image + `,"tags":[` + tag("all", list) + "," + tag("v1", digest) + "]}",
		"team/app/_tags?digest=" + digest.String(): "{" + image + `,"tags":[` + tag("v1", digest) + "]}",
		"team/app/_manifests/" + digest.String():   "{" + image + `,"manifest":` + manifest + "}",
		"team/app/_manifests/" + list.String(): fmt.Sprintf(`{%s,"manifest":{%s,"createdTime":"TIME","digest":%q,"imageSize":"SIZE","lastUpdateTime":"TIME",`+
			`"mediaType":"application/vnd.oci.image.index.v1+json","references":[{"architecture":"arm64","digest":%q,"os":"linux"}],"tags":["all"]}}`, image, locks, list, digest),
	} {
		resp, body := b.send("admin", adminPassword, "GET", "/acr/v1/"+path, "")
		got, want := normal(t, body, b.host), normal(t, want, b.host)
		if resp.StatusCode != http.StatusOK || got != want {
			t.Errorf("%s: %s\n got %s\nwant %s", path, resp.Status, got, want)
		}
	}
}

// normal returns a document with its members in order, and without what differs
// from run to run.
func normal(t *testing.T, body, host string) string {
	t.Helper()
	var doc any
	if err := json.Unmarshal([]byte(body), &doc); err != nil {
		t.Fatalf("%v: %s", err, body)
	}
	var walk func(any)
	walk = func(v any) {
		switch v := v.(type) {
		case []any:
			for _, e := range v {
				walk(e)
			}
		case map[string]any:
			for k, e := range v {
				if s, ok := e.(string); ok && strings.HasSuffix(k, "Time") {
					if at, err := time.Parse(time.RFC3339, s); err == nil && time.Since(at).Abs() < time.Hour && strings.HasSuffix(s, "Z") {
						v[k] = "TIME"
					}
				}
				if _, ok := e.(float64); ok && k == "imageSize" {
					v[k] = "SIZE"
				}
				walk(e)
			}
		}
	}
	walk(doc)
	out, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(string(out), host, "HOST")
}

func TestPagesAndOrder(t *testing.T) {
	b := newBench(t, stored.Options{})
	ctx, client := t.Context(), b.admin()
	var digests []string
	for i := range 7 {
		// The names' order is not that of time.
		digests = append(digests, push(t, b.reg, "app", fmt.Sprint(i), fmt.Sprintf("t%d", i*3%7)).String())
		push(t, b.reg, fmt.Sprintf("repo-%d", i), "x")
		time.Sleep(time.Millisecond)
	}
	byTime := []string{"t0", "t3", "t6", "t2", "t5", "t1", "t4"}
	newest := slices.Clone(byTime)
	slices.Reverse(newest)
	byName := []string{"t0", "t1", "t2", "t3", "t4", "t5", "t6"}
	for orderBy, want := range map[string][]string{"": byName, "name": byName, "none": byName, "timeasc": byTime, "timedesc": newest} {
		for n := 1; n < 9; n++ {
			names, pages := []string{}, 0
			for path := fmt.Sprintf("/acr/v1/app/_tags?n=%d&orderby=%s&api-version=2021-07-01", n, orderBy); path != ""; pages++ {
				resp, body := b.send("admin", adminPassword, "GET", path, "")
				var doc struct{ Tags []acr.Tag }
				if err := json.Unmarshal([]byte(body), &doc); err != nil || resp.StatusCode != http.StatusOK {
					t.Fatal(resp.Status, body)
				}
				for _, tag := range doc.Tags {
					names = append(names, tag.Name)
				}
				path = linked(t, resp)
			}
			if diff := cmp.Diff(want, names); diff != "" || pages != (7+n-1)/n {
				t.Errorf("orderby=%s, n=%d: %d pages, %s", orderBy, n, pages, diff)
			}
		}
	}
	for _, c := range []struct {
		opts acr.ListOptions
		want []string
	}{
		{acr.ListOptions{OrderBy: "timeasc"}, digests},
		{acr.ListOptions{OrderBy: "timeasc", Top: 3}, digests[:3]},
		{acr.ListOptions{}, slices.Sorted(slices.Values(digests))},
	} {
		list, err := client.Manifests(ctx, "app", c.opts)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, m := range list {
			got = append(got, m.Digest.String())
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%+v: %s", c.opts, diff)
		}
	}
	resp, body := b.send("admin", adminPassword, "GET", "/acr/v1/_catalog?n=2&last=repo-0", "")
	if body != `{"repositories":["repo-1","repo-2"]}` || linked(t, resp) != "/acr/v1/_catalog?last=repo-2&n=2" {
		t.Errorf("a page of the catalog: %s, Link %q", body, resp.Header.Get("Link"))
	}
	for _, query := range []string{"n=0", "n=-1", "n=x", "orderby=size", "last=" + strings.Repeat("x", 600), "digest=x", "%zz"} {
		if resp, body := b.send("admin", adminPassword, "GET", "/acr/v1/app/_tags?"+query, ""); resp.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: %s, %s", query, resp.Status, body)
		}
	}
}

// linked returns the path of the next page, as az reads it.
func linked(t *testing.T, resp *http.Response) string {
	t.Helper()
	link := resp.Header.Get("Link")
	if link == "" {
		return ""
	}
	path, rest, ok := strings.Cut(strings.TrimPrefix(link, "<"), ">")
	if !ok || rest != `; rel="next"` || !strings.Contains(path, "last=") {
		t.Fatalf("Link: %q", link)
	}
	return path
}

// A list longer than a page comes whole.
func TestLongList(t *testing.T) {
	b := newBench(t, stored.Options{})
	var tags []string
	for i := range 250 {
		tags = append(tags, fmt.Sprintf("t%03d", i))
	}
	push(t, b.reg, "app", "x", tags...)
	for top, want := range map[int]int{0: 250, 1: 1, 100: 100, 101: 101, 999: 250} {
		list, err := b.admin().Tags(t.Context(), "app", acr.ListOptions{Top: top})
		if err != nil || len(list) != want {
			t.Errorf("the first %d: %d, %v", top, len(list), err)
		}
	}
}

func TestLocks(t *testing.T) {
	b := newBench(t, stored.Options{})
	ctx, client := t.Context(), b.admin()
	digest := push(t, b.reg, "app", "one", "v1")
	updated, err := client.UpdateRepository(ctx, "app", acr.AttributeChanges{DeleteEnabled: off(), TeleportEnabled: on()})
	if err != nil {
		t.Fatal(err)
	}
	if a := updated.Attributes; a.DeleteEnabled || !a.WriteEnabled || !a.TeleportEnabled || a.StreamingEnabled {
		t.Errorf("the repository is %+v", a)
	}
	if again, err := client.Repository(ctx, "app"); err != nil || again != updated {
		t.Errorf("it was %+v and is %+v, %v", updated, again, err)
	}
	if _, err := client.DeleteRepository(ctx, "app"); !errors.Is(err, oci.ErrDenied) || !strings.Contains(err.Error(), "deleteEnabled") {
		t.Errorf("a locked repository is deleted: %v", err)
	}
	if _, err := client.UpdateRepository(ctx, "app", acr.AttributeChanges{DeleteEnabled: on()}); err != nil {
		t.Error(err)
	}

	// A tag, of which nobody may tell where it points.
	if _, err := client.UpdateTag(ctx, "app", "v1", acr.AttributeChanges{WriteEnabled: off(), DeleteEnabled: off()}); err != nil {
		t.Error(err)
	}
	if err := client.DeleteTag(ctx, "app", "v1"); !errors.Is(err, oci.ErrDenied) {
		t.Errorf("a locked tag is deleted: %v", err)
	}
	if err := client.DeleteManifest(ctx, "app", digest); !errors.Is(err, oci.ErrDenied) {
		t.Errorf("the manifest of a locked tag is deleted: %v", err)
	}
	other := push(t, b.reg, "app", "two")
	m, err := b.reg.GetManifest(ctx, "app", other.String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.reg.PushManifest(ctx, "app", "v1", m.Descriptor.MediaType, m.Content); !errors.Is(err, oci.ErrDenied) {
		t.Errorf("a locked tag moves: %v", err)
	}
	tag, err := client.UpdateTag(ctx, "app", "v1", acr.AttributeChanges{WriteEnabled: on(), DeleteEnabled: on()})
	if err != nil || tag.Digest != digest || tag.Attributes != (acr.Attributes{DeleteEnabled: true, WriteEnabled: true, ReadEnabled: true, ListEnabled: true}) {
		t.Errorf("unlocked it is %+v, %v", tag, err)
	}

	// A manifest.
	locked, err := client.UpdateManifest(ctx, "app", digest, acr.AttributeChanges{DeleteEnabled: off(), ReadEnabled: off(), ListEnabled: off()})
	if err != nil || locked.Attributes != (acr.Attributes{WriteEnabled: true}) {
		t.Errorf("the manifest is %+v, %v", locked, err)
	}
	if err := client.DeleteManifest(ctx, "app", digest); !errors.Is(err, oci.ErrDenied) {
		t.Errorf("a locked manifest is deleted: %v", err)
	}
	if resp, _ := b.send("admin", adminPassword, "GET", "/v2/app/manifests/"+digest.String(), ""); resp.StatusCode != http.StatusForbidden {
		t.Errorf("a manifest that may not be read is: %s", resp.Status)
	}
	list, err := client.Manifests(ctx, "app", acr.ListOptions{})
	if err != nil || len(list) != 1 || list[0].Digest != other {
		t.Errorf("the list has %+v, %v", list, err)
	}
	if _, err := client.UpdateManifest(ctx, "app", digest, acr.AttributeChanges{DeleteEnabled: on()}); err != nil {
		t.Error(err)
	}
	if err := client.DeleteTag(ctx, "app", "v1"); err != nil {
		t.Error(err)
	}
	if err := client.DeleteManifest(ctx, "app", digest); err != nil {
		t.Error(err)
	}
	if _, err := client.Manifest(ctx, "app", digest); !errors.Is(err, oci.ErrManifestUnknown) {
		t.Errorf("it is there still: %v", err)
	}
}

func TestDeleteRepository(t *testing.T) {
	b := newBench(t, stored.Options{})
	ctx, client := t.Context(), b.admin()
	one, two := push(t, b.reg, "app", "one", "b", "a"), push(t, b.reg, "app", "two", "c")
	push(t, b.reg, "app/sub", "three", "x")
	resp, body := b.send("admin", adminPassword, "DELETE", "/acr/v1/app", "")
	var got acr.DeletedContent
	if err := json.Unmarshal([]byte(body), &got); err != nil || resp.StatusCode != http.StatusAccepted {
		t.Fatal(resp.Status, body)
	}
	want := acr.DeletedContent{Manifests: slices.Sorted(slices.Values([]oci.Digest{one, two})), Tags: []string{"a", "b", "c"}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if names, err := client.Repositories(ctx, acr.ListOptions{}); err != nil || !slices.Equal(names, []string{"app/sub"}) {
		t.Errorf("there are %v, %v", names, err)
	}
}

func TestUnknown(t *testing.T) {
	b := newBench(t, stored.Options{})
	push(t, b.reg, "app", "one", "v1")
	const none = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	for _, c := range []struct{ method, path, code string }{
		{"GET", "none", "NAME_UNKNOWN"}, {"PATCH", "none", "NAME_UNKNOWN"}, {"DELETE", "none", "NAME_UNKNOWN"},
		{"GET", "none/_tags", "NAME_UNKNOWN"}, {"GET", "none/_manifests", "NAME_UNKNOWN"}, {"GET", "none/_usage", "NAME_UNKNOWN"},
		{"GET", "none/_tags/v1", "NAME_UNKNOWN"}, {"PATCH", "none/_tags/v1", "NAME_UNKNOWN"}, {"DELETE", "none/_manifests/" + none, "NAME_UNKNOWN"},
		{"GET", "app/_tags/v2", "TAG_UNKNOWN"}, {"PATCH", "app/_tags/v2", "TAG_UNKNOWN"}, {"DELETE", "app/_tags/v2", "TAG_UNKNOWN"},
		{"GET", "app/_manifests/" + none, "MANIFEST_UNKNOWN"}, {"PATCH", "app/_manifests/" + none, "MANIFEST_UNKNOWN"}, {"DELETE", "app/_manifests/" + none, "MANIFEST_UNKNOWN"},
		{"POST", "_deleted/app/_manifests/" + none, "MANIFEST_UNKNOWN"},
		{"GET", "_operations/none", "OPERATION_UNKNOWN"}, {"POST", "_operations/none:cancel", "OPERATION_UNKNOWN"},
		{"GET", "_tokens/none", "TOKEN_UNKNOWN"}, {"PATCH", "_tokens/none", "TOKEN_UNKNOWN"}, {"DELETE", "_tokens/none", "TOKEN_UNKNOWN"},
		{"GET", "_scopeMaps/none", "SCOPE_MAP_UNKNOWN"}, {"DELETE", "_scopeMaps/none", "SCOPE_MAP_UNKNOWN"},
		{"GET", "", "NOT_FOUND"}, {"GET", "_none", "NOT_FOUND"}, {"GET", "app/_none", "NOT_FOUND"}, {"GET", "app/_tags/", "NOT_FOUND"},
		{"GET", "app/_tags/a/b", "NOT_FOUND"}, {"GET", "_deleted/_manifests", "NOT_FOUND"}, {"GET", "_deleted/app", "NOT_FOUND"}, {"GET", "_tokens/a/b", "NOT_FOUND"},
	} {
		body := ""
		if c.method == "PATCH" {
			body = "{}"
		}
		resp, answer := b.send("admin", adminPassword, c.method, "/acr/v1/"+c.path, body)
		if resp.StatusCode != http.StatusNotFound || codeOf(answer) != c.code {
			t.Errorf("%s %s: %s, %s", c.method, c.path, resp.Status, answer)
		}
	}
}

func TestMalformed(t *testing.T) {
	b := newBench(t, stored.Options{})
	digest := push(t, b.reg, "app", "one", "v1")
	for _, c := range []struct {
		method, path, body string
		status             int
		says               string
	}{
		{"PATCH", "app", "", 400, "it is empty"},
		{"PATCH", "app", "[]", 400, "JSON object with members of deleteEnabled"},
		{"PATCH", "app", `{"writable":true}`, 400, `unknown field \"writable\"`},
		{"PATCH", "app", `{"writeEnabled":"false"}`, 400, `member \"writeEnabled\" can't be a string`},
		{"PATCH", "app", `{"writeEnabled":false} {}`, 400, "goes on"},
		{"PATCH", "app", `{"writeEnabled":` + strings.Repeat(" ", 70_000) + "true}", 400, "more than 65536 bytes"},
		{"PATCH", "app/_tags/v1", `{"teleportEnabled":true}`, 400, "only repositories"},
		{"PATCH", "app/_manifests/" + digest.String(), `{"streamingEnabled":true}`, 400, "only repositories"},
		{"GET", "APP", "", 400, "repository name"},
		{"GET", "app/_tags/-", "", 400, "is not a tag"},
		{"GET", "app/_manifests/v1", "", 400, "is not a digest"},
		{"PUT", "app", "{}", 405, "DELETE, GET, PATCH"},
		{"POST", "_import", `{"source":"A"}`, 400, "source"},
		{"POST", "_import", `{"source":"r.example/a:b","target":"host.example/A:b"}`, 400, "target"},
		{"POST", "_import", `{"source":"r.example/a:b","platform":"arm"}`, 400, "OS/ARCHITECTURE"},
		{"POST", "_import", `{"source":"r.example/a:b","password":"x"}`, 400, "no username"},
		{"POST", "_tokens", `{"name":"a b","scopeMap":"_repositories_pull"}`, 400, "a b"},
		{"POST", "_tokens", `{"name":"ab","scopeMap":"none"}`, 400, "no scope map"},
		{"POST", "_scopeMaps", `{"name":"ab","actions":["pull"]}`, 400, "repositories/NAME/RIGHT"},
		{"PATCH", "_scopeMaps/_repositories_pull", `{"description":"mine"}`, 400, "_repositories_pull"},
	} {
		resp, body := b.send("admin", adminPassword, c.method, "/acr/v1/"+c.path, c.body)
		if resp.StatusCode != c.status || !strings.Contains(body, c.says) {
			t.Errorf("%s %s %.60s: %s, %s", c.method, c.path, c.body, resp.Status, body)
		}
	}
	// What a web page could make its visitor's browser send.
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+b.host+"/acr/v1/_tokens", strings.NewReader(`{"name":"ab","scopeMap":"_repositories_pull"}`))
	if err != nil {
		t.Fatal(err)
	}
	req.SetBasicAuth("admin", adminPassword)
	req.Header.Set("Content-Type", "text/plain")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusBadRequest {
		t.Errorf("a form makes a token: %s", resp.Status)
	}
}
