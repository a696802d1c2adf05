package convert

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"sluice/internal/artifact"
	"sluice/internal/blob"
	"sluice/oci"
)

const (
	// uploadBlock is how many bytes go in one request.
	uploadBlock = 4 << 20

	// uploadAttempts is how often a block is sent before its error counts.
	uploadAttempts = 4

	// cancelTime bounds giving up an upload.
	cancelTime = 10 * time.Second
)

// uploader is the artifact.Sink that is a repository.
type uploader struct {
	reg  oci.Registry
	repo string
}

func (c *converter) sink() artifact.Sink { return &uploader{reg: c.reg, repo: c.repo} }

// Create implements artifact.Sink.
func (u *uploader) Create(ctx context.Context) (artifact.BlobWriter, error) {
	up, err := u.reg.StartUpload(ctx, u.repo)
	if err != nil {
		return nil, &transportError{fmt.Errorf("starting an upload to %s: %w", u.repo, err)}
	}
	return &upload{ctx: ctx, u: u, up: up}, nil
}

// ask pushes a manifest that can't be accepted, because its config is missing,
// and returns an error if what the registry objects to is its type.
func (c *converter) ask(ctx context.Context) error {
	if !c.opts.Ask || c.asked {
		return nil
	}
	missing := oci.DigestOf([]byte("what no repository has: " + rand.Text()))
	content, err := json.Marshal(oci.ImageManifest{
		Versioned: oci.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageManifest, ArtifactType: oci.ArtifactTypeStreaming,
		Config: oci.Descriptor{MediaType: oci.MediaTypeImageConfig, Digest: missing, Size: 1},
		Layers: []oci.Descriptor{},
	})
	if err != nil {
		return err
	}
	digest := oci.DigestOf(content).String()
	_, err = c.reg.PushManifest(ctx, c.repo, digest, oci.MediaTypeImageManifest, content)
	if errors.Is(err, oci.ErrDenied) {
		return fmt.Errorf("the registry takes no streaming artifacts from clients: %w", err)
	}
	if err == nil { // it allows what is incomplete
		_ = c.reg.DeleteManifest(ctx, c.repo, oci.Digest(digest)) // without a subject it bothers nobody
	}
	c.asked = true // what else is wrong will show
	return nil
}

// upload is a blob on its way into a repository, block by block. A block whose
// request fails is sent again from where the registry says it has got to.
type upload struct {
	ctx context.Context // of Create; governs the writes, as the contract of artifact.Sink says
	u   *uploader
	up  oci.Upload
	buf []byte
	at  int64 // the blob's offset of buf[0]
}

// Write implements io.Writer.
func (w *upload) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		if w.buf == nil {
			w.buf = make([]byte, 0, uploadBlock)
		}
		k := min(len(p), uploadBlock-len(w.buf))
		w.buf, p = append(w.buf, p[:k]...), p[k:]
		if len(w.buf) == uploadBlock {
			if err := w.flush(w.ctx); err != nil {
				return 0, err
			}
		}
	}
	return n, nil
}

// flush sends what is buffered.
func (w *upload) flush(ctx context.Context) error {
	for attempt := 1; len(w.buf) > 0; attempt++ {
		err := w.up.Append(ctx, w.at, bytes.NewReader(w.buf))
		kept := w.up.Size() - w.at
		if kept < 0 || kept > int64(len(w.buf)) {
			return &transportError{fmt.Errorf("uploading to %s: the registry says it has %d bytes, %d to %d are possible: %w",
				w.u.repo, w.up.Size(), w.at, w.at+int64(len(w.buf)), errors.Join(err, oci.ErrBlobUploadInvalid))}
		}
		w.at += kept
		w.buf = w.buf[:copy(w.buf, w.buf[kept:])]
		if err == nil && kept == 0 {
			err = oci.ErrBlobUploadInvalid.Withf("the registry took nothing and said nothing")
		}
		if err == nil {
			attempt = 0
			continue
		}
		if attempt >= uploadAttempts || blob.Final(err) || ctx.Err() != nil {
			return &transportError{fmt.Errorf("uploading to %s at %d: %w", w.u.repo, w.at, err)}
		}
		select {
		case <-time.After(time.Duration(attempt) * 250 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	return nil
}

// Commit implements artifact.BlobWriter.
func (w *upload) Commit(ctx context.Context, digest oci.Digest) error {
	err := w.flush(ctx)
	if err == nil {
		if _, err = w.up.Commit(ctx, digest); err == nil {
			return nil
		}
		err = &transportError{fmt.Errorf("uploading %s to %s: %w", digest, w.u.repo, err)}
	}
	// The answer of a commit that succeeded may have been lost.
	if _, e := w.u.reg.ResolveBlob(ctx, w.u.repo, digest); e == nil {
		w.Cancel()
		return nil
	}
	w.Cancel()
	return err
}

// Cancel implements artifact.BlobWriter. That it can't be canceled is no news:
// the registry drops uploads that nobody continues.
func (w *upload) Cancel() {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(w.ctx), cancelTime)
	defer cancel()
	_ = w.up.Cancel(ctx)
}
