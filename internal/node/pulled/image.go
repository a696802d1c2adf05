package pulled

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"sluice/internal/artifact"
	"sluice/internal/durable"
	"sluice/internal/erofs"
	"sluice/oci"
)

// Image is an image that is here with all its content.
type Image struct {
	// ID is the digest of its manifest for this platform, and Names are those by
	// which a registry may answer for it: that one, and those of indexes.
	ID    oci.Digest   `json:"id"`
	Names []oci.Digest `json:"names"`

	Platform oci.Platform `json:"platform"`
	Config   oci.Digest   `json:"config"`  // of config.json
	DiffIDs  []oci.Digest `json:"diffIDs"` // the lowest first
	Metadata oci.Digest   `json:"metadata"`

	// Size is how many bytes it takes on the disk, layers that other images have
	// too included.
	Size    int64     `json:"size"`
	Created time.Time `json:"created"` // when it was pulled
}

// image is an Image and who has it.
type image struct {
	Image

	// Guarded by Store.mu. holders keep it; users have it mounted. leaving: it's
	// being removed, and nobody can have it any more.
	holders, users map[string]bool
	leaving        bool
}

func newImage(img Image) *image {
	return &image{Image: img, holders: make(map[string]bool), users: make(map[string]bool)}
}

// kept reports whether anybody has the image. The caller has Store.mu.
func (i *image) kept() bool { return len(i.holders) > 0 || len(i.users) > 0 }

// Names in an image's directory.
const (
	fileImage    = "image.json"
	fileConfig   = "config.json"
	fileMetadata = "image.erofs"
)

// maxNames bounds the names that an image remembers.
const maxNames = 16

// load finds the images that are complete and removes what a crash left.
func (s *Store) load() error {
	for _, dir := range []string{s.layersDir(), s.imagesDir()} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if durable.IsTemp(e.Name()) {
				if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
					return err
				}
			}
		}
	}
	entries, err := os.ReadDir(s.imagesDir())
	if err != nil {
		return err
	}
	for _, e := range entries {
		id, err := oci.ParseDigest("sha256:" + e.Name())
		if err != nil {
			continue // not ours
		}
		img, err := s.loadImage(id)
		if err != nil {
			s.log.Warn("a pulled image isn't complete any more, and is forgotten", "manifest", id, "error", err)
			if err := s.discard(s.imageDir(id)); err != nil {
				return err
			}
			continue
		}
		s.images[id] = newImage(img)
	}
	return nil
}

// loadImage reads an image's record and looks whether its files are there.
func (s *Store) loadImage(id oci.Digest) (Image, error) {
	var img Image
	if err := readJSON(filepath.Join(s.imageDir(id), fileImage), &img); err != nil {
		return img, err
	}
	if img.ID != id || len(img.DiffIDs) == 0 {
		return img, fmt.Errorf("its record is of %q", img.ID)
	}
	for _, d := range append([]oci.Digest{img.Config, img.Metadata}, img.DiffIDs...) {
		if _, err := oci.ParseDigest(d.String()); err != nil {
			return img, err
		}
	}
	if _, err := s.planeImage(img); err != nil {
		return img, err
	}
	return img, nil
}

// readJSON reads a small file.
func readJSON(name string, v any) error {
	content, err := durable.ReadFile(name, oci.MaxManifestSize)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(content, v); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// discard makes a directory disappear at once, and removes it.
func (s *Store) discard(dir string) error {
	gone, err := hide(dir)
	if err != nil || gone == "" {
		return err
	}
	return os.RemoveAll(gone)
}

// hide gives a directory a name under which it's removed, by the next start at
// the latest. A directory that isn't there is nothing ("").
func hide(dir string) (string, error) {
	gone := filepath.Join(filepath.Dir(dir), durable.TempPrefix+"gone-"+filepath.Base(dir)+fmt.Sprint(time.Now().UnixNano()))
	if err := durable.Rename(dir, gone); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return "", nil
		}
		return "", err
	}
	return gone, nil
}

// known returns the image that a registry means by a digest, held for owner.
func (s *Store) known(name oci.Digest, owner string) (Image, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, img := range s.images {
		if slices.Contains(img.Names, name) && !img.leaving {
			img.hold(owner)
			return img.Image, true
		}
	}
	return Image{}, false
}

// lookup returns an image, nil if it isn't here. The caller has mu.
func (s *Store) lookup(id oci.Digest) *image {
	if img := s.images[id]; img != nil && !img.leaving {
		return img
	}
	return nil
}

