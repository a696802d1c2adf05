package ocitest

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"sluice/oci"
)

func testNames(t *testing.T, reg oci.Registry) {
	for _, repo := range []string{
		"a", "0", "library/debian", "a.b_c__d-e---f/0", "blobs", "manifests/tags", "a/blobs/uploads", "v2/x", "tags/list", "referrers",
		strings.Repeat("a", 200), strings.TrimSuffix(strings.Repeat("a/", 100), "/"),
	} {
		m := pushImage(t, reg, repo, "list", 1, nil)
		checkManifest(t, reg, repo, "list", m)
		checkTags(t, reg, repo, "", "list")
		checkReferrers(t, reg, repo, m.Descriptor.Digest, "")
		if err := uploadBlob(t.Context(), reg, repo, oci.DigestOf([]byte("uploaded")), []byte("uploaded")); err != nil {
			t.Errorf("%s: %v", repo, err)
		}
		checkBlob(t, reg, repo, oci.DigestOf([]byte("uploaded")), []byte("uploaded"))
	}
}

// calls are all methods that take a repository, by name.
func calls(t *testing.T, reg oci.Registry) map[string]func(repo string, digest oci.Digest, tag string) error {
	ctx := t.Context()
	closed := func(r oci.BlobReader, err error) error {
		if err == nil {
			r.Close()
		}
		return err
	}
	return map[string]func(repo string, digest oci.Digest, tag string) error{
		"GetBlob": func(repo string, digest oci.Digest, _ string) error {
			return closed(reg.GetBlob(ctx, repo, digest))
		},
		"GetBlobRange": func(repo string, digest oci.Digest, _ string) error {
			return closed(reg.GetBlobRange(ctx, repo, digest, 0, 1))
		},
		"ResolveBlob": func(repo string, digest oci.Digest, _ string) error {
			_, err := reg.ResolveBlob(ctx, repo, digest)
			return err
		},
		"GetManifest": func(repo string, _ oci.Digest, tag string) error {
			_, err := reg.GetManifest(ctx, repo, tag)
			return err
		},
		"ResolveManifest": func(repo string, _ oci.Digest, tag string) error {
			_, err := reg.ResolveManifest(ctx, repo, tag)
			return err
		},
		"PushBlob": func(repo string, digest oci.Digest, _ string) error {
			_, err := reg.PushBlob(ctx, repo, oci.Descriptor{Digest: digest, Size: 1}, bytes.NewReader([]byte("x")))
			return err
		},
		"StartUpload": func(repo string, _ oci.Digest, _ string) error {
			u, err := reg.StartUpload(ctx, repo)
			if err == nil {
				err = errors.Join(errors.New("started"), u.Cancel(ctx))
			}
			return err
		},
		"ResumeUpload": func(repo string, _ oci.Digest, _ string) error {
			_, err := reg.ResumeUpload(ctx, repo, "unknown")
			return err
		},
		"MountBlob to": func(repo string, digest oci.Digest, _ string) error {
			_, err := reg.MountBlob(ctx, "good", repo, digest)
			return err
		},
		"MountBlob from": func(repo string, digest oci.Digest, _ string) error {
			_, err := reg.MountBlob(ctx, repo, "good", digest)
			return err
		},
		"PushManifest": func(repo string, _ oci.Digest, tag string) error {
			_, err := reg.PushManifest(ctx, repo, tag, oci.MediaTypeIndex, []byte(`{"schemaVersion":2,"manifests":[]}`))
			return err
		},
		"Tags": func(repo string, _ oci.Digest, _ string) error {
			_, err := collect(t, reg.Tags(ctx, repo, ""))
			return err
		},
		"Referrers": func(repo string, digest oci.Digest, _ string) error {
			_, err := collect(t, reg.Referrers(ctx, repo, digest, ""))
			return err
		},
		"DeleteBlob": func(repo string, digest oci.Digest, _ string) error {
			return reg.DeleteBlob(ctx, repo, digest)
		},
		"DeleteManifest": func(repo string, digest oci.Digest, _ string) error {
			return reg.DeleteManifest(ctx, repo, digest)
		},
		"DeleteTag": func(repo string, _ oci.Digest, tag string) error {
			return reg.DeleteTag(ctx, repo, tag)
		},
	}
}

func testInvalidNames(t *testing.T, reg oci.Registry) {
	digest := pushBlob(t, reg, "good", oci.MediaTypeLayer, []byte("y")).Digest
	all := calls(t, reg)
	for _, repo := range []string{
		"", "/", "A", "a//b", "/a", "a/", ".", "..", "../a", "a/../b", "a b", "a:b", "a@b", "a%2fb", "a\x00", "ä", "-a", "a-", "a..b", "a___b", "a?b=c", "a#b",
		strings.Repeat("a", 256),
	} {
		for method, call := range all {
			checkError(t, method+" with the repository "+repo, call(repo, digest, "tag"), oci.ErrNameInvalid)
		}
	}
	for _, bad := range []oci.Digest{
		"", "sha256", "sha256:", "sha256:abc", "md5:d41d8cd98f00b204e9800998ecf8427e", "../../x", digest + "0", oci.Digest(strings.ToUpper(digest.String())),
		"sha384:" + oci.Digest(strings.Repeat("a", 96)),
	} {
		for _, method := range []string{"GetBlob", "GetBlobRange", "ResolveBlob", "PushBlob", "MountBlob to", "MountBlob from", "Referrers", "DeleteBlob", "DeleteManifest"} {
			checkError(t, method+" with the digest "+bad.String(), all[method]("good", bad, ""), oci.ErrDigestInvalid)
		}
	}
	for _, method := range []string{"GetManifest", "ResolveManifest", "PushManifest"} {
		for _, bad := range []string{"sha256:", "sha256:abc", "md5:d41d8cd98f00b204e9800998ecf8427e"} {
			checkError(t, method+" with the digest "+bad, all[method]("good", "", bad), oci.ErrDigestInvalid)
		}
	}
	for _, method := range []string{"GetManifest", "ResolveManifest", "PushManifest", "DeleteTag"} {
		for _, bad := range []string{"", ".", "..", "-a", "a/b", "a b", "a?b", "ä", "a\x00", strings.Repeat("a", 129)} {
			checkError(t, method+" with the tag "+bad, all[method]("good", "", bad), oci.ErrManifestInvalid)
		}
	}
}

func testUnknown(t *testing.T, reg oci.Registry) {
	digest := oci.DigestOf([]byte("unknown"))
	all := calls(t, reg)
	check := func(repo string) {
		t.Helper()
		for _, method := range []string{"GetBlob", "GetBlobRange", "ResolveBlob", "MountBlob from", "DeleteBlob"} {
			checkError(t, method, all[method](repo, digest, ""), oci.ErrBlobUnknown, oci.ErrNameUnknown)
		}
		for _, method := range []string{"GetManifest", "ResolveManifest", "DeleteTag"} {
			checkError(t, method, all[method](repo, "", "unknown"), oci.ErrManifestUnknown, oci.ErrNameUnknown)
			if method != "DeleteTag" {
				checkError(t, method, all[method](repo, "", digest.String()), oci.ErrManifestUnknown, oci.ErrNameUnknown)
			}
		}
		checkError(t, "DeleteManifest", all["DeleteManifest"](repo, digest, ""), oci.ErrManifestUnknown, oci.ErrNameUnknown)
	}
	check("unknown")
	pushBlob(t, reg, "unknown", oci.MediaTypeLayer, []byte("x"))
	check("unknown")
}
