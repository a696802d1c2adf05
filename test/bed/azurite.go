package bed

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Azurite is Microsoft's emulator of Azure Blob Storage. It is no Azure, but
// its leases, block lists, conditions and signatures are checked as Azure's.
type Azurite struct {
	*Process
	ServiceURL string // http://127.0.0.1:PORT/ACCOUNT
	Account    string
	Key        string // base64
}

// The account that every Azurite has and documents.
const (
	azuriteAccount = "devstoreaccount1"
	azuriteKey     = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)

// ConnectionString is what Azure's libraries and tools open the account with.
func (a *Azurite) ConnectionString() string {
	return fmt.Sprintf("DefaultEndpointsProtocol=http;AccountName=%s;AccountKey=%s;BlobEndpoint=%s;", a.Account, a.Key, a.ServiceURL)
}

// StartAzurite starts an empty Azurite whose data and log lie in dir, installed
// by npm unless it is cached. There is no container yet. It ends by Stop or
// Kill, or with this process. src is the checkout of Sluice; say tells a person
// what takes long.
func StartAzurite(ctx context.Context, src, dir string, say func(string)) (*Azurite, error) {
	program, err := azuriteProgram(ctx, src, say)
	if err != nil {
		return nil, err
	}
	addr, host, port, err := freePort()
	if err != nil {
		return nil, err
	}
	// By default it sends telemetry, and refuses the versions of the protocol
	// that newer clients speak.
	p, err := Start(dir, "azurite", nil, "node", program, "--silent", "--disableTelemetry", "--skipApiVersionCheck",
		"--location", filepath.Join(dir, "azurite"), "--blobHost", host, "--blobPort", port)
	if err != nil {
		return nil, err
	}
	if err := p.AwaitSocket(ctx, "tcp", addr); err != nil {
		p.Kill()
		return nil, err
	}
	return &Azurite{Process: p, ServiceURL: "http://" + addr + "/" + azuriteAccount, Account: azuriteAccount, Key: azuriteKey}, nil
}

// azuriteProgram returns the script that node runs.
func azuriteProgram(ctx context.Context, src string, say func(string)) (string, error) {
	pin := filepath.Join(src, "test/tools/azurite")
	key, err := keyOf(filepath.Join(pin, "package.json"), filepath.Join(pin, "package-lock.json"))
	if err != nil {
		return "", err
	}
	if _, err := exec.LookPath("npm"); err != nil { // there are other ways to have it than Debian's package
		if err := Install(ctx, "nodejs", "npm"); err != nil {
			return "", err
		}
	}
	dir, err := cached("tools/azurite-"+key, func(tmp string) error {
		say("installing Azurite by npm (once; a minute)")
		for _, name := range []string{"package.json", "package-lock.json"} {
			b, err := os.ReadFile(filepath.Join(pin, name))
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(tmp, name), b, 0o644); err != nil {
				return err
			}
		}
		cmd := exec.CommandContext(ctx, "npm", "ci", "--ignore-scripts", "--omit=dev", "--no-audit", "--no-fund")
		cmd.Dir = tmp
		return run(cmd)
	})
	return filepath.Join(dir, "node_modules/azurite/dist/src/blob/main.js"), err
}

// NewContainer makes an empty container.
func (a *Azurite) NewContainer(ctx context.Context, name string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, a.ServiceURL+"/"+name+"?restype=container", nil)
	if err != nil {
		return err
	}
	date, version := time.Now().UTC().Format(http.TimeFormat), "2021-12-02"
	req.Header.Set("X-Ms-Date", date)
	req.Header.Set("X-Ms-Version", version)
	// https://learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key:
	// method, eleven headers that it doesn't have, x-ms headers, path, query.
	// This service's URLs have the account in the path once more.
	text := "PUT" + strings.Repeat("\n", 12) + "x-ms-date:" + date + "\nx-ms-version:" + version +
		"\n/" + a.Account + "/" + a.Account + "/" + name + "\nrestype:container"
	key, err := base64.StdEncoding.DecodeString(a.Key)
	if err != nil {
		return err
	}
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(text))
	req.Header.Set("Authorization", "SharedKey "+a.Account+":"+base64.StdEncoding.EncodeToString(mac.Sum(nil)))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		return fmt.Errorf("making container %s: %s", name, resp.Status)
	}
	return nil
}

// RegistryEnv makes a registry store in a container.
func (a *Azurite) RegistryEnv(container string) []string {
	return []string{
		"SLUICE_REGISTRY_STORAGE_KIND=azure", "SLUICE_REGISTRY_STORAGE_AZURE_CONTAINER=" + container,
		"SLUICE_REGISTRY_STORAGE_AZURE_CONNECTION_STRING=" + a.ConnectionString(),
	}
}
