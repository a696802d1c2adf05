package mountapi

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"

	"sluice/internal/remote"
	"sluice/oci"
)

// Query is what a registry is asked.
type Query struct {
	Repository string
	Reference  string // a tag or digest
	Platform   string // of an index, the image for it is meant, as in "linux/arm64"; empty: linux/amd64
	Region     string // where the client is; empty: where the registry is
}

// Get asks a registry for an image, for a client that can mount.
//
// Errors are those of remote.Registry.Call: an *oci.Error with one of this package's
// codes where the layers can't be mounted; oci.ErrUnsupported for an answer that isn't
// this API's.
func Get(ctx context.Context, reg *remote.Registry, q Query) (Mount, error) {
	req := remote.APIRequest{
		What: fmt.Sprintf("asking where the layers of %s (%s) are", q.Repository, q.Reference), Path: Prefix + q.Repository + "/_manifests/" + q.Reference,
		Header: http.Header{HeaderCapable: {"true"}},
		Scopes: []string{"repository:" + q.Repository + ":pull"},
	}
	if q.Region != "" {
		req.Header.Set(HeaderRegion, q.Region)
	}
	if q.Platform != "" {
		req.Query = url.Values{"platform": {q.Platform}}
	}
	answer, err := reg.Call(ctx, req)
	if err != nil {
		return Mount{}, err
	}
	m, err := parseMount(answer.Body)
	if err != nil {
		return m, fmt.Errorf("%s at %s: %w", req.What, reg.Host(), err)
	}
	return m, nil
}

// maxLayers bounds the layers of an answer.
const maxLayers = 1024

// parseMount reads an answer, and checks what is relied on.
func parseMount(doc []byte) (Mount, error) {
	var m Mount
	if err := json.Unmarshal(doc, &m); err != nil {
		return m, oci.ErrUnsupported.Withf("the answer isn't what the mount API sends: %v", err)
	}
	if m.Format != FormatVHD && m.Format != FormatBlob || m.Format == FormatVHD && m.SMB == nil || len(m.Layers) == 0 || len(m.Layers) > maxLayers {
		return m, oci.ErrUnsupported.Withf("the answer has the format %.40q and %d layers: is the registry another version?", m.Format, len(m.Layers))
	}
	for i, l := range m.Layers {
		digests := []oci.Digest{l.Digest, l.DiffID}
		if m.Format == FormatVHD {
			digests = append(digests, l.VHDDigest)
		}
		for _, d := range digests {
			if _, err := oci.ParseDigest(d.String()); err != nil {
				return m, fmt.Errorf("layer %d of the answer: %w", i, err)
			}
		}
		if l.Size <= 0 {
			return m, fmt.Errorf("layer %d of the answer has %d bytes", i, l.Size)
		}
	}
	return m, nil
}
