package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"sluice/oci"
)

const (
	maxConfig  = 16 << 20 // bytes of an image's config
	maxImages  = 10_000   // of one archive
	maxListed  = 20       // images that a message names
	layoutFile = "oci-layout"
	indexFile  = "index.json"
	dockerFile = "manifest.json"
)

// Image is an image of an Archive.
type Image struct {
	// Names are what the archive calls it: "docker.io/library/debian:12",
	// "v1". They are hostile text. There may be none.
	Names []string

	// Descriptor is that of its manifest or index.
	Descriptor oci.Descriptor
}

// Tag returns the tag in the image's first name that has one, or "".
func (m Image) Tag() string {
	for _, name := range m.Names {
		if oci.CheckTag(name) == nil {
			return name
		}
		if tag := tagOf(name); tag != "" {
			return tag
		}
	}
	return ""
}

// tagOf returns the tag that an image reference has, or "".
func tagOf(name string) string {
	ref, err := oci.ParseReference(name)
	if err != nil || !strings.HasSuffix(name, ":"+ref.Tag) {
		return ""
	}
	return ref.Tag
}

// Archive is an oci.Reader of images in files, and lists their referrers. All
// its content is in one repository, whose name doesn't matter. A reference that
// isn't a digest is one of the images' names, or what Find makes of it; "" is
// the only image.
//
// Content is verified as the contract of oci.Reader says: manifests are, blobs
// are not. It may be used concurrently until it is closed. The files must not
// be changed meanwhile; if they are, digests no longer match.
type Archive struct {
	name   string
	files  files
	images []Image

	// Of an OCI image layout: the media types of the manifests that index.json
	// names, and those of them that have a subject, by subject.
	known     map[oci.Digest]string
	referrers map[oci.Digest][]oci.Descriptor

	// Of the older form of docker save: the manifests made for it, and where its
	// blobs are.
	manifests map[oci.Digest]oci.Manifest
	blobs     map[oci.Digest]string
}

