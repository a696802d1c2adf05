package ocitest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"

	"sluice/oci"
)

// start begins an upload that is canceled, if it isn't over, when the test ends.
func start(t *testing.T, reg oci.Registry, repo string) oci.Upload {
	t.Helper()
	u, err := reg.StartUpload(t.Context(), repo)
	if err != nil {
		t.Fatalf("StartUpload(%s): %v", repo, err)
	}
	if u.Size() != 0 || u.ID() == "" {
		t.Fatalf("a new upload has ID %q and %d bytes", u.ID(), u.Size())
	}
	return u
}

// add appends content where the upload ends.
func add(t *testing.T, u oci.Upload, content []byte) {
	t.Helper()
	offset := u.Size()
	if err := u.Append(t.Context(), offset, bytes.NewReader(content)); err != nil {
		t.Fatalf("Append(%d, %d bytes): %v", offset, len(content), err)
	}
	if got, want := u.Size(), offset+int64(len(content)); got != want {
		t.Fatalf("after Append(%d, %d bytes) the size is %d", offset, len(content), got)
	}
}

func testUpload(t *testing.T, reg oci.Registry) {
	content := random(20, 700_001)
	for _, algorithm := range []oci.Algorithm{oci.SHA256, oci.SHA512} {
		u := start(t, reg, "up/load")
		add(t, u, content[:1])
		add(t, u, nil)
		add(t, u, content[1:300_000])
		add(t, u, content[300_000:])
		digest := algorithm.FromBytes(content)
		checkNoBlob(t, reg, "up/load", digest)
		desc, err := u.Commit(t.Context(), digest)
		if err != nil || desc.Digest != digest || desc.Size != int64(len(content)) {
			t.Fatalf("Commit: %+v, %v", desc, err)
		}
		checkBlob(t, reg, "up/load", digest, content)
		checkOver(t, reg, "up/load", u)
	}
	u := start(t, reg, "nothing") // nothing at all is a blob, too
	if _, err := u.Commit(t.Context(), oci.DigestOf(nil)); err != nil {
		t.Fatalf("Commit of an empty upload: %v", err)
	}
	checkBlob(t, reg, "nothing", oci.DigestOf(nil), nil)
}

// checkOver checks that an upload is over.
func checkOver(t *testing.T, reg oci.Registry, repo string, u oci.Upload) {
	t.Helper()
	_, err := reg.ResumeUpload(t.Context(), repo, u.ID())
	checkError(t, "ResumeUpload of one that is over", err, oci.ErrBlobUploadUnknown)
	err = u.Append(t.Context(), u.Size(), bytes.NewReader([]byte("x")))
	checkError(t, "Append to an upload that is over", err, oci.ErrBlobUploadUnknown)
	_, err = u.Commit(t.Context(), oci.DigestOf(nil))
	checkError(t, "Commit of an upload that is over", err, oci.ErrBlobUploadUnknown)
	err = u.Cancel(t.Context())
	checkError(t, "Cancel of an upload that is over", err, oci.ErrBlobUploadUnknown)
}

func testResumeUpload(t *testing.T, reg oci.Registry) {
	content := random(21, 200_000)
	first := start(t, reg, "resume")
	add(t, first, content[:70_000])
	second, err := reg.ResumeUpload(t.Context(), "resume", first.ID())
	if err != nil {
		t.Fatalf("ResumeUpload: %v", err)
	}
	if second.Size() != 70_000 {
		t.Fatalf("the resumed upload has %d bytes, want 70000", second.Size())
	}
	add(t, second, content[70_000:150_000])
	third, err := reg.ResumeUpload(t.Context(), "resume", second.ID())
	if err != nil {
		t.Fatalf("ResumeUpload: %v", err)
	}
	add(t, third, content[150_000:])
	if _, err := third.Commit(t.Context(), oci.DigestOf(content)); err != nil {
		t.Fatalf("Commit: %v", err)
	}
	checkBlob(t, reg, "resume", oci.DigestOf(content), content)

	live := start(t, reg, "resume")
	for name, id := range map[string]string{
		"over": third.ID(), "unknown": "0123456789abcdef", "empty": "", "dots": "..", "path": "../../etc/passwd",
		"name": "resume", "zero byte": "a\x00b", "space": "a b", "query": "?_state=x", "host": "http://[::1", "long": string(bytes.Repeat([]byte("a"), 5000)),
	} {
		_, err := reg.ResumeUpload(t.Context(), "resume", id)
		checkError(t, "ResumeUpload, "+name, err, oci.ErrBlobUploadUnknown)
	}
	_, err = reg.ResumeUpload(t.Context(), "elsewhere", live.ID())
	checkError(t, "ResumeUpload in another repository", err, oci.ErrBlobUploadUnknown, oci.ErrNameUnknown)
	if err := live.Cancel(t.Context()); err != nil {
		t.Error(err)
	}
}

