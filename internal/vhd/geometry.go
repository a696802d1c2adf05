package vhd

// geometry is a disk's size as BIOSes had it.
type geometry struct{ cylinders, heads, sectors int64 }

func (g geometry) total() int64 { return g.cylinders * g.heads * g.sectors }

func (g geometry) encode() uint32 { return uint32(g.cylinders<<16 | g.heads<<8 | g.sectors) }

// The most that a geometry can express, and from where tracks have 255 sectors.
const (
	maxCylinders = 65535
	maxGeometry  = maxCylinders * 16 * 255
	longTracks   = maxCylinders * 16 * 63
)

// geometryOf returns the geometry of a disk of n sectors, by the specification's
// appendix. It is the largest one of its kind that isn't larger than the disk.
func geometryOf(n int64) geometry {
	n = min(n, maxGeometry)
	if n >= longTracks {
		return geometry{n / 255 / 16, 16, 255}
	}
	g := geometry{sectors: 17}
	tracks := n / g.sectors
	g.heads = max((tracks+1023)/1024, 4)
	if tracks >= g.heads*1024 || g.heads > 16 {
		g.sectors, g.heads = 31, 16
		tracks = n / g.sectors
	}
	if tracks >= g.heads*1024 {
		g.sectors, g.heads = 63, 16
		tracks = n / g.sectors
	}
	g.cylinders = tracks / g.heads
	return g
}

// Capacity returns the size in bytes, at least n, of the smallest disk whose
// geometry says exactly how large it is, so that n bytes can be read whichever of
// the two a program believes. It is less than 2.1 MB more than n; beyond 127 GiB,
// where geometries end and nobody believes them, n rounded up to a sector.
func Capacity(n int64) int64 {
	t := max(n+SectorSize-1, SectorSize) / SectorSize
	for t < maxGeometry && geometryOf(t).total() != t {
		t++
	}
	return t * SectorSize
}
