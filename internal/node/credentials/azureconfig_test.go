package credentials_test

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"sluice/internal/node/credentials"
	"sluice/oci"
)

// azure.json names an identity of the machine, or a service principal; it may come
// late, and change.
func TestAzureConfig(t *testing.T) {
	s, file := newServer(t), filepath.Join(t.TempDir(), "azure.json")
	chain := func() *credentials.Chain {
		return credentials.New(nil, credentials.NewAzure(credentials.AzureOptions{Hosts: []string{s.host}, IMDS: s.cloud.URL, Login: s.cloud.URL, Config: file}))
	}
	for _, c := range []struct{ name, content, want string }{
		{"no file", "", "azure.json: no such file"},
		{"not JSON", "password", "azure.json isn't the JSON of azure.json"},
		{"another type", `{"aadClientId": 1}`, "isn't the JSON"},
		{"nobody", `{"tenantId": "tenant", "aadClientId": "principal"}`, "names no identity"},
		{"a wrong secret", `{"tenantId": "tenant", "aadClientId": "principal", "aadClientSecret": "password"}`, "the service principal: HTTP 401: invalid_client AADSTS7000215"},
		{"a strange tenant", `{"tenantId": "../tenant", "aadClientId": "principal", "aadClientSecret": "s3cret"}`, "the service principal: HTTP 404"},
		{"a service principal", "\ufeff" + `{"cloud": "AzurePublicCloud", "tenantId": "tenant", "aadClientId": "principal", "aadClientSecret": "s3cret", "location": "westeurope"}`, ""},
		{"the machine", `{"useManagedIdentityExtension": true, "aadClientId": "msi", "aadClientSecret": "msi"}`, ""},
		{"an identity of the machine", `{"useManagedIdentityExtension": true, "userAssignedIdentityID": "me"}`, ""},
	} {
		if c.content != "" {
			write(t, file, c.content)
		}
		err := s.read(t, "team/app", chain())
		if c.want == "" && err != nil || c.want != "" && (!errors.Is(err, oci.ErrUnauthorized) || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
		if err != nil && (strings.Contains(err.Error(), "s3cret") || strings.Contains(err.Error(), "password")) {
			t.Errorf("%s: the error has the file's content: %v", c.name, err)
		}
	}
	asked := s.cloud.requests()
	if len(asked) != 4 || asked[2].URL.Query().Get("client_id") != "" || asked[3].URL.Query().Get("client_id") != "me" {
		t.Errorf("asked %d times, last with %v", len(asked), asked[len(asked)-1].URL)
	}
	write(t, file, `{"cloud": "AzureMoonCloud", "tenantId": "tenant", "aadClientId": "principal", "aadClientSecret": "s3cret"}`)
	err := s.read(t, "team/app", credentials.New(nil, credentials.NewAzure(credentials.AzureOptions{Hosts: []string{s.host}, Config: file})))
	if err == nil || !strings.Contains(err.Error(), `cloud "AzureMoonCloud"`) {
		t.Errorf("a cloud that isn't known: %v", err)
	}
}
