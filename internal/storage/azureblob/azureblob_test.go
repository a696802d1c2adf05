package azureblob_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"sluice/internal/storage/azureblob"
)

const secret = "bm90LXRvLWJlLXNlZW4="

func connection(endpoint string) string {
	return "DefaultEndpointsProtocol=http;AccountName=account;AccountKey=" + secret + ";BlobEndpoint=" + endpoint + ";"
}

// What can't work is refused at once, without the secret.
func TestOpen(t *testing.T) {
	good := connection("http://127.0.0.1:1/account")
	for _, bad := range []azureblob.Options{
		{}, {Container: "c"}, {ConnectionString: good},
		{Container: "c", ConnectionString: good, ServiceURL: "https://account.blob.core.windows.net"},
		{Container: "c", ConnectionString: "AccountKey=" + secret},
		{Container: "c", ConnectionString: good, Prefix: "../up"},
		{Container: "c", ServiceURL: "account"}, {Container: "c", ServiceURL: "http://account.example"},
		{Container: "c", ServiceURL: "https://account.example/?sig=" + secret},
	} {
		_, err := azureblob.Open(t.Context(), bad)
		if err == nil {
			t.Errorf("Open(%+v) succeeded", bad)
		} else if strings.Contains(err.Error(), secret) {
			t.Errorf("the error has the secret: %v", err)
		}
	}
	if _, err := azureblob.Open(t.Context(), azureblob.Options{Container: "c", ServiceURL: "https://account.blob.core.windows.net"}); err != nil {
		t.Errorf("Open with an identity: %v", err)
	}
}

// A service that isn't there is named, in bounded time.
func TestUnreachable(t *testing.T) {
	o, err := azureblob.Open(t.Context(), azureblob.Options{Container: "c", ConnectionString: connection("http://127.0.0.1:1/account")})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	err = o.Check(ctx)
	if err == nil || !strings.Contains(err.Error(), "http://127.0.0.1:1/account/c") || strings.Contains(err.Error(), secret) {
		t.Errorf("Check: %v", err)
	}
}
