package oci

import (
	"crypto/sha256"
	_ "crypto/sha512" // registers the second algorithm that ParseDigest admits
	"fmt"
	"io"
	"strings"

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
	if isDigest(s, "sha256:", 64) || isDigest(s, "sha512:", 128) {
		return d, nil
	}
	// What is wrong with it, the library says.
	if err := d.Validate(); err != nil {
		return "", ErrDigestInvalid.Withf("%q is not a digest: %v", s, err)
	}
	if a := d.Algorithm(); a != SHA256 && a != SHA512 {
		return "", ErrDigestInvalid.Withf("digest %q: only sha256 and sha512 are supported", s)
	}
	return d, nil
}

// isDigest reports whether s is prefix and then n hexadecimal digits. Every
// request passes here several times, so no regular expression does it.
func isDigest(s, prefix string, n int) bool {
	digits, ok := strings.CutPrefix(s, prefix)
	if !ok || len(digits) != n {
		return false
	}
	for i := range n {
		if c := digits[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// DigestOf returns the sha256 digest of b.
func DigestOf(b []byte) Digest {
	return digest.NewDigestFromBytes(SHA256, sum256(b))
}

func sum256(b []byte) []byte {
	s := sha256.Sum256(b)
	return s[:]
}

// VerifyReader returns a reader of r that ends with io.EOF only if what r
// yields is exactly what desc says, and otherwise with an error that is
// ErrDigestInvalid or ErrSizeInvalid. The last bytes come only once everything
// has been verified, so whoever has read desc.Size bytes, for example with
// io.ReadFull, has read the right ones. It never yields more than desc.Size
// bytes, and reads at most one more of r.
func VerifyReader(r io.Reader, desc Descriptor) io.Reader {
	if _, err := ParseDigest(desc.Digest.String()); err != nil {
		return &verifyReader{err: err}
	}
	if desc.Size < 0 {
		return &verifyReader{err: ErrSizeInvalid.Withf("%s: %d is not a size", desc.Digest, desc.Size)}
	}
	return &verifyReader{r: r, desc: desc, verifier: desc.Digest.Verifier(), left: desc.Size}
}

type verifyReader struct {
	r        io.Reader
	desc     Descriptor
	verifier digest.Verifier
	left     int64
	err      error // how the stream ended, once it has
}

func (v *verifyReader) Read(p []byte) (int, error) {
	if v.err != nil {
		return 0, v.err
	}
	if len(p) == 0 && v.left > 0 {
		return 0, nil
	}
	n := 0
	if v.left > 0 {
		if int64(len(p)) > v.left {
			p = p[:v.left]
		}
		n, v.err = v.r.Read(p)
		if n < 0 || n > len(p) {
			v.err = fmt.Errorf("%s: the reader returned an impossible count", v.desc.Digest)
			return 0, v.err
		}
		v.verifier.Write(p[:n]) // a hash never fails
		v.left -= int64(n)
		if v.left > 0 {
			if v.err == io.EOF {
				v.err = ErrSizeInvalid.Withf("%s: ended %d bytes short of its %d", v.desc.Digest, v.left, v.desc.Size)
			}
			return n, v.err
		}
		if v.err != nil && v.err != io.EOF {
			return 0, v.err
		}
	}
	if v.err = v.end(v.err == io.EOF); v.err != io.EOF {
		return 0, v.err
	}
	return n, io.EOF
}

// maxEmptyReads is how often in a row a reader may return neither bytes nor an
// error before it counts as stuck, as in package bufio.
const maxEmptyReads = 100

// end decides how a stream of the right length ends: io.EOF if it is what the
// descriptor says. atEOF tells that r has reported its end already.
func (v *verifyReader) end(atEOF bool) error {
	var one [1]byte
	for tries := 0; !atEOF; tries++ {
		n, err := v.r.Read(one[:])
		switch {
		case n > 0:
			return ErrSizeInvalid.Withf("%s: longer than its %d bytes", v.desc.Digest, v.desc.Size)
		case err == io.EOF:
			atEOF = true
		case err != nil:
			return fmt.Errorf("%s: reading its end: %w", v.desc.Digest, err)
		case tries == maxEmptyReads:
			return fmt.Errorf("%s: reading its end: %w", v.desc.Digest, io.ErrNoProgress)
		}
	}
	if !v.verifier.Verified() {
		return ErrDigestInvalid.Withf("%s: content of %d bytes does not match the digest", v.desc.Digest, v.desc.Size)
	}
	return io.EOF
}
