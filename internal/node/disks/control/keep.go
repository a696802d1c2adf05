package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"sluice/internal/durable"
	"sluice/oci"
)

// owner is what holds a kept image: another one for each image that the reference
// has meant.
func (k Kept) owner() string { return "orca/" + k.name() + "/" + k.ID.Encoded()[:16] }

// name is the name of the image's record, made of its reference.
func (k Kept) name() string { return oci.DigestOf([]byte(k.Reference)).Encoded()[:32] }

func (s *Server) keptFile(k Kept) string {
	return filepath.Join(s.opts.Root, "images", k.name()+".json")
}

// keep makes an image the one that its reference means, in place of another.
func (s *Server) keep(ctx context.Context, k Kept) error {
	s.keeping.Lock()
	defer s.keeping.Unlock()
	if err := s.hold(ctx, k); err != nil {
		return err
	}
	record, err := json.Marshal(k)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(s.keptFile(k), record, 0o600); err != nil {
		return fmt.Errorf("record the image: %w", err)
	}
	s.mu.Lock()
	old, had := s.kept[k.Reference]
	s.kept[k.Reference] = k
	s.mu.Unlock()
	if had && (old.owner() != k.owner() || old.Teleported != k.Teleported) {
		s.drop(ctx, old)
	}
	return nil
}

// hold holds a kept image.
func (s *Server) hold(ctx context.Context, k Kept) error {
	if k.Teleported {
		return s.opts.Teleport.Hold(ctx, k.ID, k.Layers-1, k.owner())
	}
	return s.opts.Ordinary.Hold(ctx, k.ID, k.owner())
}

// drop gives an image up that isn't in the records any more.
func (s *Server) drop(ctx context.Context, k Kept) {
	images := s.images(k.Teleported)
	if err := images.Release(ctx, k.owner()); err != nil {
		s.log.WarnContext(ctx, "an image can't be given up", "image", k.Reference, "error", err)
	}
	images.Collect(ctx)
}

// find returns the image that was pulled by a reference.
func (s *Server) find(reference string) (Kept, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k, ok := s.kept[reference]
	return k, ok
}

// Images lists the images that were pulled, by reference.
func (s *Server) Images(ctx context.Context) []Kept {
	s.mu.Lock()
	list := make([]Kept, 0, len(s.kept))
	for _, k := range s.kept {
		list = append(list, k)
	}
	s.mu.Unlock()
	for i, k := range list {
		list[i].Size = s.size(ctx, k)
	}
	slices.SortFunc(list, func(a, b Kept) int { return strings.Compare(a.Reference, b.Reference) })
	return list
}

// size returns how many bytes of an image are here.
func (s *Server) size(ctx context.Context, k Kept) int64 {
	if !k.Teleported {
		return k.Size
	}
	var sum int64
	for layer := range k.Layers {
		n, _ := s.opts.Teleport.Usage(ctx, k.ID, layer) // what can't be told isn't here
		sum += n
	}
	return sum
}

// shortest is how many digits of a digest name an image.
const shortest = 8

// ErrInUse: a process uses the image.
var ErrInUse = errors.New("the image is in use")

// Remove removes an image, named by its reference, or its manifest's digest or the
// beginning of that's digits: all references to it then. Errors: ErrUnknown,
// ErrInUse.
func (s *Server) Remove(ctx context.Context, name string) error {
	s.keeping.Lock()
	defer s.keeping.Unlock()
	named, err := s.named(name)
	if err != nil {
		return err
	}
	for _, k := range named {
		for _, c := range s.Claims() {
			if c.Reference == k.Reference && c.Image == k.ID {
				return fmt.Errorf("%w by process %d: end that first", ErrInUse, c.PID)
			}
		}
	}
	for _, k := range named {
		if err := durable.Remove(s.keptFile(k)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		s.mu.Lock()
		delete(s.kept, k.Reference)
		s.mu.Unlock()
		s.drop(ctx, k)
	}
	return nil
}

// named returns the images that a name means: some of one manifest.
func (s *Server) named(name string) ([]Kept, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r, err := oci.ParseReference(name); err == nil {
		if k, ok := s.kept[r.String()]; ok {
			return []Kept{k}, nil
		}
	}
	digits := strings.TrimPrefix(name, "sha256:")
	var found []Kept
	for _, k := range s.kept {
		if len(digits) >= shortest && strings.HasPrefix(k.Manifest.Encoded(), digits) {
			found = append(found, k)
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("image %q: %w", name, ErrUnknown)
	}
	for _, k := range found {
		if k.Manifest != found[0].Manifest {
			return nil, fmt.Errorf("image %q may be %s or %s: use more digits", name, found[0].Manifest, k.Manifest)
		}
	}
	return found, nil
}
