package oci

import (
	"fmt"
	"regexp"

	"github.com/distribution/reference"
)

// maxNameLength is what distribution-spec lets clients assume of a host name
// and a repository name together.
const maxNameLength = 255

var (
	// Patterns of distribution-spec 1.1, "Pulling manifests".
	namePattern = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagPattern  = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)
)

// CheckRepository returns an error that is ErrNameInvalid unless name is a
// repository name of the distribution specification.
func CheckRepository(name string) error {
	if len(name) > maxNameLength {
		return ErrNameInvalid.Withf("repository name of %d characters: %d are allowed", len(name), maxNameLength)
	}
	if !namePattern.MatchString(name) {
		return ErrNameInvalid.Withf("%q is not a repository name: use lower-case letters, digits, and . _ - / between them", name)
	}
	return nil
}

// CheckTag returns an error that is ErrManifestInvalid unless tag is a tag of
// the distribution specification.
func CheckTag(tag string) error {
	if !tagPattern.MatchString(tag) {
		return ErrManifestInvalid.Withf("%q is not a tag: use up to 128 letters, digits, and . _ -, not beginning with . or -", tag)
	}
	return nil
}

// Reference is a parsed image reference.
type Reference struct {
	// Registry is the host, with its port if it has one: "127.0.0.1:5000",
	// "docker.io".
	Registry string

	// Repository is the name within the registry: "library/debian".
	Repository string

	// Tag is empty when the reference has none; Digest likewise. With both,
	// the digest decides.
	Tag    string
	Digest Digest
}

// ParseReference parses an image reference the way docker and containerd's CRI
// do: a missing registry is docker.io, a missing tag and digest is "latest".
func ParseReference(s string) (Reference, error) {
	named, err := reference.ParseDockerRef(s)
	if err != nil {
		return Reference{}, fmt.Errorf("image reference %q: %w", s, err)
	}
	// ParseDockerRef drops the tag where there's a digest, as docker does.
	r := Reference{Registry: reference.Domain(named), Repository: reference.Path(named)}
	if r.Registry == "" { // as of "d_cker.io/x": read as a host, which it can't be
		return Reference{}, fmt.Errorf("image reference %q: what is before the first slash is not a host name", s)
	}
	if t, ok := named.(reference.Tagged); ok {
		r.Tag = t.Tag()
	}
	if d, ok := named.(reference.Digested); ok {
		if r.Digest, err = ParseDigest(d.Digest().String()); err != nil {
			return Reference{}, fmt.Errorf("image reference %q: %w", s, err)
		}
	}
	if err := CheckRepository(r.Repository); err != nil {
		return Reference{}, fmt.Errorf("image reference %q: %w", s, err)
	}
	return r, nil
}

// Target is what the reference asks a registry for: the digest if there is
// one, otherwise the tag.
func (r Reference) Target() string {
	if r.Digest != "" {
		return r.Digest.String()
	}
	return r.Tag
}

// String returns the canonical form, with the registry's host.
func (r Reference) String() string {
	s := r.Registry + "/" + r.Repository
	if r.Tag != "" {
		s += ":" + r.Tag
	}
	if r.Digest != "" {
		s += "@" + r.Digest.String()
	}
	return s
}
