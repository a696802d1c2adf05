package convert

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"sluice/internal/artifact"
	"sluice/internal/layer"
	"sluice/oci"
)

// ErrContent is the error for layers whose content isn't what the image says, or
// can't be read: trying again changes nothing.
var ErrContent = errors.New("the layer's content is wrong")

// LayerSource is a layer that an image has, as it is in the registry.
type LayerSource struct {
	Repo   string
	Blob   oci.Descriptor // the original layer
	DiffID oci.Digest     // as the image's config says

	// Prove reads the layer and returns nil if its diff ID is DiffID. Whoever
	// has a layer from elsewhere by diff ID alone must ask first: a config may
	// claim any, and with it the content of somebody else's image.
	Prove func(context.Context) error

	// Read gives the layer's tar to use, and again from the beginning if the
	// network or the storage fails, or a program that decodes it. What use has
	// read can be believed when Read returns nil: then the tar had the blob's
	// digest and the diff ID. Errors of use that aren't about the content must
	// be made by Refuse.
	Read func(ctx context.Context, use func(context.Context, io.Reader) error) error

	// Convert converts the layer into blobs of Repo.
	Convert func(context.Context) (*artifact.Layer, error)
}

// Reuse returns the converted form of a layer, from elsewhere or by
// LayerSource.Convert. The blobs of what it returns are in the source's
// repository.
type Reuse func(context.Context, LayerSource) (*artifact.Layer, error)

// layer returns layer i of an image, converted.
func (c *converter) layer(ctx context.Context, img *image, i int) (l *artifact.Layer, err error) {
	src := c.layerSource(img, i)
	if c.opts.Reuse != nil {
		l, err = c.opts.Reuse(ctx, src)
	} else {
		l, err = src.Convert(ctx)
	}
	if err != nil {
		return nil, err
	}
	c.report(img.layerFinished(i))
	return l, nil
}

// layerSource returns layer i of an image, to be read.
func (c *converter) layerSource(img *image, i int) LayerSource {
	src := LayerSource{Repo: c.repo, Blob: img.layers[i], DiffID: img.diffIDs[i]}
	src.Read = func(ctx context.Context, use func(context.Context, io.Reader) error) error {
		return c.attempts(ctx, img, i, func(gunzip layer.Gunzip) error {
			return c.readTar(ctx, img, i, gunzip, func(ctx context.Context, tar io.Reader) error {
				return checkTar(ctx, tar, src.DiffID, use)
			})
		})
	}
	src.Prove = func(ctx context.Context) error {
		return src.Read(ctx, func(_ context.Context, tar io.Reader) error {
			_, err := io.Copy(io.Discard, tar)
			return err
		})
	}
	src.Convert = func(ctx context.Context) (l *artifact.Layer, err error) {
		err = c.attempts(ctx, img, i, func(gunzip layer.Gunzip) (err error) {
			l, err = c.tryLayer(ctx, img, i, gunzip)
			return err
		})
		return l, err
	}
	return src
}

// checkTar has a tar used, and compares its digest with its diff ID.
func checkTar(ctx context.Context, tar io.Reader, diffID oci.Digest, use func(context.Context, io.Reader) error) error {
	hash := sha256.New()
	hashed := io.TeeReader(tar, hash)
	if err := use(ctx, hashed); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, hashed); err != nil {
		return err
	}
	if got := oci.Digest(fmt.Sprintf("%s:%x", oci.SHA256, hash.Sum(nil))); got != diffID {
		return &artifact.DiffIDError{Want: diffID, Got: got}
	}
	return nil
}

// Image is an image manifest that can be converted.
type Image struct {
	Manifest      oci.Descriptor
	Platform      oci.Platform
	ConfigContent []byte        // the image's config, verified
	Layers        []LayerSource // the lowest first
}

// Images returns what Convert would convert, for those who make something else of
// the layers; of the options it heeds Platforms, Attempts, Progress and Log.
// Errors: those of Convert.
func Images(ctx context.Context, reg oci.Registry, repo, reference string, opts Options) ([]Image, error) {
	c := &converter{reg: reg, repo: repo, opts: opts.withDefaults()}
	c.report = c.reporter()
	p, err := c.plan(ctx, reference)
	if err != nil {
		return nil, err
	}
	var all []Image
	for _, img := range p.images {
		one := Image{Manifest: img.desc, Platform: img.platform, ConfigContent: img.content}
		for i := range img.layers {
			one.Layers = append(one.Layers, c.layerSource(img, i))
		}
		all = append(all, one)
	}
	return all, nil
}

// Refuse marks an error of who reads a layer and will have nothing of it, so that
// LayerSource.Read doesn't try again.
func Refuse(err error) error { return refusedError{err} }

type refusedError struct{ error }

func (e refusedError) Unwrap() error { return e.error }

// Checked is what Check found out about an image.
type Checked struct {
	Subject oci.Descriptor
	Images  int   // platforms to convert
	Size    int64 // bytes of their layers, as they are in the registry
	Skipped []Skipped
}

// Check says whether Convert would convert what reference names, without doing
// it. Errors: those of Convert.
func Check(ctx context.Context, reg oci.Registry, repo, reference string, opts Options) (Checked, error) {
	c := &converter{reg: reg, repo: repo, opts: opts}
	p, err := c.plan(ctx, reference)
	if err != nil {
		return Checked{}, err
	}
	checked := Checked{Subject: p.subject, Images: len(p.images), Skipped: p.skipped}
	for _, img := range p.images {
		checked.Size += img.size()
	}
	return checked, nil
}

// contentError marks an error that is the layer's own, and says of which.
type contentError struct{ error }

func (contentError) Is(target error) bool { return target == ErrContent }
func (e contentError) Unwrap() error      { return e.error }
