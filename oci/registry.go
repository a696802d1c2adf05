package oci

import (
	"context"
	"io"
	"iter"
)

// Registry is what Sluice knows of any place that stores images: a server at
// the end of an HTTP connection, directories on a local disk, a map in memory.
// All of them behave alike, and ocitest.Run checks that they do.
//
// Every method may be called concurrently. Every error that a peer of the
// distribution protocol could have answered is, or wraps, an *Error, so that
// errors.Is(err, ErrBlobUnknown) holds on both ends of a wire. Besides what
// each method lists, every method answers a malformed repository name with
// ErrNameInvalid, a malformed digest with ErrDigestInvalid and a malformed tag
// with ErrManifestInvalid.
//
// A repository comes into being with the first blob or manifest pushed to it
// and is gone with the last. Asking an unknown repository for something is
// ErrNameUnknown or the error for the thing itself being unknown: some places
// can't tell the two apart (the answer to a HEAD request has no body).
//
// The context governs the call and, where a BlobReader is returned or a
// sequence is ranged over, reads from it as well: once the context is done they
// end with its error. An Upload outlives the context it was started with.
type Registry interface {
	Reader
	Writer
	Lister
	Deleter
}

// Reader is the pull half of a Registry.
type Reader interface {
	// GetBlob opens a whole blob. The reader's content is as the store has
	// it: whoever depends on it being the digest's content must verify it
	// (see VerifyReader).
	//
	// Errors: ErrNameUnknown, ErrBlobUnknown, ErrDigestInvalid.
	GetBlob(ctx context.Context, repo string, digest Digest) (BlobReader, error)

	// GetBlobRange opens length bytes of a blob from offset on; a negative
	// length means all that follows. A range that begins at or beyond the end
	// of the blob, or at a negative offset, is ErrRangeInvalid (so every range
	// of an empty blob is); one that ends beyond it is cut short. A length of
	// zero yields nothing.
	// A part of a blob can't be verified against the blob's digest.
	//
	// Errors: as GetBlob, and ErrRangeInvalid.
	GetBlobRange(ctx context.Context, repo string, digest Digest, offset, length int64) (BlobReader, error)

	// ResolveBlob tells a blob's size without opening it.
	//
	// Errors: as GetBlob.
	ResolveBlob(ctx context.Context, repo string, digest Digest) (Descriptor, error)

	// GetManifest returns the manifest that reference, a tag or a digest,
	// names. Its content has been verified against the digest it returns.
	//
	// Errors: ErrNameUnknown, ErrManifestUnknown, ErrDigestInvalid.
	GetManifest(ctx context.Context, repo, reference string) (Manifest, error)

	// ResolveManifest is GetManifest without the content.
	ResolveManifest(ctx context.Context, repo, reference string) (Descriptor, error)
}

// Writer is the push half of a Registry. What a method has acknowledged by
// returning nil is durable in implementations that outlive the process.
type Writer interface {
	// PushBlob stores the blob that r yields. desc.Digest must be its digest
	// and desc.Size its size; neither is believed: a mismatch is
	// ErrDigestInvalid or ErrSizeInvalid and nothing is stored.
	PushBlob(ctx context.Context, repo string, desc Descriptor, r io.Reader) (Descriptor, error)

	// StartUpload begins a blob whose digest is not known yet. The repository
	// need not exist.
	StartUpload(ctx context.Context, repo string) (Upload, error)

	// ResumeUpload continues the upload that an earlier StartUpload, perhaps
	// of an earlier process, returned with this ID.
	//
	// Errors: ErrBlobUploadUnknown.
	ResumeUpload(ctx context.Context, repo, id string) (Upload, error)

	// MountBlob makes a blob of repository from available in repository to,
	// without moving its bytes.
	//
	// Errors: ErrNameUnknown or ErrBlobUnknown when from doesn't have it.
	MountBlob(ctx context.Context, from, to string, digest Digest) (Descriptor, error)

	// PushManifest stores a manifest under its digest and, if reference is a
	// tag, points the tag at it. If reference is a digest, content must match
	// it. The manifest's subject, if any, need not exist yet, nor layers that
	// are kept elsewhere; its other references must, and have the size that
	// their descriptors say. See ParseManifestInfo for what content must be.
	//
	// Errors: ErrManifestInvalid, ErrManifestBlobUnknown, ErrDigestInvalid.
	PushManifest(ctx context.Context, repo, reference, mediaType string, content []byte) (Descriptor, error)
}

// Upload is a blob on its way into a Registry. Its methods must not be called
// concurrently.
type Upload interface {
	// ID resumes the upload with ResumeUpload.
	ID() string

	// Size is how many bytes the registry has acknowledged: where the next
	// Append must begin.
	Size() int64

	// Append adds what r yields at offset, which must equal Size
	// (ErrRangeInvalid otherwise). When it fails midway, Size tells how
	// much was kept.
	Append(ctx context.Context, offset int64, r io.Reader) error

	// Commit ends the upload: the blob becomes visible under digest, which
	// must be that of the bytes appended (ErrDigestInvalid otherwise). With a
	// well-formed digest the upload is over, whether it matched or not. An
	// upload that is over answers every method with ErrBlobUploadUnknown.
	Commit(ctx context.Context, digest Digest) (Descriptor, error)

	// Cancel discards the upload.
	Cancel(ctx context.Context) error
}

// Lister enumerates. A sequence yields an error at most once, as its last
// element. Names come in lexical (byte) order; last, if not empty, is excluded
// together with everything before it, so a listing can be paged.
type Lister interface {
	// Repositories lists the repositories that hold at least one manifest or
	// blob.
	Repositories(ctx context.Context, last string) iter.Seq2[string, error]

	// Tags lists a repository's tags. Errors: ErrNameUnknown.
	Tags(ctx context.Context, repo, last string) iter.Seq2[string, error]

	// Referrers lists the manifests of repo whose subject is the given digest,
	// ordered by digest; with a non-empty artifactType only those of that
	// type. Descriptors carry the artifact type and the annotations of the
	// manifest. A subject that doesn't exist, or a repository that doesn't,
	// simply has none.
	Referrers(ctx context.Context, repo string, subject Digest, artifactType string) iter.Seq2[Descriptor, error]
}

// Deleter removes. Deleting what isn't there is ErrNameUnknown, ErrBlobUnknown
// or ErrManifestUnknown.
type Deleter interface {
	// DeleteBlob removes a blob, also one that manifests refer to. Whoever is
	// reading it reads on or gets an error, but never other bytes.
	DeleteBlob(ctx context.Context, repo string, digest Digest) error

	// DeleteManifest removes a manifest, every tag that points at it, and its
	// entry among the referrers of its subject. Its own referrers stay, except
	// that a registry may delete those of type ArtifactTypeStreaming with it:
	// they were made of it.
	DeleteManifest(ctx context.Context, repo string, digest Digest) error

	// DeleteTag removes a tag and leaves the manifest.
	DeleteTag(ctx context.Context, repo, tag string) error
}

// BlobReader is an open blob, or a range of one.
type BlobReader interface {
	io.ReadCloser

	// Descriptor has the digest and size of the whole blob, also when only a
	// range of it is read.
	Descriptor() Descriptor
}

// Manifest is a manifest as it was pushed, byte for byte.
type Manifest struct {
	// Descriptor's MediaType, Digest and Size describe Content.
	Descriptor Descriptor
	Content    []byte
}
