package ocitest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"testing"

	"sluice/oci"
)

func testBlob(t *testing.T, reg oci.Registry) {
	content := random(1, 10_000)
	checkNoBlob(t, reg, "a/b", oci.DigestOf(content))
	desc := pushBlob(t, reg, "a/b", oci.MediaTypeLayer, content)
	checkBlob(t, reg, "a/b", desc.Digest, content)
	pushBlob(t, reg, "a/b", oci.MediaTypeLayer, content) // again
	checkBlob(t, reg, "a/b", desc.Digest, content)
	checkNoBlob(t, reg, "a/b", oci.DigestOf([]byte("another")))
	checkNoBlob(t, reg, "a", desc.Digest)
	checkNoBlob(t, reg, "a/b/c", desc.Digest)

	sha512 := oci.Descriptor{Digest: oci.SHA512.FromBytes(content), Size: desc.Size}
	got, err := reg.PushBlob(t.Context(), "a/b", sha512, bytes.NewReader(content))
	if err != nil || got.Digest != sha512.Digest || got.Size != sha512.Size {
		t.Fatalf("PushBlob with sha512: %v, %v", got, err)
	}
	checkBlob(t, reg, "a/b", sha512.Digest, content)
}

func testEmptyBlob(t *testing.T, reg oci.Registry) {
	desc := pushBlob(t, reg, "empty", oci.MediaTypeLayer, nil)
	checkBlob(t, reg, "empty", desc.Digest, nil)
	for _, length := range []int64{-1, 0, 1} {
		_, err := reg.GetBlobRange(t.Context(), "empty", desc.Digest, 0, length)
		checkError(t, "GetBlobRange of an empty blob", err, oci.ErrRangeInvalid)
	}
}

func testLargeBlob(t *testing.T, reg oci.Registry) {
	content := random(2, 5<<20+3)
	desc := describe(oci.MediaTypeLayer, content)
	// A reader of unknown kind, so that nothing can learn its length.
	if _, err := reg.PushBlob(t.Context(), "large", desc, io.MultiReader(bytes.NewReader(content))); err != nil {
		t.Fatal(err)
	}
	checkBlob(t, reg, "large", desc.Digest, content)
}

func testWrongBlob(t *testing.T, reg oci.Registry) {
	content := random(3, 5000)
	other := random(4, 5000)
	right := describe("", content)
	for name, test := range map[string]struct {
		desc   oci.Descriptor
		source io.Reader
		want   error
	}{
		"digest":        {right, bytes.NewReader(other), oci.ErrDigestInvalid},
		"too long":      {right, bytes.NewReader(append(bytes.Clone(content), 'x')), oci.ErrSizeInvalid},
		"too short":     {right, bytes.NewReader(content[:4999]), oci.ErrSizeInvalid},
		"nothing":       {right, bytes.NewReader(nil), oci.ErrSizeInvalid},
		"size of none":  {oci.Descriptor{Digest: right.Digest}, bytes.NewReader(content), oci.ErrSizeInvalid},
		"negative size": {oci.Descriptor{Digest: right.Digest, Size: -1}, bytes.NewReader(content), oci.ErrSizeInvalid},
		"broken source": {right, brokenReader{bytes.NewReader(content[:3000])}, errBroken},
		"broken end":    {right, brokenReader{bytes.NewReader(content)}, errBroken},
	} {
		if _, err := reg.PushBlob(t.Context(), "wrong", test.desc, test.source); !errors.Is(err, test.want) {
			t.Errorf("%s: got error %v, want %v", name, err, test.want)
		}
		checkNoBlob(t, reg, "wrong", right.Digest)
		checkNoBlob(t, reg, "wrong", oci.DigestOf(other))
	}
	if repos, err := collect(t, reg.Repositories(t.Context(), "")); err != nil || len(repos) > 0 {
		t.Errorf("repositories after failed pushes only: %q, %v", repos, err)
	}
	pushBlob(t, reg, "wrong", oci.MediaTypeLayer, content)
	checkBlob(t, reg, "wrong", right.Digest, content)
}

