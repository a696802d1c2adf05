package oci

import (
	"crypto/sha256"
	_ "crypto/sha512" // registers the second algorithm that ParseDigest admits
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
)

// Digest is a content address such as "sha256:9f86d0…".
type Digest = digest.Digest

// Algorithm is a digest's hash function.
type Algorithm = digest.Algorithm

// The algorithms that OCI registers and that Sluice computes.
const (
	SHA256 = digest.SHA256
	SHA512 = digest.SHA512
)

// ParseDigest returns s as a Digest if it is a well-formed sha256 or sha512
// digest in lower case; otherwise an error that is ErrDigestInvalid.
func ParseDigest(s string) (Digest, error) {
	d := Digest(s)
	if err := d.Validate(); err != nil {
		return "", ErrDigestInvalid.Withf("%q is not a digest: %v", s, err)
	}
	if a := d.Algorithm(); a != SHA256 && a != SHA512 {
		return "", ErrDigestInvalid.Withf("digest %q: only sha256 and sha512 are supported", s)
	}
	return d, nil
}

// DigestOf returns the sha256 digest of b.
func DigestOf(b []byte) Digest {
	return digest.NewDigestFromBytes(SHA256, sum256(b))
}

func sum256(b []byte) []byte {
	s := sha256.Sum256(b)
	return s[:]
}

// VerifyReader returns a reader of r that ends with an error, which is
// ErrDigestInvalid or ErrSizeInvalid, instead of io.EOF unless what it
// yielded is what desc says. It never yields more than desc.Size bytes.
func VerifyReader(r io.Reader, desc Descriptor) io.Reader {
	return &verifyReader{r: r, desc: desc, verifier: desc.Digest.Verifier(), left: desc.Size}
}

type verifyReader struct {
	r        io.Reader
	desc     Descriptor
	verifier digest.Verifier
	left     int64
}

func (v *verifyReader) Read(p []byte) (int, error) {
	if v.left == 0 {
		return 0, v.end()
	}
	if int64(len(p)) > v.left {
		p = p[:v.left]
	}
	n, err := v.r.Read(p)
	v.verifier.Write(p[:n]) // a hash never fails
	v.left -= int64(n)
	if err == io.EOF {
		if v.left > 0 {
			return n, ErrSizeInvalid.Withf("%s: ended %d bytes short of its %d", v.desc.Digest, v.left, v.desc.Size)
		}
		return n, v.end()
	}
	return n, err
}

// end decides how a stream of the right length ends.
func (v *verifyReader) end() error {
	var one [1]byte
	for {
		n, err := v.r.Read(one[:])
		if n > 0 {
			return ErrSizeInvalid.Withf("%s: longer than its %d bytes", v.desc.Digest, v.desc.Size)
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("%s: reading its end: %w", v.desc.Digest, err)
		}
	}
	if !v.verifier.Verified() {
		return ErrDigestInvalid.Withf("%s: content of %d bytes does not match the digest", v.desc.Digest, v.desc.Size)
	}
	return io.EOF
}
