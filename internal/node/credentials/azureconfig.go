package credentials

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
)

// azureConfig is what counts here of azure.json, the file that Kubernetes' cloud
// provider of Azure and kubelet have on a node
// (https://cloud-provider-azure.sigs.k8s.io/install/configs/).
type azureConfig struct {
	Cloud          string `json:"cloud"`
	Tenant         string `json:"tenantId"`
	UseIdentity    bool   `json:"useManagedIdentityExtension"`
	IdentityID     string `json:"userAssignedIdentityID"` // a client ID; "": the machine's own
	ClientID       string `json:"aadClientId"`
	ClientPassword string `json:"aadClientSecret"`
}

// maxAzureConfig bounds the file, in bytes.
const maxAzureConfig = 1 << 20

// azureLogins are where the service principals of Azure's clouds get tokens, by
// the clouds' names in capitals.
func azureLogins() map[string]string {
	return map[string]string{
		"":                       "https://login.microsoftonline.com",
		"AZUREPUBLICCLOUD":       "https://login.microsoftonline.com",
		"AZURECHINACLOUD":        "https://login.chinacloudapi.cn",
		"AZUREUSGOVERNMENTCLOUD": "https://login.microsoftonline.us",
		"AZUREGERMANCLOUD":       "https://login.microsoftonline.de",
	}
}

// readAzureConfig reads azure.json. What it says is never part of an error.
func readAzureConfig(name string) (azureConfig, error) {
	var c azureConfig
	f, err := os.Open(name)
	if err != nil {
		return c, err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, maxAzureConfig))
	if err != nil {
		return c, err
	}
	// It may begin with a byte order mark.
	if json.Unmarshal([]byte(strings.TrimPrefix(string(content), "\ufeff")), &c) != nil {
		return c, fmt.Errorf("%s isn't the JSON of azure.json", name)
	}
	if !c.UseIdentity && (c.Tenant == "" || c.ClientID == "" || c.ClientPassword == "") {
		return c, fmt.Errorf("%s names no identity: neither useManagedIdentityExtension, nor tenantId, aadClientId and aadClientSecret", name)
	}
	return c, nil
}

// principal returns a service principal's token for a resource.
func (a *Azure) principal(ctx context.Context, c azureConfig, resource string) (string, error) {
	login := a.opts.Login
	if login == "" {
		if login = azureLogins()[strings.ToUpper(c.Cloud)]; login == "" {
			return "", fmt.Errorf("cloud %.40q: it isn't known where its tokens are had", c.Cloud)
		}
	}
	form := url.Values{
		"grant_type": {"client_credentials"}, "client_id": {c.ClientID}, "client_secret": {c.ClientPassword},
		"scope": {strings.TrimSuffix(resource, "/") + "/.default"},
	}
	u := strings.TrimSuffix(login, "/") + "/" + url.PathEscape(c.Tenant) + "/oauth2/v2.0/token"
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, u, strings.NewReader(form.Encode()))
	if err != nil {
		return "", errors.New("the tenant's address isn't one")
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	return a.token(r)
}
