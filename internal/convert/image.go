package convert

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"golang.org/x/sync/errgroup"

	"sluice/internal/artifact"
	"sluice/internal/blob"
	"sluice/internal/layer"
	"sluice/oci"
)

// maxLayerTime bounds the time that reading one layer may take, pauses and
// all. While bytes come, there's no reason to give up sooner.
const maxLayerTime = 24 * time.Hour

// convert converts an image's layers and publishes its artifact.
func (c *converter) convert(ctx context.Context, img *image, a *Artifact) (*artifact.Built, error) {
	if err := c.ask(ctx); err != nil {
		return nil, err
	}
	layers, err := c.convertLayers(ctx, img)
	if err != nil {
		return nil, err
	}
	in := artifact.BuildInput{
		Subject: img.desc, Config: img.config, ConfigContent: img.content, Platform: img.platform, Layers: layers,
	}
	for _, l := range layers {
		a.TarSize += l.Tar.Size
		src := artifact.LayerSource{Tar: c.source(l.Tar.Blob)}
		if l.Sparse != nil {
			src.Sparse = c.source(l.Sparse.Blob)
		}
		in.Sources = append(in.Sources, src)
	}
	c.report(img.progress(StageBuild))
	built, err := artifact.Build(ctx, in, c.sink())
	if err != nil {
		return nil, err
	}
	c.report(img.progress(StagePublish))
	return built, c.push(ctx, built)
}

// source reads a blob of the repository.
func (c *converter) source(desc oci.Descriptor) blob.Source {
	return blob.Retry(blob.FromRegistry(c.reg, c.repo, desc), blob.RetryOptions{Total: maxLayerTime})
}

// convertLayers converts those of the image's layers that haven't been
// converted in this run, a few at a time.
func (c *converter) convertLayers(ctx context.Context, img *image) ([]*artifact.Layer, error) {
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(c.opts.Layers)
	layers := make([]*artifact.Layer, len(img.layers))
	first := make(map[oci.Digest]int) // of equal layers, the one that is converted
	for i, id := range img.diffIDs {
		if _, ok := first[id]; ok {
			continue
		}
		first[id] = i
		if layers[i] = c.layers[id]; layers[i] != nil {
			c.report(img.layerFinished(i))
			continue
		}
		group.Go(func() error {
			l, err := c.layer(gctx, img, i)
			layers[i] = l
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	for i, id := range img.diffIDs {
		if first[id] != i { // the image has it twice
			layers[i] = layers[first[id]]
			c.report(img.layerFinished(i))
		}
		c.layers[id] = layers[i]
	}
	return layers, nil
}

// attempts tries to do something with layer i of an image, again if the network
// or the storage fails.
func (c *converter) attempts(ctx context.Context, img *image, i int, try func(layer.Gunzip) error) error {
	desc := img.layers[i]
	gunzip := c.opts.gunzip
	for attempt := 1; ; attempt++ {
		err := try(gunzip)
		if err == nil {
			return nil
		}
		err = fmt.Errorf("layer %d (%s): %w", i, desc.Digest, err)
		if refused := (refusedError{}); errors.As(err, &refused) {
			return err
		}
		if gunzip != (layer.Gunzip{}) && wrong(ctx, err) {
			// Is it the layer or the program? Our own decoder also says where.
			c.opts.Log.WarnContext(ctx, "converting a layer failed, trying again without the other program", "repository", c.repo, "gunzip", gunzip, "error", err)
			gunzip = layer.Gunzip{}
			continue
		}
		if wrong(ctx, err) {
			return contentError{err}
		}
		if attempt >= c.opts.Attempts || !passing(ctx, err) {
			return err
		}
		c.opts.Log.WarnContext(ctx, "converting a layer failed, trying again", "repository", c.repo, "attempt", attempt, "error", err)
		pause := time.Duration(attempt) * time.Second
		select {
		case <-time.After(pause/2 + rand.N(pause/2)):
		case <-ctx.Done():
			return err
		}
	}
}

// passing reports whether an error is one of transport or storage, which may
// be gone the next time: not of the content, not an answer.
func passing(ctx context.Context, err error) bool {
	return ctx.Err() == nil && !blob.Final(err) && isTransport(err)
}

// wrong reports whether an error is one of the content, as it was decoded.
func wrong(ctx context.Context, err error) bool { return ctx.Err() == nil && !isTransport(err) }

func isTransport(err error) bool {
	var transport *transportError
	return errors.As(err, &transport)
}

// transportError marks an error of reading from or writing to the registry.
type transportError struct{ err error }

func (e *transportError) Error() string { return e.err.Error() }
func (e *transportError) Unwrap() error { return e.err }

// tryLayer converts a layer once.
func (c *converter) tryLayer(ctx context.Context, img *image, i int, gunzip layer.Gunzip) (l *artifact.Layer, err error) {
	err = c.readTar(ctx, img, i, gunzip, func(ctx context.Context, tar io.Reader) error {
		l, err = artifact.EncodeLayer(ctx, tar, c.sink(), artifact.EncodeOptions{DiffID: img.diffIDs[i], Workers: c.opts.Workers})
		var id *artifact.DiffIDError
		if errors.As(err, &id) {
			return fmt.Errorf("wrong content: %w", err)
		}
		return err
	})
	return l, err
}

// readTar gives layer i of an image, decoded, to use, which must read it to its
// end. That the blob is what its digest says is known at that end.
func (c *converter) readTar(ctx context.Context, img *image, i int, gunzip layer.Gunzip, use func(context.Context, io.Reader) error) error {
	desc := img.layers[i]
	// When whoever uses it gives up, a read that waits for the network is given
	// up, too.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	raw, err := c.source(desc).ReadRange(ctx, 0, desc.Size)
	if err != nil {
		return &transportError{err}
	}
	defer raw.Close()
	counted := &countReader{r: raw, count: func(n int64) {
		c.report(img.layerProgress(i, n))
	}}
	tar, err := gunzip.Decompress(ctx, oci.VerifyReader(counted, desc))
	if err != nil {
		return err
	}
	defer tar.Close()
	defer cancel() // first: Close waits for a read of the network
	return use(ctx, tar)
}

// progressStep is how many bytes of a layer pass between two reports.
const progressStep = 256 << 10

// countReader counts what passes, and marks what fails.
type countReader struct {
	r           io.Reader
	n, reported int64
	count       func(int64)
}

func (c *countReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if c.n-c.reported >= progressStep {
		c.reported = c.n
		c.count(c.n)
	}
	if err != nil && err != io.EOF {
		err = &transportError{err}
	}
	return n, err
}
