package remote_test

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"sluice/internal/registry"
	"sluice/internal/remote"
	"sluice/oci"
	"sluice/oci/ocimem"
	"sluice/oci/ocitest"
)

// serve starts a server and returns a client of it.
func serve(t *testing.T, handler http.Handler, opts remote.Options) *remote.Registry {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return connect(t, server, opts)
}

// connect returns a client of a server.
func connect(t *testing.T, server *httptest.Server, opts remote.Options) *remote.Registry {
	t.Helper()
	if opts.Transport == nil {
		transport := remote.NewTransport()
		t.Cleanup(transport.CloseIdleConnections)
		opts.Transport = transport
	}
	if opts.Credentials == nil {
		opts.Credentials = remote.Anonymous
	}
	if opts.ReadTimeout == 0 {
		opts.ReadTimeout = 20 * time.Second
	}
	_, host, _ := strings.Cut(server.URL, "://")
	reg, err := remote.New(host, opts)
	if err != nil {
		t.Fatal(err)
	}
	return reg
}

// inMemory returns the real handler over an empty registry. Its pages are small,
// so that listings have several.
func inMemory() http.Handler {
	return registry.NewHandler(ocimem.New(), registry.Options{PageSize: 7})
}

func TestContract(t *testing.T) {
	ocitest.Run(t, func(t *testing.T) oci.Registry {
		return serve(t, inMemory(), remote.Options{})
	})
}

// Uploads in pieces much smaller than what is appended.
func TestContractSmallChunks(t *testing.T) {
	ocitest.Run(t, func(t *testing.T) oci.Registry {
		return serve(t, inMemory(), remote.Options{ChunkSize: 32 << 10})
	})
}

func TestContractTLS(t *testing.T) {
	ocitest.Run(t, func(t *testing.T) oci.Registry {
		server := httptest.NewUnstartedServer(inMemory())
		server.EnableHTTP2 = true
		server.StartTLS()
		t.Cleanup(server.Close)
		transport := remote.NewTransport()
		transport.TLSClientConfig = server.Client().Transport.(*http.Transport).TLSClientConfig.Clone()
		transport.TLSClientConfig.NextProtos = nil
		t.Cleanup(transport.CloseIdleConnections)
		return connect(t, server, remote.Options{Transport: transport, PlainHTTP: remote.PlainHTTPNever})
	})
}

// A registry like those of before distribution-spec 1.1: no referrers API, and
// ranges ignored.
func TestContractOldRegistry(t *testing.T) {
	ocitest.Run(t, func(t *testing.T) oci.Registry {
		return serve(t, old(inMemory()), remote.Options{})
	})
}

func old(handler http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if strings.Contains(req.URL.Path, "/referrers/sha") {
			http.NotFound(w, req)
			return
		}
		req.Header.Del("Range")
		handler.ServeHTTP(&withoutSubject{ResponseWriter: w}, req)
	})
}

// withoutSubject hides that the server knows what a subject is.
type withoutSubject struct{ http.ResponseWriter }

func (w *withoutSubject) WriteHeader(status int) {
	w.Header().Del("OCI-Subject")
	w.ResponseWriter.WriteHeader(status)
}

func (w *withoutSubject) Unwrap() http.ResponseWriter { return w.ResponseWriter }
