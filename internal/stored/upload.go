package stored

import (
	"context"
	"crypto/sha256"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"
	"time"

	"sluice/internal/storage"
	"sluice/oci"
)

// busyTimeout is how long a request for an upload waits for another one, such
// as one whose client has vanished, to let go of it.
const busyTimeout = 30 * time.Second

// busyInterval is how often it looks whether that has happened.
const busyInterval = 50 * time.Millisecond

// storedUpload is an upload of a Registry. It holds nothing open: each method
// resumes the upload in the store, which sees to it that one at a time does, so
// any number of storedUploads may be about the same upload.
type storedUpload struct {
	registry *Registry
	repo, id string
	size     int64
}

// uploadState is what a checkpoint keeps besides the bytes.
type uploadState struct {
	Repository string `json:"repository"`

	// SHA256 is the state of the hash of all bytes, so that a commit needn't
	// read them again. (A sha512 digest is rare enough for reading.)
	SHA256 []byte `json:"sha256,omitempty"`
}

// StartUpload implements oci.Writer.
func (r *Registry) StartUpload(ctx context.Context, repo string) (oci.Upload, error) {
	if err := check(ctx, repo); err != nil {
		return nil, err
	}
	if err := r.admit(ctx, repo, "", 1); err != nil {
		return nil, err
	}
	u, err := r.store.StartUpload(ctx)
	if err != nil {
		return nil, err
	}
	defer u.Close()
	if err := checkpoint(ctx, u, repo, sha256.New()); err != nil {
		return nil, err
	}
	return &storedUpload{registry: r, repo: repo, id: u.ID()}, nil
}

// ResumeUpload implements oci.Writer.
func (r *Registry) ResumeUpload(ctx context.Context, repo, id string) (oci.Upload, error) {
	if err := check(ctx, repo); err != nil {
		return nil, err
	}
	size, state, err := r.store.StatUpload(ctx, id)
	if err == nil {
		_, err = parseState(state, repo)
	}
	if err != nil {
		return nil, uploadError(repo, id, err)
	}
	return &storedUpload{registry: r, repo: repo, id: id, size: size}, nil
}

// ID implements oci.Upload.
func (u *storedUpload) ID() string { return u.id }

// Size implements oci.Upload.
func (u *storedUpload) Size() int64 { return u.size }

// Append implements oci.Upload. What came before a failure is kept.
func (u *storedUpload) Append(ctx context.Context, offset int64, r io.Reader) error {
	su, sum, err := u.open(ctx)
	if err != nil {
		return err
	}
	defer su.Close()
	if err := u.append(ctx, su, sum, offset, r); err != nil {
		return err
	}
	return u.keep(ctx, su, sum)
}

// append adds what r yields to su and sum. When it fails midway it keeps what
// came.
func (u *storedUpload) append(ctx context.Context, su storage.Upload, sum hash.Hash, offset int64, r io.Reader) error {
	size, _ := su.Position()
	if offset != size {
		return oci.ErrRangeInvalid.Withf("upload %s to %s: append at %d, and it has %d bytes", u.id, u.repo, offset, size)
	}
	_, err := copyContext(ctx, io.MultiWriter(su, sum), u.registry.bounded(u.repo, size, r))
	if err == nil {
		return nil
	}
	if kerr := u.keep(ctx, su, sum); kerr != nil {
		return kerr
	}
	return uploadError(u.repo, u.id, err)
}

// keep acknowledges what su has, also of a request that has ended: its client
// will be back for the rest.
func (u *storedUpload) keep(ctx context.Context, su storage.Upload, sum hash.Hash) error {
	if err := checkpoint(context.WithoutCancel(ctx), su, u.repo, sum); err != nil {
		return uploadError(u.repo, u.id, err)
	}
	u.size, _ = su.Position()
	return nil
}

// Commit implements oci.Upload.
func (u *storedUpload) Commit(ctx context.Context, want oci.Digest) (oci.Descriptor, error) {
	return u.finish(ctx, want, func(storage.Upload, hash.Hash) error { return nil })
}

// Finish is Append and Commit in one, for registry.Finisher: what is both the
// last of an upload and all right is made durable once, as a blob.
func (u *storedUpload) Finish(ctx context.Context, offset int64, r io.Reader, want oci.Digest) (oci.Descriptor, error) {
	return u.finish(ctx, want, func(su storage.Upload, sum hash.Hash) error {
		return u.append(ctx, su, sum, offset, r)
	})
}

