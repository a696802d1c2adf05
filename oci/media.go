package oci

import (
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Descriptor names content: media type, digest, size and what else OCI's
// image-spec (descriptor.md) lets it say.
type Descriptor = v1.Descriptor

// Platform is the operating system and processor an image is for.
type Platform = v1.Platform

// ImageManifest, Index and ImageConfig are the JSON documents of the OCI image
// specification. Docker's schema 2 documents have the same members under
// other media types, so these types read both.
type (
	ImageManifest = v1.Manifest
	Index         = v1.Index
	ImageConfig   = v1.Image
	Versioned     = specs.Versioned
)

// Media types of manifests.
const (
	MediaTypeImageManifest      = v1.MediaTypeImageManifest
	MediaTypeIndex              = v1.MediaTypeImageIndex
	MediaTypeDockerManifest     = "application/vnd.docker.distribution.manifest.v2+json"
	MediaTypeDockerManifestList = "application/vnd.docker.distribution.manifest.list.v2+json"
)

// Media types of configs and layers.
const (
	MediaTypeImageConfig        = v1.MediaTypeImageConfig
	MediaTypeDockerConfig       = "application/vnd.docker.container.image.v1+json"
	MediaTypeLayer              = v1.MediaTypeImageLayer
	MediaTypeLayerGzip          = v1.MediaTypeImageLayerGzip
	MediaTypeLayerZstd          = v1.MediaTypeImageLayerZstd
	MediaTypeDockerLayer        = "application/vnd.docker.image.rootfs.diff.tar"
	MediaTypeDockerLayerGzip    = "application/vnd.docker.image.rootfs.diff.tar.gzip"
	MediaTypeDockerLayerZstd    = "application/vnd.docker.image.rootfs.diff.tar.zstd"
	MediaTypeDockerForeignLayer = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
	MediaTypeOctetStream        = "application/octet-stream"
)

// ArtifactTypeStreaming is the artifact type of a streaming artifact, and so
// what a node filters referrers by. It is the one Azure Container Registry
// uses.
const ArtifactTypeStreaming = "application/vnd.azure.artifact.streaming.v1"

// MaxManifestSize bounds a manifest, in bytes: distribution-spec asks
// registries to accept at least 4 MiB, and Sluice accepts no more.
const MaxManifestSize = 4 << 20

// IsManifest reports whether mediaType is that of an image for one platform.
func IsManifest(mediaType string) bool {
	return mediaType == MediaTypeImageManifest || mediaType == MediaTypeDockerManifest
}

// IsIndex reports whether mediaType is that of a list of manifests.
func IsIndex(mediaType string) bool {
	return mediaType == MediaTypeIndex || mediaType == MediaTypeDockerManifestList
}
