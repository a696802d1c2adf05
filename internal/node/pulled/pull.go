package pulled

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"sluice/internal/artifact"
	"sluice/internal/blob"
	"sluice/internal/convert"
	"sluice/oci"
)

// Progress says how far a pull is.
type Progress struct {
	Layers int   `json:"layers"` // of the image
	Size   int64 `json:"size"`   // bytes of all layers, as they are in the registry

	// Which layer, from 0, and how many bytes of its Total have come. Finished
	// says that it is here, once for each layer; Here, that it was before. Done
	// may begin again at 0 when a layer is tried again.
	Layer    int   `json:"layer"`
	Done     int64 `json:"done"`
	Total    int64 `json:"total"`
	Finished bool  `json:"finished,omitempty"`
	Here     bool  `json:"here,omitempty"`
}

// ErrUnavailable: the registry didn't say what a reference means. An image that was
// pulled by it before may do.
var ErrUnavailable = errors.New("the registry doesn't answer, or with a failure of its own")

// Pull brings the image that ref names here, as far as it isn't, and holds it for
// owner. A digest that is known needs no registry; a tag takes one request to see
// that the image is here. progress, if not nil, is called from several
// goroutines, but by one at a time.
//
// A pull that fails, or whose ctx ends, leaves the layers that are complete, for
// the next one; Collect removes them. Concurrent pulls fetch a layer once.
func (s *Store) Pull(ctx context.Context, ref, owner string, progress func(Progress)) (Image, error) {
	r, err := oci.ParseReference(ref)
	if err != nil {
		return Image{}, err
	}
	if r.Digest != "" {
		if img, ok := s.known(r.Digest, owner); ok {
			return img, nil
		}
	}
	reg, err := s.opts.Registry(r.Registry, r.Repository)
	if err != nil {
		return Image{}, fmt.Errorf("registry %s: %w", r.Registry, err)
	}
	m, err := reg.GetManifest(ctx, r.Repository, r.Target())
	if err != nil && !blob.Final(err) && !errors.Is(err, oci.ErrManifestUnknown) && !errors.Is(err, oci.ErrManifestInvalid) {
		return Image{}, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if err != nil {
		return Image{}, err
	}
	if img, ok := s.known(m.Descriptor.Digest, owner); ok {
		return img, nil
	}
	target, err := s.choose(m)
	if err != nil {
		return Image{}, fmt.Errorf("%s: %w", r, err)
	}
	give, err := s.locks.take(ctx, "image/"+target.String())
	if err != nil {
		return Image{}, err
	}
	defer give()
	if img, ok, err := s.addName(target, m.Descriptor.Digest, owner); ok || err != nil {
		return img, err
	}
	report := &reporter{tell: progress}
	images, err := convert.Images(ctx, reg, r.Repository, target.String(), convert.Options{
		Platforms: []oci.Platform{s.opts.Platform}, Progress: report.progress, Log: s.log,
	})
	if err != nil {
		return Image{}, fmt.Errorf("%s: %w", r, err)
	}
	// An index that says nothing of platforms has no image of its own digest.
	if id := images[0].Manifest.Digest; id != target {
		give, err := s.locks.take(ctx, "image/"+id.String())
		if err != nil {
			return Image{}, err
		}
		defer give()
		if img, ok, err := s.addName(id, m.Descriptor.Digest, owner); ok || err != nil {
			return img, err
		}
	}
	img, err := s.fetch(ctx, images[0], m.Descriptor.Digest, owner, report)
	if err != nil {
		return Image{}, fmt.Errorf("%s: %w", r, err)
	}
	return img, nil
}

// choose returns the digest of the image manifest for this machine that m is, or
// that m, an index, has. Where an index says nothing of platforms, it's its own
// digest: the images' configs will say.
func (s *Store) choose(m oci.Manifest) (oci.Digest, error) {
	if !oci.IsIndex(m.Descriptor.MediaType) {
		return m.Descriptor.Digest, nil
	}
	info, err := oci.ParseManifestInfo(m.Content, m.Descriptor.MediaType)
	if err != nil {
		return "", err
	}
	var others []string
	for _, d := range info.Manifests {
		switch {
		case d.Platform == nil || d.Annotations["vnd.docker.reference.type"] != "": // BuildKit's attestations
		case d.Platform.OS == s.opts.Platform.OS && d.Platform.Architecture == s.opts.Platform.Architecture &&
			(s.opts.Platform.Variant == "" || s.opts.Platform.Variant == d.Platform.Variant):
			return d.Digest, nil
		case len(others) < 8:
			others = append(others, d.Platform.OS+"/"+d.Platform.Architecture)
		}
	}
	if len(others) > 0 {
		return "", fmt.Errorf("there's no image for %s/%s, only for %s", s.opts.Platform.OS, s.opts.Platform.Architecture, strings.Join(others, ", "))
	}
	return m.Descriptor.Digest, nil
}

// fetch brings the layers of an image here and adds it.
func (s *Store) fetch(ctx context.Context, src convert.Image, name oci.Digest, owner string, report *reporter) (Image, error) {
	img := Image{
		ID: src.Manifest.Digest, Names: []oci.Digest{src.Manifest.Digest}, Platform: src.Platform,
		Config: oci.DigestOf(src.ConfigContent),
	}
	if name != img.ID {
		img.Names = append(img.Names, name)
	}
	var config oci.ImageConfig
	if err := json.Unmarshal(src.ConfigContent, &config); err != nil {
		return img, fmt.Errorf("its config: %w", err)
	}
	for _, l := range src.Layers {
		img.DiffIDs = append(img.DiffIDs, l.DiffID)
		report.size += l.Blob.Size
	}
	report.layers = len(src.Layers)
	report.begin()
	defer s.pin(img.DiffIDs)()
	layers := make([]*artifact.Layer, len(src.Layers))
	var left atomic.Int64
	left.Store(s.opts.MaxImage)
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(s.opts.Layers)
	for i, l := range src.Layers {
		if slices.Index(img.DiffIDs, l.DiffID) < i {
			continue // the image has it twice
		}
		group.Go(func() (err error) {
			var here bool
			if layers[i], here, err = s.layer(gctx, l, &left); err != nil {
				return fmt.Errorf("layer %d: %w", i, err)
			}
			report.finished(i, l.Blob.Size, here)
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return img, err
	}
	for i, l := range src.Layers {
		if first := slices.Index(img.DiffIDs, l.DiffID); first < i {
			layers[i] = layers[first]
			report.finished(i, l.Blob.Size, true)
		}
	}
	return s.add(ctx, img, src.ConfigContent, layers, owner)
}

// pin keeps layers from Collect until unpin.
func (s *Store) pin(layers []oci.Digest) (unpin func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range layers {
		s.pinned[l]++
	}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, l := range layers {
			if s.pinned[l]--; s.pinned[l] == 0 {
				delete(s.pinned, l)
			}
		}
	}
}

// reporter tells of a pull's progress. layers and size are set before begin.
type reporter struct {
	layers int
	size   int64

	mu   sync.Mutex // held while tell runs
	tell func(Progress)
}

// begin tells what is going to be pulled.
func (r *reporter) begin() { r.report(Progress{Layer: -1}) }

// progress takes what package convert reports of reading a layer.
func (r *reporter) progress(p convert.Progress) {
	if p.Stage == convert.StageLayer {
		r.report(Progress{Layer: p.Layer, Done: p.Done, Total: p.Total})
	}
}

func (r *reporter) finished(layer int, size int64, here bool) {
	r.report(Progress{Layer: layer, Done: size, Total: size, Finished: true, Here: here})
}

func (r *reporter) report(p Progress) {
	if r.tell == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	p.Layers, p.Size = r.layers, r.size
	r.tell(p)
}
