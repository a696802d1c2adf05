package credentials

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"sluice/internal/remote"
)

// Azure is the managed identity of the machine: its token, of the instance
// metadata service, is exchanged at the registry for a refresh token
// (docs/AAD-OAuth.md of Azure/acr), with which the registry's client gets its
// tokens. It is for Azure's registries, *.azurecr.io and those of its other
// clouds, and for hosts that the operator names. With azure.json, the identity may
// be a service principal as well, whose token is Azure's directory's. Use NewAzure.
type Azure struct {
	opts   AzureOptions
	client *http.Client
	keeper *keeper[remote.Credential]
}

// AzureOptions configure Azure. The zero value is the identity of a machine that
// has one.
type AzureOptions struct {
	// ClientID says which, on a machine with several identities.
	ClientID string

	// Config is the path of azure.json, which then says which identity it is,
	// instead of ClientID. It's read whenever a token is needed, so it needn't be
	// there yet, and may change. Empty: there's none.
	Config string

	// Hosts are further registries that take the identity, such as one of
	// Sluice whose configuration names the tenant as an issuer. They see a
	// token with which whoever has it acts as the machine: name only those
	// that are trusted with that.
	Hosts []string

	// PlainHTTP are those of Hosts that speak HTTP without TLS. Those on the
	// loopback interface do anyway.
	PlainHTTP []string

	// IMDS is where the metadata service is; default http://169.254.169.254.
	IMDS string

	// Login is where a service principal's token is had; default: what the cloud
	// that Config names has, such as https://login.microsoftonline.com.
	Login string

	// Transport carries requests to registries. Nil: http.DefaultTransport.
	Transport http.RoundTripper
}

const (
	defaultIMDS = "http://169.254.169.254"

	// azureTimeout bounds both requests together.
	azureTimeout = 20 * time.Second

	// maxAzureAnswer bounds their answers, in bytes.
	maxAzureAnswer = 128 << 10

	// azureLife is how long a token is believed that doesn't say it itself,
	// and maxAzureLife how long one that does.
	azureLife, maxAzureLife = time.Hour, 24 * time.Hour
)

// azureClouds are the registries of Azure's clouds, and what a token that they
// take is for.
func azureClouds() map[string]string {
	return map[string]string{
		".azurecr.io": "https://management.azure.com/",
		".azurecr.cn": "https://management.chinacloudapi.cn/",
		".azurecr.us": "https://management.usgovcloudapi.net/",
		".azurecr.de": "https://management.microsoftazure.de/",
	}
}

// NewAzure returns the machine's identity as a source. Nobody is asked yet.
func NewAzure(o AzureOptions) *Azure {
	if o.IMDS == "" {
		o.IMDS = defaultIMDS
	}
	a := &Azure{opts: o, client: &http.Client{
		Transport:     o.Transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }, // a token isn't sent on
	}}
	a.keeper = newKeeper(azureTimeout, a.ask)
	return a
}

// Name implements Source.
func (a *Azure) Name() string {
	if a.opts.Config != "" {
		return "Azure identity of " + a.opts.Config
	}
	return "Azure managed identity"
}

// Credential implements Source.
func (a *Azure) Credential(ctx context.Context, req Request) (remote.Credential, time.Time, error) {
	if a.resource(req.Host) == "" {
		return remote.Credential{}, time.Time{}, ErrNone
	}
	return a.keeper.get(ctx, req, []string{registryKey(req)}, func(c remote.Credential) bool { return !req.refused(c) })
}

func (a *Azure) run(ctx context.Context) { a.keeper.run(ctx) }

// resource returns what the machine's token for a registry must be for, or "" if
// the registry isn't to see one.
func (a *Azure) resource(host string) string {
	clouds := azureClouds()
	host = strings.ToLower(host)
	for suffix, resource := range clouds {
		if strings.HasSuffix(host, suffix) {
			return resource
		}
	}
	if slices.ContainsFunc(a.opts.Hosts, func(h string) bool { return strings.EqualFold(h, host) }) {
		return clouds[".azurecr.io"]
	}
	return ""
}

