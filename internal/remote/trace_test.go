package remote_test

import (
	"fmt"
	"io"
	"net/http/httptest"
	"strings"
	"testing"

	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"sluice/internal/remote"
)

// Each request of somebody who is traced has a span, with what came in it and no
// secret; those of others have none.
func TestRequestsAreTraced(t *testing.T) {
	store := newObjectStore(t)
	registry := httptest.NewServer(answer(307, "", "Location", store.URL+"/blob?sig=good"))
	t.Cleanup(registry.Close)
	r, err := remote.New(strings.TrimPrefix(registry.URL, "http://"), remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	spans := tracetest.NewSpanRecorder()
	tracer := sdk.NewTracerProvider(sdk.WithSpanProcessor(spans)).Tracer("test")
	ctx, caller := tracer.Start(t.Context(), "caller")
	caller.End() // what it began may go on
	read := func() {
		b, err := r.GetBlob(ctx, "app", blobDigest)
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		if _, err := io.Copy(io.Discard, b); err != nil {
			t.Fatal(err)
		}
	}
	read()
	ended := spans.Ended()[1:]
	if len(ended) != 2 {
		t.Fatalf("%d spans for a request and its redirect", len(ended))
	}
	var bytes int64
	for _, s := range ended {
		if s.Parent().SpanID() != caller.SpanContext().SpanID() {
			t.Errorf("%s isn't the caller's", s.Name())
		}
		for _, a := range s.Attributes() {
			if a.Key == "http.response.body.size" {
				bytes += a.Value.AsInt64()
			}
			if strings.Contains(fmt.Sprint(a.Value.AsInterface()), "sig=") {
				t.Errorf("%s has a signature", a.Key)
			}
		}
	}
	if bytes != int64(len(blob)) {
		t.Errorf("%d bytes came, of %d", bytes, len(blob))
	}
	ctx = t.Context()
	read()
	if n := len(spans.Ended()); n != 3 {
		t.Errorf("requests of somebody who isn't traced have %d spans", n-3)
	}
}
