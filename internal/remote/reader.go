package remote

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"strings"

	"sluice/oci"
)

// acceptManifests is the Accept header of requests for manifests.
var acceptManifests = strings.Join([]string{
	oci.MediaTypeImageManifest, oci.MediaTypeIndex, oci.MediaTypeDockerManifest, oci.MediaTypeDockerManifestList,
}, ", ")

// GetManifest implements oci.Reader.
func (r *Registry) GetManifest(ctx context.Context, repo, reference string) (oci.Manifest, error) {
	digest, err := checkTarget(repo, reference)
	if err != nil {
		return oci.Manifest{}, err
	}
	c := r.manifestCall(http.MethodGet, repo, reference)
	resp, err := r.do(ctx, c)
	if err != nil {
		return oci.Manifest{}, err
	}
	if resp.StatusCode != http.StatusOK {
		return oci.Manifest{}, r.failure(c, resp, oci.ErrManifestUnknown)
	}
	content, err := r.readAll(c, resp, oci.MaxManifestSize)
	if errors.Is(err, errTooLong) {
		return oci.Manifest{}, r.ociErrorf(oci.ErrManifestInvalid, c, "it is larger than the %d bytes that are allowed", oci.MaxManifestSize)
	}
	if err != nil {
		return oci.Manifest{}, err
	}
	mediaType, err := r.manifestType(c, resp, content)
	if err != nil {
		return oci.Manifest{}, err
	}
	told, err := r.toldDigest(c, resp)
	if err != nil {
		return oci.Manifest{}, err
	}
	for _, want := range []oci.Digest{digest, told} {
		if want == "" {
			continue
		}
		if actual := want.Algorithm().FromBytes(content); actual != want {
			return oci.Manifest{}, r.ociErrorf(oci.ErrDigestInvalid, c, "%d bytes came, whose digest is %s, not %s", len(content), actual, want)
		}
	}
	switch {
	case digest != "":
	case told != "":
		digest = told
	default:
		digest = oci.DigestOf(content)
	}
	return oci.Manifest{
		Descriptor: oci.Descriptor{MediaType: mediaType, Digest: digest, Size: int64(len(content))},
		Content:    content,
	}, nil
}

// ResolveManifest implements oci.Reader.
func (r *Registry) ResolveManifest(ctx context.Context, repo, reference string) (oci.Descriptor, error) {
	digest, err := checkTarget(repo, reference)
	if err != nil {
		return oci.Descriptor{}, err
	}
	c := r.manifestCall(http.MethodHead, repo, reference)
	resp, err := r.do(ctx, c)
	if err != nil {
		return oci.Descriptor{}, err
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusMethodNotAllowed, http.StatusNotImplemented:
		return r.resolveByGet(ctx, repo, reference)
	default:
		return oci.Descriptor{}, r.failure(c, resp, oci.ErrManifestUnknown)
	}
	told, err := r.toldDigest(c, resp)
	if err != nil {
		return oci.Descriptor{}, err
	}
	mediaType := contentType(resp)
	known := oci.IsManifest(mediaType) || oci.IsIndex(mediaType)
	if digest == "" {
		digest = told
	}
	if told == "" || told.Algorithm() != digest.Algorithm() || resp.ContentLength < 0 || !known {
		// Only the content tells what this answer doesn't.
		return r.resolveByGet(ctx, repo, reference)
	}
	if told != digest {
		return oci.Descriptor{}, r.ociErrorf(oci.ErrDigestInvalid, c, "the answer is about %s", told)
	}
	if resp.ContentLength > oci.MaxManifestSize {
		return oci.Descriptor{}, r.ociErrorf(oci.ErrManifestInvalid, c, "it has %d bytes: %d are allowed", resp.ContentLength, oci.MaxManifestSize)
	}
	return oci.Descriptor{MediaType: mediaType, Digest: digest, Size: resp.ContentLength}, nil
}

func (r *Registry) resolveByGet(ctx context.Context, repo, reference string) (oci.Descriptor, error) {
	m, err := r.GetManifest(ctx, repo, reference)
	return m.Descriptor, err
}

func (r *Registry) manifestCall(method, repo, reference string) call {
	what := "reading"
	if method == http.MethodHead {
		what = "resolving"
	}
	return call{
		what:   what + " manifest " + reference + " of " + repo,
		method: method,
		url:    r.endpoint(repo+"/manifests/"+reference, nil),
		header: http.Header{"Accept": {acceptManifests}},
		scopes: pull(repo),
		again:  true,
	}
}

// checkTarget checks a repository name and a tag or digest, and returns the
// digest if it is one.
func checkTarget(repo, reference string) (oci.Digest, error) {
	if err := oci.CheckRepository(repo); err != nil {
		return "", err
	}
	if strings.Contains(reference, ":") {
		return oci.ParseDigest(reference)
	}
	return "", oci.CheckTag(reference)
}

// checkBlob checks a repository name and a digest.
func checkBlob(repo string, digest oci.Digest) error {
	if err := oci.CheckRepository(repo); err != nil {
		return err
	}
	_, err := oci.ParseDigest(digest.String())
	return err
}

var errTooLong = errors.New("the answer is too long")

// readAll reads and closes an answer's body of at most limit bytes; a longer one
// is errTooLong.
func (r *Registry) readAll(c call, resp *http.Response, limit int64) ([]byte, error) {
	defer resp.Body.Close()
	if resp.ContentLength > limit {
		return nil, r.errorf(c, "%w", errTooLong)
	}
	if encoding := resp.Header.Get("Content-Encoding"); encoding != "" && !strings.EqualFold(encoding, "identity") {
		return nil, r.errorf(c, "the answer is encoded as %.40q, which was not asked for", encoding)
	}
	content, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return nil, r.errorf(c, "the answer broke off after %d bytes: %w", len(content), redact(err))
	}
	if int64(len(content)) > limit {
		return nil, r.errorf(c, "%w", errTooLong)
	}
	return content, nil
}

// contentType returns an answer's media type without parameters.
func contentType(resp *http.Response) string {
	mediaType, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if err != nil {
		return ""
	}
	return mediaType
}

// manifestType returns the media type of a manifest that came: what the header
// says, or the manifest itself where the header is too general.
func (r *Registry) manifestType(c call, resp *http.Response, content []byte) (string, error) {
	told := contentType(resp)
	mediaType := told
	switch told {
	case "", "application/json", "text/plain", oci.MediaTypeOctetStream:
		var doc struct {
			MediaType string `json:"mediaType"`
		}
		if json.Unmarshal(content, &doc) == nil {
			mediaType = doc.MediaType
		}
	}
	if !oci.IsManifest(mediaType) && !oci.IsIndex(mediaType) {
		return "", r.ociErrorf(oci.ErrManifestInvalid, c, "what came (%.100q, %d bytes) is no OCI or Docker schema 2 manifest: %s", told, len(content), snippet(content))
	}
	return mediaType, nil
}

// toldDigest returns the digest that an answer says it is about, or "".
func (r *Registry) toldDigest(c call, resp *http.Response) (oci.Digest, error) {
	header := resp.Header.Get("Docker-Content-Digest")
	if header == "" {
		return "", nil
	}
	digest, err := oci.ParseDigest(header)
	if err != nil {
		return "", r.ociErrorf(oci.ErrDigestInvalid, c, "header Docker-Content-Digest is %.100q", header)
	}
	return digest, nil
}

// isUnknown reports whether err says that something isn't there.
func isUnknown(err error) bool {
	return errors.Is(err, oci.ErrBlobUnknown) || errors.Is(err, oci.ErrManifestUnknown) || errors.Is(err, oci.ErrNameUnknown)
}