func testUploadOffset(t *testing.T, reg oci.Registry) {
	content := random(22, 1000)
	u := start(t, reg, "offset")
	add(t, u, content[:500])
	for _, offset := range []int64{0, 499, 501, -1, 1 << 62} {
		err := u.Append(t.Context(), offset, bytes.NewReader(content[500:]))
		checkError(t, "Append at a wrong offset", err, oci.ErrRangeInvalid)
		if u.Size() != 500 {
			t.Fatalf("Append at %d changed the size to %d", offset, u.Size())
		}
	}
	// Somebody else who resumed earlier is now behind.
	behind, err := reg.ResumeUpload(t.Context(), "offset", u.ID())
	if err != nil {
		t.Fatal(err)
	}
	add(t, u, content[500:600])
	if err := behind.Append(t.Context(), 500, bytes.NewReader(content[500:])); !errors.Is(err, oci.ErrRangeInvalid) && !errors.Is(err, oci.ErrBlobUploadUnknown) {
		t.Errorf("Append from behind: got error %v, want ErrRangeInvalid", err)
	}
	add(t, u, content[600:])
	if _, err := u.Commit(t.Context(), oci.DigestOf(content)); err != nil {
		t.Fatalf("Commit: %v", err)
	}
	checkBlob(t, reg, "offset", oci.DigestOf(content), content)
}

func testUploadBroken(t *testing.T, reg oci.Registry) {
	content := random(23, 400_000)
	u := start(t, reg, "broken")
	add(t, u, content[:100_000])
	err := u.Append(t.Context(), 100_000, brokenReader{bytes.NewReader(content[100_000:300_000])})
	checkError(t, "Append of a broken source", err, errBroken)
	// However much was kept, the upload goes on from there.
	again, err := reg.ResumeUpload(t.Context(), "broken", u.ID())
	if err != nil {
		t.Fatalf("ResumeUpload after a broken Append: %v", err)
	}
	size := again.Size()
	if size < 100_000 || size > 300_000 {
		t.Fatalf("after a broken Append the size is %d", size)
	}
	add(t, again, content[size:])
	if _, err := again.Commit(t.Context(), oci.DigestOf(content)); err != nil {
		t.Fatalf("Commit: %v", err)
	}
	checkBlob(t, reg, "broken", oci.DigestOf(content), content)
}

func testUploadCommit(t *testing.T, reg oci.Registry) {
	content := random(24, 2000)
	u := start(t, reg, "commit")
	add(t, u, content)
	for _, digest := range []oci.Digest{"", "sha256:", "sha256:00", "md5:d41d8cd98f00b204e9800998ecf8427e", "nonsense"} {
		_, err := u.Commit(t.Context(), digest)
		checkError(t, "Commit with the malformed digest "+digest.String(), err, oci.ErrDigestInvalid)
	}
	_, err := u.Commit(t.Context(), oci.DigestOf([]byte("other")))
	checkError(t, "Commit with a wrong digest", err, oci.ErrDigestInvalid)
	checkOver(t, reg, "commit", u)
	checkNoBlob(t, reg, "commit", oci.DigestOf(content))
	checkNoBlob(t, reg, "commit", oci.DigestOf([]byte("other")))
}

func testUploadCancel(t *testing.T, reg oci.Registry) {
	content := random(25, 2000)
	u := start(t, reg, "cancel")
	add(t, u, content)
	if err := u.Cancel(t.Context()); err != nil {
		t.Fatalf("Cancel: %v", err)
	}
	checkOver(t, reg, "cancel", u)
	checkNoBlob(t, reg, "cancel", oci.DigestOf(content))
	if repos, err := collect(t, reg.Repositories(t.Context(), "")); err != nil || len(repos) > 0 {
		t.Errorf("repositories after a canceled upload only: %q, %v", repos, err)
	}
}

func testUploadContext(t *testing.T, reg oci.Registry) {
	_, err := reg.StartUpload(canceled(t), "context")
	checkError(t, "StartUpload", err, context.Canceled)

	ctx, cancel := context.WithCancel(t.Context())
	u, err := reg.StartUpload(ctx, "context")
	if err != nil {
		t.Fatal(err)
	}
	cancel() // the upload outlives it
	content := random(26, 100_000)
	add(t, u, content[:40_000])

	ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	source := io.MultiReader(bytes.NewReader(content[40_000:60_000]), cancelReader{cancel}, bytes.NewReader(content[60_000:]))
	err = u.Append(ctx, 40_000, source)
	checkError(t, "Append", err, context.Canceled)
	_, err = u.Commit(canceled(t), oci.DigestOf(content))
	checkError(t, "Commit", err, context.Canceled)

	again, err := reg.ResumeUpload(t.Context(), "context", u.ID())
	if err != nil {
		t.Fatalf("ResumeUpload: %v", err)
	}
	add(t, again, content[again.Size():])
	if _, err := again.Commit(t.Context(), oci.DigestOf(content)); err != nil {
		t.Fatalf("Commit: %v", err)
	}
	checkBlob(t, reg, "context", oci.DigestOf(content), content)
}
