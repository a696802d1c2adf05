// Package ocimem keeps an oci.Registry in memory. It is the smallest complete
// implementation of the contract, made for tests and for caches that need not
// outlive the process.
//
// The files are named after the verbs of the contract: reader.go, writer.go,
// upload.go, lister.go, deleter.go.
package ocimem

import (
	"sync"

	"sluice/oci"
)

// Registry is an oci.Registry whose content is lost with the process. Use New.
type Registry struct {
	mu      sync.RWMutex // guards everything below; never held while reading from a caller
	repos   map[string]*repository
	uploads map[string]*upload
}

var _ oci.Registry = (*Registry)(nil)

// repository has at least one blob or manifest: see Registry.prune.
type repository struct {
	blobs     map[oci.Digest][]byte // content is never modified
	manifests map[oci.Digest]*manifest
	tags      map[string]oci.Digest                        // every digest is in manifests
	referrers map[oci.Digest]map[oci.Digest]oci.Descriptor // by subject, by referrer; no empty maps
}

type manifest struct {
	desc    oci.Descriptor
	content []byte // never modified
	info    *oci.ManifestInfo
}

// New returns an empty registry.
func New() *Registry {
	return &Registry{repos: map[string]*repository{}, uploads: map[string]*upload{}}
}

// repo returns the repository of that name, or ErrNameUnknown. The caller
// holds mu.
func (r *Registry) repo(name string) (*repository, error) {
	if err := oci.CheckRepository(name); err != nil {
		return nil, err
	}
	repo, ok := r.repos[name]
	if !ok {
		return nil, oci.ErrNameUnknown.Withf("repository %s is unknown", name)
	}
	return repo, nil
}

// makeRepo returns the repository of that name, which the caller is about to
// put something into, and makes it if need be. The caller has checked the name
// and holds mu for writing.
func (r *Registry) makeRepo(name string) *repository {
	repo, ok := r.repos[name]
	if !ok {
		repo = &repository{
			blobs:     map[oci.Digest][]byte{},
			manifests: map[oci.Digest]*manifest{},
			tags:      map[string]oci.Digest{},
			referrers: map[oci.Digest]map[oci.Digest]oci.Descriptor{},
		}
		r.repos[name] = repo
	}
	return repo
}

// prune removes a repository that has become empty. The caller holds mu for
// writing.
func (r *Registry) prune(name string) {
	if repo := r.repos[name]; len(repo.blobs) == 0 && len(repo.manifests) == 0 {
		delete(r.repos, name)
	}
}

func blobDescriptor(digest oci.Digest, content []byte) oci.Descriptor {
	return oci.Descriptor{MediaType: oci.MediaTypeOctetStream, Digest: digest, Size: int64(len(content))}
}