// finish has last add the rest of the upload, and makes it a blob.
func (u *storedUpload) finish(ctx context.Context, want oci.Digest, last func(storage.Upload, hash.Hash) error) (oci.Descriptor, error) {
	if _, err := oci.ParseDigest(want.String()); err != nil {
		return oci.Descriptor{}, err
	}
	su, sum, err := u.open(ctx)
	if err != nil {
		return oci.Descriptor{}, err
	}
	defer su.Close()
	if err := last(su, sum); err != nil {
		return oci.Descriptor{}, err
	}
	if want.Algorithm() != oci.SHA256 {
		sum = want.Algorithm().Hash()
		if err := hashContent(ctx, su, sum); err != nil {
			return oci.Descriptor{}, uploadError(u.repo, u.id, err)
		}
	}
	size, _ := su.Position()
	if actual := oci.Digest(fmt.Sprintf("%s:%x", want.Algorithm(), sum.Sum(nil))); actual != want {
		err := oci.ErrDigestInvalid.Withf("upload to %s of %d bytes has the digest %s, not %s", u.repo, size, actual, want)
		return oci.Descriptor{}, errors.Join(err, u.registry.store.CancelUpload(ctx, u.id))
	}
	if err := u.registry.commitBlob(ctx, su, u.repo, want, size); err != nil {
		err = uploadError(u.repo, u.id, err)
		if errors.Is(err, oci.ErrDenied) { // and will be
			err = errors.Join(err, u.registry.store.CancelUpload(ctx, u.id))
		}
		return oci.Descriptor{}, err
	}
	return blobDescriptor(want, size), nil
}

// Cancel implements oci.Upload.
func (u *storedUpload) Cancel(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return uploadError(u.repo, u.id, u.registry.store.CancelUpload(ctx, u.id))
}

// open resumes the upload, with the hash of what it has.
func (u *storedUpload) open(ctx context.Context) (storage.Upload, hash.Hash, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	wait, cancel := context.WithTimeout(ctx, busyTimeout)
	defer cancel()
	su, err := u.alone(wait)
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
			err = oci.ErrBlobUploadInvalid.Withf("upload %s to %s: another request is still writing to it: try again", u.id, u.repo)
		}
		return nil, nil, uploadError(u.repo, u.id, err)
	}
	_, state := su.Position()
	parsed, err := parseState(state, u.repo)
	var sum hash.Hash
	if err == nil {
		sum, err = resumeHash(ctx, su, parsed)
	}
	if err != nil {
		su.Close()
		return nil, nil, uploadError(u.repo, u.id, err)
	}
	return su, sum, nil
}

// alone resumes the upload when no other request has it: of this process, which
// the store sees to, or of another replica, which only the index knows. The lock
// may be held for as long as a client sends, so nobody queues for it.
func (u *storedUpload) alone(ctx context.Context) (storage.Upload, error) {
	for {
		unlock, ok, err := u.registry.db.TryExclude(ctx, "upload "+u.id)
		if err != nil {
			return nil, err
		}
		if ok {
			su, err := u.registry.store.ResumeUpload(ctx, u.id)
			if err != nil {
				unlock()
				return nil, err
			}
			return &lockedUpload{Upload: su, unlock: sync.OnceFunc(unlock)}, nil
		}
		select {
		case <-time.After(busyInterval):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// lockedUpload is an upload that one request has.
type lockedUpload struct {
	storage.Upload
	unlock func()
}

func (u *lockedUpload) Close() error {
	defer u.unlock()
	return u.Upload.Close()
}

// resumeHash returns the hash of what an upload has, from its state or, if
// that is of another version of the program, by reading it all.
func resumeHash(ctx context.Context, u storage.Upload, state uploadState) (hash.Hash, error) {
	sum := sha256.New()
	if um, ok := sum.(encoding.BinaryUnmarshaler); ok && um.UnmarshalBinary(state.SHA256) == nil {
		return sum, nil
	}
	sum.Reset()
	return sum, hashContent(ctx, u, sum)
}

func hashContent(ctx context.Context, u storage.Upload, sum hash.Hash) error {
	content, err := u.Content(ctx)
	if err != nil {
		return err
	}
	defer content.Close()
	_, err = copyContext(ctx, sum, content)
	return err
}

// checkpoint acknowledges what was written to u.
func checkpoint(ctx context.Context, u storage.Upload, repo string, sum hash.Hash) error {
	state := uploadState{Repository: repo}
	if m, ok := sum.(encoding.BinaryMarshaler); ok {
		if b, err := m.MarshalBinary(); err == nil {
			state.SHA256 = b
		}
	}
	encoded, err := json.Marshal(state)
	if err != nil {
		return err
	}
	return u.Checkpoint(ctx, encoded)
}

// parseState returns the state of an upload to repo. An upload to another
// repository is as unknown as none.
func parseState(encoded []byte, repo string) (uploadState, error) {
	var state uploadState
	if err := json.Unmarshal(encoded, &state); err != nil || state.Repository != repo {
		return uploadState{}, storage.ErrUploadUnknown
	}
	return state, nil
}

func uploadError(repo, id string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, storage.ErrUploadUnknown):
		return oci.ErrBlobUploadUnknown.Withf("upload %.100q to %s is unknown or over", id, repo)
	case errors.Is(err, storage.ErrUploadConflict):
		return oci.ErrBlobUploadInvalid.Withf("upload %.100q to %s was continued at another replica meanwhile: ask how far it is, or begin anew", id, repo)
	}
	return fmt.Errorf("upload %.100q to %s: %w", id, repo, err)
}
