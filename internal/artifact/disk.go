package artifact

import (
	"errors"

	"sluice/internal/layer"
	"sluice/oci"
)

// ErrLowerFile is the error for a layer that can't be a disk of its own: it has a
// hard link to a file that a layer below it has.
var ErrLowerFile = errors.New("the layer has a hard link to a file of a layer below, which only an image as a whole can show")

// DiskMetadata returns the EROFS image of one layer of an image as Teleport's
// clients mount it: with nothing but what comes behind it in the same file, which
// is the layer's tar, and then what was written to layer.Options.Sparse, both
// padded with zeros to a multiple of 512 bytes. Whiteouts are kept as overlayfs
// expects them.
//
// trees are those of the image's layers from the lowest to the one that is meant;
// a layer that is SelfContained needs no others. diffID is the layer's, for people
// who look into the image. The result depends on the arguments alone.
//
// Errors: ErrLowerFile, and those of layer.Merge.
func DiskMetadata(trees []*layer.Tree, diffID oci.Digest) ([]byte, error) {
	i := len(trees) - 1
	merged, err := layer.Merge(trees)
	if err != nil {
		return nil, err
	}
	if linksBelow(merged.Context[i].Root, i) {
		return nil, ErrLowerFile
	}
	layers := make([]*Layer, len(trees))
	for j, t := range trees {
		layers[j] = &Layer{Tar: DeviceData{Size: t.Size}}
	}
	layers[i].Tar.DiffID = diffID
	if size := trees[i].SparseSize; size > 0 {
		layers[i].Sparse = &DeviceData{Size: size, DiffID: diffID}
	}
	ids := imageDevices(layers)
	numbers := []int{i}
	if layers[i].Sparse != nil {
		numbers = append(numbers, i+1)
	}
	m, err := encodeTree(merged.Context[i], layers, ids, numbers)
	if err != nil {
		return nil, err
	}
	return m.content, nil
}

// ImageMetadata returns the merged metadata that Build makes of an image, not
// compressed, for those who have its layers' tars as files: a device for each
// layer's tar, and one after it for what was written to layer.Options.Sparse if
// that isn't nothing, in the order of the layers, the lowest first. A device's file
// has to be padded with zeros to a multiple of 512 bytes.
//
// Of the layers, the trees and their devices' sizes and diff IDs count. The result
// depends on these alone.
//
// Errors: those of layer.Merge.
func ImageMetadata(layers []*Layer) ([]byte, error) {
	trees := make([]*layer.Tree, len(layers))
	for i, l := range layers {
		trees[i] = l.Tree
	}
	merged, err := layer.Merge(trees)
	if err != nil {
		return nil, err
	}
	m, err := mergedMetadata(merged, layers)
	if err != nil {
		return nil, err
	}
	return m.content, nil
}

// linksBelow reports whether a tree has a file that another layer than number i
// has.
func linksBelow(n *layer.Node, i int) bool {
	for _, e := range n.Extents {
		if e.Layer != i {
			return true
		}
	}
	for _, child := range n.Children {
		if linksBelow(child, i) {
			return true
		}
	}
	return false
}