func (a *Azure) ask(ctx context.Context, req Request) (got[remote.Credential], error) {
	var none got[remote.Credential]
	token, err := a.identity(ctx, a.resource(req.Host))
	if err != nil {
		return none, err
	}
	form := url.Values{"grant_type": {"access_token"}, "service": {req.Host}, "access_token": {token}}
	if tenant := claimsOf(token).Tenant; tenant != "" {
		form.Set("tenant", tenant)
	}
	u, err := a.registry(req.Host)
	if err != nil {
		return none, err
	}
	u.Path = "/oauth2/exchange"
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), strings.NewReader(form.Encode()))
	if err != nil {
		return none, err
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	var answer struct {
		RefreshToken string `json:"refresh_token"`
	}
	if err := a.call(r, &answer); err != nil {
		return none, fmt.Errorf("exchange at %s: %w", req.Host, err)
	}
	if answer.RefreshToken == "" {
		return none, fmt.Errorf("exchange at %s: the answer has no refresh token", req.Host)
	}
	return got[remote.Credential]{
		value: remote.Credential{RefreshToken: answer.RefreshToken},
		key:   registryKey(req),
		until: expiry(answer.RefreshToken, time.Now()),
	}, nil
}

// identity returns the token of whoever this node is, for a resource.
func (a *Azure) identity(ctx context.Context, resource string) (string, error) {
	id := a.opts.ClientID
	if a.opts.Config != "" {
		c, err := readAzureConfig(a.opts.Config)
		if err != nil {
			return "", err
		}
		if !c.UseIdentity {
			token, err := a.principal(ctx, c, resource)
			if err != nil {
				return "", fmt.Errorf("the service principal: %w", err)
			}
			return token, nil
		}
		id = c.IdentityID
	}
	token, err := a.machine(ctx, id, resource)
	if err != nil {
		return "", fmt.Errorf("the machine's identity: %w", err)
	}
	return token, nil
}

// machine returns the token of one of the machine's identities, the only one if
// it's "", for a resource. The metadata service keeps it and renews it in time.
func (a *Azure) machine(ctx context.Context, id, resource string) (string, error) {
	q := url.Values{"api-version": {"2018-02-01"}, "resource": {resource}}
	if id != "" {
		q.Set("client_id", id)
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(a.opts.IMDS, "/")+"/metadata/identity/oauth2/token?"+q.Encode(), nil)
	if err != nil {
		return "", err
	}
	r.Header.Set("Metadata", "true")
	return a.token(r)
}

// token asks for an access token.
func (a *Azure) token(r *http.Request) (string, error) {
	var answer struct {
		AccessToken string `json:"access_token"`
	}
	if err := a.call(r, &answer); err != nil {
		return "", err
	}
	if answer.AccessToken == "" {
		return "", errors.New("the answer has no token")
	}
	return answer.AccessToken, nil
}

// call sends a request and decodes its answer.
func (a *Azure) call(r *http.Request, answer any) error {
	resp, err := a.client.Do(r)
	if err != nil {
		var located *url.Error
		if errors.As(err, &located) {
			err = located.Err // its URL may have an identity in it
		}
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAzureAnswer))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("HTTP %d: %s", resp.StatusCode, complaint(body))
	}
	if json.Unmarshal(body, answer) != nil {
		return errors.New("the answer isn't JSON") // and may have a token in it
	}
	return nil
}

// complaint returns what an error's answer says.
func complaint(body []byte) string {
	var doc struct {
		Error       string `json:"error"`
		Description string `json:"error_description"`
		Errors      []struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
	}
	text := ""
	if json.Unmarshal(body, &doc) == nil {
		text = strings.TrimSpace(doc.Error + " " + doc.Description)
		if text == "" && len(doc.Errors) > 0 {
			text = strings.TrimSpace(doc.Errors[0].Code + " " + doc.Errors[0].Message)
		}
	}
	return printable([]byte(text[:min(len(text), maxComplaint)]))
}

// claims are those of a token that matter here. They aren't verified: they say
// only when to ask again, and what to ask for.
type claims struct {
	Expiry int64  `json:"exp"`
	Tenant string `json:"tid"`
}

func claimsOf(token string) claims {
	var c claims
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return c
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || json.Unmarshal(payload, &c) != nil {
		return claims{}
	}
	return c
}

// expiry returns when a token runs out.
func expiry(token string, now time.Time) time.Time {
	c := claimsOf(token)
	if c.Expiry <= 0 {
		return now.Add(azureLife)
	}
	if until := time.Unix(c.Expiry, 0); until.Before(now.Add(maxAzureLife)) {
		return until
	}
	return now.Add(maxAzureLife)
}

// registry returns where a registry is.
func (a *Azure) registry(host string) (*url.URL, error) {
	plain := remote.PlainHTTPOnLoopback
	if slices.Contains(a.opts.PlainHTTP, host) {
		plain = remote.PlainHTTPAlways
	}
	return remote.BaseURL(host, plain)
}
