package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"sluice/internal/artifact"
	"sluice/oci"
)

// streamed is an image manifest, by itself or of an index, with its artifact.
type streamed struct {
	image    oci.Descriptor
	manifest oci.ImageManifest // the image's
	platform oci.Platform

	// artifact is the referrer, zero if there's none, and format what it says it
	// is. parsed is nil if that isn't ours.
	artifact oci.Descriptor
	format   string
	parsed   *artifact.Manifest

	// forIndex is the same artifact with the index as its subject.
	forIndex *oci.Descriptor
}

// originalSize returns how many bytes the image's layers have.
func (s *streamed) originalSize() (n int64) {
	for _, l := range s.manifest.Layers {
		n += l.Size
	}
	return n
}

// sizes returns how many bytes the artifact's layer and sparse blobs have, and
// its metadata with the chunk table.
func (s *streamed) sizes() (layers, metadata int64) {
	if s.parsed == nil {
		return 0, 0
	}
	metadata = s.parsed.Metadata.Blob.Size + s.parsed.Table.Blob.Size
	for _, l := range s.parsed.Layers {
		metadata += l.Metadata.Blob.Size
		layers += l.Tar.Size
		if l.Sparse != nil {
			layers += l.Sparse.Size
		}
	}
	return layers, metadata
}

// maxPlatforms bounds the images of an index.
const maxPlatforms = 256

// images returns the image that reference names, or the images of the index,
// without their artifacts.
func images(ctx context.Context, reg oci.Reader, repo, reference string) (subject oci.Descriptor, list []*streamed, err error) {
	m, err := reg.GetManifest(ctx, repo, reference)
	if err != nil {
		return subject, nil, err
	}
	subject = m.Descriptor
	if !oci.IsIndex(subject.MediaType) {
		s, err := imageOf(m)
		return subject, []*streamed{s}, err
	}
	var index oci.Index
	if err := json.Unmarshal(m.Content, &index); err != nil {
		return subject, nil, fmt.Errorf("%s@%s: %w", repo, subject.Digest, err)
	}
	if len(index.Manifests) > maxPlatforms {
		return subject, nil, fmt.Errorf("%s@%s has %d manifests, at most %d are looked at", repo, subject.Digest, len(index.Manifests), maxPlatforms)
	}
	for _, desc := range index.Manifests {
		if !oci.IsManifest(desc.MediaType) || desc.Annotations["vnd.docker.reference.type"] != "" || desc.Platform != nil && desc.Platform.OS != "linux" {
			continue
		}
		m, err := reg.GetManifest(ctx, repo, desc.Digest.String())
		if errors.Is(err, oci.ErrManifestUnknown) {
			continue // a sparse index
		}
		if err != nil {
			return subject, nil, err
		}
		s, err := imageOf(m)
		if err != nil {
			return subject, nil, err
		}
		if desc.Platform != nil {
			s.platform = *desc.Platform
		}
		list = append(list, s)
	}
	return subject, list, nil
}

func imageOf(m oci.Manifest) (*streamed, error) {
	s := &streamed{image: m.Descriptor}
	if err := json.Unmarshal(m.Content, &s.manifest); err != nil {
		return nil, fmt.Errorf("manifest %s: %w", m.Descriptor.Digest, err)
	}
	return s, nil
}

// findArtifacts returns the images that reference names, each with its streaming
// artifact. An image with several has them one after another.
func findArtifacts(ctx context.Context, reg oci.Registry, repo, reference string) (subject oci.Descriptor, all []*streamed, err error) {
	subject, list, err := images(ctx, reg, repo, reference)
	if err != nil {
		return subject, nil, err
	}
	for _, image := range list {
		found, err := artifactsOf(ctx, reg, repo, image.image.Digest)
		if err != nil {
			return subject, nil, err
		}
		if len(found) == 0 {
			all = append(all, image)
		}
		for _, f := range found {
			s := *image
			s.artifact, s.format, s.parsed = f.artifact, f.format, f.parsed
			if f.parsed != nil {
				s.platform = f.parsed.Platform
			}
			all = append(all, &s)
		}
	}
	if !oci.IsIndex(subject.MediaType) {
		return subject, all, nil
	}
	found, err := artifactsOf(ctx, reg, repo, subject.Digest)
	for _, f := range found {
		matched := false
		for _, s := range all {
			if s.parsed != nil && f.parsed != nil && s.parsed.Config.Digest == f.parsed.Config.Digest {
				s.forIndex, matched = &f.artifact, true
			}
		}
		if !matched { // somebody deleted the image's own
			if f.parsed != nil {
				f.platform = f.parsed.Platform
			}
			f.image, f.forIndex = subject, &f.artifact
			all = append(all, f)
		}
	}
	return subject, all, err
}

// artifactsOf returns the streaming referrers of a manifest.
func artifactsOf(ctx context.Context, reg oci.Registry, repo string, subject oci.Digest) (list []*streamed, err error) {
	for desc, err := range reg.Referrers(ctx, repo, subject, oci.ArtifactTypeStreaming) {
		if err != nil {
			return nil, fmt.Errorf("listing the referrers of %s: %w", subject, err)
		}
		m, err := reg.GetManifest(ctx, repo, desc.Digest.String())
		if errors.Is(err, oci.ErrManifestUnknown) {
			continue // deleted, while an index of referrers kept in a tag still lists it
		}
		if err != nil {
			return nil, err
		}
		s := &streamed{artifact: m.Descriptor, format: desc.Annotations[artifact.AnnotationFormat]}
		if parsed, err := artifact.ParseManifest(m.Content); err == nil && parsed.Subject.Digest == subject {
			s.parsed, s.format = parsed, artifact.Format
		}
		if s.format == "" || s.format == artifact.Format && s.parsed == nil {
			s.format = "unusable"
		}
		list = append(list, s)
	}
	return list, nil
}