// Open opens what is in a file or directory, whatever its kind.
func Open(ctx context.Context, name string) (*Archive, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if info.IsDir() {
		root, err := os.OpenRoot(name)
		if err != nil {
			return nil, err
		}
		return newArchive(ctx, filepath.Clean(name), dirFiles{root})
	}
	t, err := openTar(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	return newArchive(ctx, name, t)
}

// OpenLayout opens an OCI image layout (image-spec 1.1, image-layout.md): a
// directory, or a tar of one, which may be compressed with gzip.
func OpenLayout(ctx context.Context, name string) (*Archive, error) {
	a, err := Open(ctx, name)
	if err == nil && a.known == nil {
		a.Close()
		return nil, fmt.Errorf("%s is not an OCI image layout but of docker save", name)
	}
	return a, err
}

// OpenArchive opens a tar that `docker save` wrote, of whatever version, or
// `podman save`; it may be compressed with gzip. Those of docker 25 and later
// are OCI image layouts too.
func OpenArchive(ctx context.Context, name string) (*Archive, error) { return Open(ctx, name) }

// OpenStream opens the tar of one of these kinds that r yields. It is spooled to
// a temporary file.
func OpenStream(ctx context.Context, r io.Reader, name string) (*Archive, error) {
	t, err := spool(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	return newArchive(ctx, name, t)
}

// newArchive reads what images are in the files, which it closes when it fails.
func newArchive(ctx context.Context, name string, in files) (*Archive, error) {
	a := &Archive{name: name, files: in}
	isLayout, err := has(in, layoutFile)
	isDocker := false
	if err == nil && !isLayout {
		isDocker, err = has(in, dockerFile)
	}
	switch {
	case err != nil:
	case isLayout:
		err = a.readLayout(ctx)
	case isDocker:
		err = a.readDocker(ctx)
	default:
		err = fmt.Errorf("it has neither the file %s of an OCI image layout nor the file %s of docker save", layoutFile, dockerFile)
	}
	if err != nil {
		in.Close()
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	return a, nil
}

// Close closes the files. Blobs that are open end.
func (a *Archive) Close() error { return a.files.Close() }

// Images returns the archive's images, in its own order.
func (a *Archive) Images() []Image { return slices.Clone(a.images) }

// Find returns the image of a name, of a tag that only one image has, of a name
// that docker would understand alike ("debian:12" for
// "docker.io/library/debian:12"), of a digest, or, with "", the only image.
//
// Errors: ErrManifestUnknown, which says what images there are.
func (a *Archive) Find(reference string) (Image, error) {
	if reference == "" {
		if len(a.images) == 1 {
			return a.images[0], nil
		}
		return Image{}, oci.ErrManifestUnknown.Withf("say which image of %s: %s", a.name, a.listing())
	}
	for _, match := range []func(name string) bool{
		func(name string) bool { return name == reference },
		func(name string) bool { return sameReference(name, reference) },
		func(name string) bool { return tagOf(name) == reference },
	} {
		found := slices.DeleteFunc(slices.Clone(a.images), func(m Image) bool { return !slices.ContainsFunc(m.Names, match) })
		switch len(found) {
		case 0:
		case 1:
			return found[0], nil
		default:
			return Image{}, oci.ErrManifestUnknown.Withf("%s has several images %q: %s", a.name, reference, a.listing())
		}
	}
	for _, m := range a.images {
		if m.Descriptor.Digest.String() == reference {
			return m, nil
		}
	}
	return Image{}, oci.ErrManifestUnknown.Withf("%s has no image %.200q: %s", a.name, reference, a.listing())
}

// sameReference reports whether docker takes two names for the same.
func sameReference(a, b string) bool {
	x, err := oci.ParseReference(a)
	if err != nil {
		return false
	}
	y, err := oci.ParseReference(b)
	return err == nil && x == y
}

// listing says what images there are.
func (a *Archive) listing() string {
	if len(a.images) == 0 {
		return "it has none"
	}
	var names []string
	for _, m := range a.images {
		if len(names) >= maxListed {
			names = append(names, fmt.Sprintf("and %d more", len(a.images)-maxListed))
			break
		}
		name := m.Descriptor.Digest.String()
		if len(m.Names) > 0 {
			name = fmt.Sprintf("%.200q", m.Names[0])
		}
		names = append(names, name)
	}
	return "it has " + strings.Join(names, ", ")
}

// GetManifest implements oci.Reader.
func (a *Archive) GetManifest(ctx context.Context, _, reference string) (oci.Manifest, error) {
	if err := ctx.Err(); err != nil {
		return oci.Manifest{}, err
	}
	digest := oci.Digest(reference)
	if _, err := oci.ParseDigest(reference); err != nil {
		m, err := a.Find(reference)
		if err != nil {
			return oci.Manifest{}, err
		}
		digest = m.Descriptor.Digest
	}
	if m, ok := a.manifests[digest]; ok {
		return m, nil
	}
	name, err := a.blobName(digest)
	if err != nil {
		return oci.Manifest{}, oci.ErrManifestUnknown.Withf("manifest %s is not in %s", digest, a.name)
	}
	content, err := readFile(a.files, name, oci.MaxManifestSize)
	if errors.Is(err, fs.ErrNotExist) {
		return oci.Manifest{}, oci.ErrManifestUnknown.Withf("manifest %s is not in %s", digest, a.name)
	}
	if err != nil {
		return oci.Manifest{}, fmt.Errorf("manifest %s of %s: %w", digest, a.name, err)
	}
	if digest.Algorithm().FromBytes(content) != digest {
		return oci.Manifest{}, oci.ErrDigestInvalid.Withf("manifest %s of %s has another content", digest, a.name)
	}
	mediaType := a.known[digest]
	if mediaType == "" {
		mediaType = typeOf(content)
	}
	return oci.Manifest{Descriptor: oci.Descriptor{MediaType: mediaType, Digest: digest, Size: int64(len(content))}, Content: content}, nil
}

// ResolveManifest implements oci.Reader.
func (a *Archive) ResolveManifest(ctx context.Context, repo, reference string) (oci.Descriptor, error) {
	m, err := a.GetManifest(ctx, repo, reference)
	return m.Descriptor, err
}

// GetBlob implements oci.Reader.
func (a *Archive) GetBlob(ctx context.Context, _ string, digest oci.Digest) (oci.BlobReader, error) {
	return a.openBlob(ctx, digest)
}

// GetBlobRange implements oci.Reader.
func (a *Archive) GetBlobRange(ctx context.Context, _ string, digest oci.Digest, offset, length int64) (oci.BlobReader, error) {
	b, err := a.openBlob(ctx, digest)
	if err != nil {
		return nil, err
	}
	if offset < 0 || offset >= b.desc.Size {
		b.Close()
		return nil, oci.ErrRangeInvalid.Withf("blob %s of %s: no byte at offset %d of %d", digest, a.name, offset, b.desc.Size)
	}
	left := b.desc.Size - offset
	if length < 0 || length > left {
		length = left
	}
	b.r = io.NewSectionReader(b.file, offset, length)
	return b, nil
}

// ResolveBlob implements oci.Reader.
func (a *Archive) ResolveBlob(ctx context.Context, _ string, digest oci.Digest) (oci.Descriptor, error) {
	b, err := a.openBlob(ctx, digest)
	if err != nil {
		return oci.Descriptor{}, err
	}
	return b.desc, b.Close()
}

// Referrers lists the manifests that the archive's index names, whose subject
// is the given one, as oci.Lister does.
func (a *Archive) Referrers(ctx context.Context, _ string, subject oci.Digest, artifactType string) iter.Seq2[oci.Descriptor, error] {
	return func(yield func(oci.Descriptor, error) bool) {
		if err := ctx.Err(); err != nil {
			yield(oci.Descriptor{}, err)
			return
		}
		for _, desc := range a.referrers[subject] {
			if artifactType != "" && desc.ArtifactType != artifactType {
				continue
			}
			if !yield(desc, nil) {
				return
			}
		}
	}
}

// complete reports whether the archive has a manifest and all it needs.
func (a *Archive) complete(ctx context.Context, desc oci.Descriptor, depth int) bool {
	m, err := a.GetManifest(ctx, "", desc.Digest.String())
	if err != nil || depth > maxDepth {
		return false
	}
	info, err := oci.ParseManifestInfo(m.Content, desc.MediaType)
	if err != nil {
		return false
	}
	for _, b := range info.Blobs {
		if _, err := a.ResolveBlob(ctx, "", b.Digest); err != nil {
			return false
		}
	}
	for _, child := range info.Manifests {
		if !a.complete(ctx, child, depth+1) {
			return false
		}
	}
	return true
}

// blobName returns the name of the file that has a blob's content.
func (a *Archive) blobName(digest oci.Digest) (string, error) {
	if _, err := oci.ParseDigest(digest.String()); err != nil {
		return "", err
	}
	if a.blobs == nil {
		return "blobs/" + digest.Algorithm().String() + "/" + digest.Encoded(), nil
	}
	name, ok := a.blobs[digest]
	if !ok {
		return "", oci.ErrBlobUnknown.Withf("blob %s is not in %s", digest, a.name)
	}
	return name, nil
}

func (a *Archive) openBlob(ctx context.Context, digest oci.Digest) (*blobReader, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	name, err := a.blobName(digest)
	if err != nil {
		return nil, err
	}
	f, err := a.files.open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, oci.ErrBlobUnknown.Withf("blob %s is not in %s", digest, a.name)
	}
	if err != nil {
		return nil, fmt.Errorf("blob %s of %s: %w", digest, a.name, err)
	}
	desc := oci.Descriptor{MediaType: oci.MediaTypeOctetStream, Digest: digest, Size: f.Size()}
	return &blobReader{file: f, r: f, err: ctx.Err, desc: desc}, nil
}

// blobReader reads a blob of an archive for as long as its context lasts.
type blobReader struct {
	file *file
	r    io.Reader
	err  func() error
	desc oci.Descriptor
}

func (b *blobReader) Descriptor() oci.Descriptor { return b.desc }
func (b *blobReader) Close() error               { return b.file.Close() }

func (b *blobReader) Read(p []byte) (int, error) {
	if err := b.err(); err != nil {
		return 0, err
	}
	return b.r.Read(p)
}