func (i *image) hold(owner string) {
	if owner != "" {
		i.holders[owner] = true
	}
}

// add writes an image down that is made of layers which are here, and holds it for
// owner. The caller has the image's lock, and has pinned the layers.
func (s *Store) add(ctx context.Context, img Image, config []byte, layers []*artifact.Layer, owner string) (Image, error) {
	meta, err := artifact.ImageMetadata(layers)
	if err != nil {
		return img, fmt.Errorf("metadata of %d layers: %w", len(layers), err)
	}
	if err := check(ctx, meta, layers); err != nil {
		return img, err
	}
	img.Metadata, img.Created = oci.DigestOf(meta), time.Now().UTC()
	img.Size = int64(len(meta) + len(config))
	counted := make(map[oci.Digest]bool)
	for _, l := range layers {
		if !counted[l.DiffID] {
			counted[l.DiffID] = true
			img.Size += l.Tree.Size + l.Tree.SparseSize
		}
	}
	record, err := json.MarshalIndent(img, "", "  ")
	if err != nil {
		return img, err
	}
	dir, err := os.MkdirTemp(s.imagesDir(), durable.TempPrefix)
	if err != nil {
		return img, err
	}
	defer os.RemoveAll(dir) // unless it got its name
	for name, content := range map[string][]byte{fileImage: record, fileConfig: config, fileMetadata: meta} {
		if err := durable.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			return img, err
		}
	}
	if err := s.discard(s.imageDir(img.ID)); err != nil { // one that couldn't be removed
		return img, err
	}
	if err := durable.Rename(dir, s.imageDir(img.ID)); err != nil {
		return img, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.images[img.ID] = newImage(img)
	s.images[img.ID].hold(owner)
	return img, nil
}

// check checks metadata as the kernel will rely on it.
func check(ctx context.Context, meta []byte, layers []*artifact.Layer) error {
	fs, err := erofs.Open(bytes.NewReader(meta), int64(len(meta)))
	if err != nil {
		return fmt.Errorf("metadata: %w", err)
	}
	var sizes []int64
	for _, l := range layers {
		sizes = append(sizes, roundUp(l.Tar.Size))
		if l.Sparse != nil {
			sizes = append(sizes, roundUp(l.Sparse.Size))
		}
	}
	if _, err := fs.Check(ctx, erofs.Limits{Size: artifact.MaxMetadataSize, Devices: sizes}); err != nil {
		return fmt.Errorf("metadata: %w", err)
	}
	return nil
}

// addName remembers another digest by which a registry answers for an image that
// is here, and holds it for owner. The caller has the image's lock.
func (s *Store) addName(id, name oci.Digest, owner string) (Image, bool, error) {
	s.mu.Lock()
	img := s.lookup(id)
	if img == nil {
		s.mu.Unlock()
		return Image{}, false, nil
	}
	img.hold(owner)
	if !slices.Contains(img.Names, name) && len(img.Names) < maxNames {
		img.Names = append(slices.Clip(img.Names), name)
	}
	public := img.Image
	s.mu.Unlock()
	record, err := json.MarshalIndent(public, "", "  ")
	if err != nil {
		return public, true, err
	}
	return public, true, durable.WriteFile(filepath.Join(s.imageDir(id), fileImage), record, 0o600)
}

// Images lists the images, in no order.
func (s *Store) Images() []Image {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]Image, 0, len(s.images))
	for _, img := range s.images {
		list = append(list, img.Image)
	}
	return list
}

// ErrUnknownImage: the image isn't here, or not any more.
var ErrUnknownImage = errors.New("the image isn't here: pull it")

// find returns an image by its ID.
func (s *Store) find(id oci.Digest) (Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	img := s.lookup(id)
	if img == nil {
		return Image{}, fmt.Errorf("image %s: %w", id, ErrUnknownImage)
	}
	return img.Image, nil
}

// Config returns the config of an image, verified.
func (s *Store) Config(_ context.Context, id oci.Digest) ([]byte, error) {
	img, err := s.find(id)
	if err != nil {
		return nil, err
	}
	content, err := durable.ReadFile(filepath.Join(s.imageDir(id), fileConfig), oci.MaxManifestSize)
	if err != nil {
		return nil, err
	}
	if got := img.Config.Algorithm().FromBytes(content); got != img.Config {
		return nil, fmt.Errorf("config of image %s: the disk has %s instead of %s: remove the image and pull it again", id, got, img.Config)
	}
	return content, nil
}

func roundUp(n int64) int64 { return (n + 511) &^ 511 }
