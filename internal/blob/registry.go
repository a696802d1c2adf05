package blob

import (
	"context"
	"errors"
	"io"

	"sluice/oci"
)

// FromRegistry returns the blob that desc names in a repository of r. Every
// ReadRange is one GetBlobRange. A registry that answers for another blob, or
// says that the blob has another size than desc, is asked once more with Doubt,
// and then is an error that is oci.ErrDigestInvalid or oci.ErrSizeInvalid.
func FromRegistry(r oci.Reader, repo string, desc oci.Descriptor) Source {
	return &registrySource{reader: r, repo: repo, desc: desc}
}

type registrySource struct {
	reader oci.Reader
	repo   string
	desc   oci.Descriptor
}

func (s *registrySource) Size() int64 { return s.desc.Size }

func (s *registrySource) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	name := s.desc.Digest.String()
	if err := checkRange(name, s.desc.Size, off, n); err != nil {
		return nil, err
	}
	if n == 0 {
		return emptyReader(ctx), nil // registries refuse a range of nothing
	}
	body, err := s.open(ctx, off, n)
	if err != nil && isOther(err) && !Doubted(ctx) {
		body, err = s.open(Doubt(ctx), off, n)
	}
	if err != nil {
		return nil, &RangeError{Blob: name, Offset: off, Length: n, Err: err}
	}
	return &exactReader{ctx: ctx.Err, r: body, name: name, off: off, n: n}, nil
}

// open opens a range and checks that it is of the blob.
func (s *registrySource) open(ctx context.Context, off, n int64) (oci.BlobReader, error) {
	body, err := s.reader.GetBlobRange(ctx, s.repo, s.desc.Digest, off, n)
	if err != nil {
		return nil, err
	}
	if err := s.checkDescriptor(body.Descriptor()); err != nil {
		body.Close()
		return nil, err
	}
	return body, nil
}

// isOther reports whether an error says that a registry has another blob.
func isOther(err error) bool {
	return errors.Is(err, oci.ErrDigestInvalid) || errors.Is(err, oci.ErrSizeInvalid)
}

// checkDescriptor compares what the registry says of the blob with what is
// known. A registry may not know the whole size ("Content-Range: bytes
// 0-9/*"); a descriptor then has none.
func (s *registrySource) checkDescriptor(got oci.Descriptor) error {
	if got.Digest != "" && got.Digest != s.desc.Digest {
		return oci.ErrDigestInvalid.Withf("the registry answered with %s", got.Digest)
	}
	if got.Size > 0 && got.Size != s.desc.Size {
		return oci.ErrSizeInvalid.Withf("the registry says that the blob has %d bytes; its descriptor says %d", got.Size, s.desc.Size)
	}
	return nil
}

func emptyReader(ctx context.Context) io.ReadCloser {
	return &exactReader{ctx: ctx.Err, r: io.NopCloser(eofReader{})}
}

type eofReader struct{}

func (eofReader) Read([]byte) (int, error) { return 0, io.EOF }