func testBlobRange(t *testing.T, reg oci.Registry) {
	content := random(5, 1000)
	desc := pushBlob(t, reg, "range", oci.MediaTypeLayer, content)
	const huge = 1<<63 - 1
	for _, test := range []struct {
		offset, length int64
		from, to       int
	}{
		{0, 1000, 0, 1000},
		{0, -1, 0, 1000},
		{0, 1, 0, 1},
		{1, 998, 1, 999},
		{999, 1, 999, 1000},
		{999, -1, 999, 1000},
		{500, -huge, 500, 1000},
		{500, 501, 500, 1000},
		{500, huge, 500, 1000},
		{0, 0, 0, 0},
		{10, 0, 10, 10},
	} {
		r, err := reg.GetBlobRange(t.Context(), "range", desc.Digest, test.offset, test.length)
		if err != nil {
			t.Errorf("GetBlobRange(%d, %d): %v", test.offset, test.length, err)
			continue
		}
		checkReader(t, r, desc.Digest, 1000, content[test.from:test.to])
	}
	for _, offset := range []int64{-1, -huge, 1000, 1001, huge} {
		for _, length := range []int64{-1, 0, 1, huge} {
			_, err := reg.GetBlobRange(t.Context(), "range", desc.Digest, offset, length)
			if !errors.Is(err, oci.ErrRangeInvalid) {
				t.Errorf("GetBlobRange(%d, %d): got error %v, want ErrRangeInvalid", offset, length, err)
			}
		}
	}
}

func testMountBlob(t *testing.T, reg oci.Registry) {
	content := random(6, 3000)
	desc := pushBlob(t, reg, "from", oci.MediaTypeLayer, content)
	got, err := reg.MountBlob(t.Context(), "from", "to/here", desc.Digest)
	if err != nil || got.Digest != desc.Digest || got.Size != desc.Size {
		t.Fatalf("MountBlob: %+v, %v", got, err)
	}
	checkBlob(t, reg, "to/here", desc.Digest, content)
	if err := reg.DeleteBlob(t.Context(), "from", desc.Digest); err != nil {
		t.Fatal(err)
	}
	checkNoBlob(t, reg, "from", desc.Digest)
	checkBlob(t, reg, "to/here", desc.Digest, content)

	unknown := oci.DigestOf([]byte("unknown"))
	_, err = reg.MountBlob(t.Context(), "to/here", "third", unknown)
	checkError(t, "MountBlob of an unknown blob", err, oci.ErrBlobUnknown)
	_, err = reg.MountBlob(t.Context(), "nowhere", "third", desc.Digest)
	checkError(t, "MountBlob from an unknown repository", err, oci.ErrBlobUnknown, oci.ErrNameUnknown)
	checkNoBlob(t, reg, "third", desc.Digest)
}

func testBlobContext(t *testing.T, reg oci.Registry) {
	content := random(7, 8<<20) // more than connections and buffers hold
	desc := pushBlob(t, reg, "context", oci.MediaTypeLayer, content)
	_, err := reg.GetBlob(canceled(t), "context", desc.Digest)
	checkError(t, "GetBlob", err, context.Canceled)
	_, err = reg.GetBlobRange(canceled(t), "context", desc.Digest, 1, 2)
	checkError(t, "GetBlobRange", err, context.Canceled)
	_, err = reg.ResolveBlob(canceled(t), "context", desc.Digest)
	checkError(t, "ResolveBlob", err, context.Canceled)

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r, err := reg.GetBlob(ctx, "context", desc.Digest)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	got := make([]byte, 1000)
	if _, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, content[:1000]) {
		t.Fatalf("first bytes are wrong (%v)", err)
	}
	cancel()
	_, err = io.Copy(io.Discard, r)
	checkError(t, "reading after cancel", err, context.Canceled)

	// A push whose context ends midway leaves nothing.
	other := random(8, 100_000)
	ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	source := io.MultiReader(bytes.NewReader(other[:50_000]), cancelReader{cancel}, bytes.NewReader(other[50_000:]))
	_, err = reg.PushBlob(ctx, "context", describe("", other), source)
	checkError(t, "PushBlob", err, context.Canceled)
	checkNoBlob(t, reg, "context", oci.DigestOf(other))
}

