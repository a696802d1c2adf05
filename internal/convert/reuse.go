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

	// Convert converts the layer into blobs of Repo.
	Convert func(context.Context) (*artifact.Layer, error)
}

// Reuse returns the converted form of a layer, from elsewhere or by
// LayerSource.Convert. The blobs of what it returns are in the source's
// repository.
type Reuse func(context.Context, LayerSource) (*artifact.Layer, error)

// layer returns layer i of an image, converted.
func (c *converter) layer(ctx context.Context, img *image, i int) (l *artifact.Layer, err error) {
	src := LayerSource{Repo: c.repo, Blob: img.layers[i], DiffID: img.diffIDs[i]}
	src.Prove = func(ctx context.Context) error {
		return c.attempts(ctx, img, i, func(gunzip layer.Gunzip) error { return c.prove(ctx, img, i, gunzip) })
	}
	src.Convert = func(ctx context.Context) (l *artifact.Layer, err error) {
		err = c.attempts(ctx, img, i, func(gunzip layer.Gunzip) (err error) {
			l, err = c.tryLayer(ctx, img, i, gunzip)
			return err
		})
		return l, err
	}
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

// prove reads layer i of an image without converting it.
func (c *converter) prove(ctx context.Context, img *image, i int, gunzip layer.Gunzip) error {
	desc := img.layers[i]
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	raw, err := c.source(desc).ReadRange(ctx, 0, desc.Size)
	if err != nil {
		return &transportError{err}
	}
	defer raw.Close()
	counted := &countReader{r: raw, count: func(n int64) { c.report(img.layerProgress(i, n)) }}
	tar, err := gunzip.Decompress(ctx, oci.VerifyReader(counted, desc))
	if err != nil {
		return err
	}
	defer tar.Close()
	defer cancel()
	hash := sha256.New()
	if _, err := io.Copy(hash, tar); err != nil {
		return err
	}
	if got := oci.Digest(fmt.Sprintf("%s:%x", oci.SHA256, hash.Sum(nil))); got != img.diffIDs[i] {
		return &artifact.DiffIDError{Want: img.diffIDs[i], Got: got}
	}
	return nil
}

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