// cancelReader is empty, and cancels when it is read.
type cancelReader struct{ cancel context.CancelFunc }

func (c cancelReader) Read([]byte) (int, error) {
	c.cancel()
	return 0, io.EOF
}

func testDeleteBlob(t *testing.T, reg oci.Registry) {
	content := random(9, 8<<20)
	desc := pushBlob(t, reg, "delete", oci.MediaTypeLayer, content)
	kept := pushBlob(t, reg, "delete", oci.MediaTypeLayer, []byte("kept"))
	r, err := reg.GetBlob(t.Context(), "delete", desc.Digest)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := reg.DeleteBlob(t.Context(), "delete", desc.Digest); err != nil {
		t.Fatal(err)
	}
	checkNoBlob(t, reg, "delete", desc.Digest)
	checkBlob(t, reg, "delete", kept.Digest, []byte("kept"))
	got, err := io.ReadAll(r)
	if !bytes.HasPrefix(content, got) {
		t.Errorf("reading a deleted blob gave other bytes than its own")
	} else if err == nil && len(got) < len(content) {
		t.Errorf("reading a deleted blob ended after %d of %d bytes without an error", len(got), len(content))
	}
	err = reg.DeleteBlob(t.Context(), "delete", desc.Digest)
	checkError(t, "DeleteBlob again", err, oci.ErrBlobUnknown)
	err = reg.DeleteBlob(t.Context(), "nowhere", desc.Digest)
	checkError(t, "DeleteBlob in an unknown repository", err, oci.ErrBlobUnknown, oci.ErrNameUnknown)

	pushBlob(t, reg, "delete", oci.MediaTypeLayer, content)
	checkBlob(t, reg, "delete", desc.Digest, content)
}

func testConcurrentBlob(t *testing.T, reg oci.Registry) {
	const pushers = 8
	content := random(10, 300_000)
	desc := describe(oci.MediaTypeLayer, content)
	var wait sync.WaitGroup
	for i := range pushers {
		wait.Go(func() {
			repo := []string{"same", "other"}[i%2]
			if i%4 >= 2 { // half of them through an upload
				if err := uploadBlob(t.Context(), reg, repo, desc.Digest, content); err != nil {
					t.Errorf("uploading concurrently: %v", err)
				}
			} else if _, err := reg.PushBlob(t.Context(), repo, desc, bytes.NewReader(content)); err != nil {
				t.Errorf("pushing concurrently: %v", err)
			}
			r, err := reg.GetBlob(t.Context(), repo, desc.Digest)
			if err != nil {
				t.Errorf("reading concurrently: %v", err)
				return
			}
			checkReader(t, r, desc.Digest, desc.Size, content)
		})
	}
	wait.Wait()
	checkBlob(t, reg, "same", desc.Digest, content)
	checkBlob(t, reg, "other", desc.Digest, content)
}

// uploadBlob pushes content as an upload in two parts.
func uploadBlob(ctx context.Context, reg oci.Registry, repo string, digest oci.Digest, content []byte) error {
	u, err := reg.StartUpload(ctx, repo)
	if err != nil {
		return err
	}
	half := len(content) / 2
	if err := u.Append(ctx, 0, bytes.NewReader(content[:half])); err != nil {
		return err
	}
	if err := u.Append(ctx, int64(half), bytes.NewReader(content[half:])); err != nil {
		return err
	}
	_, err = u.Commit(ctx, digest)
	return err
}
