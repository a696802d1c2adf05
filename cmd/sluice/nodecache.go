package main

import (
	"github.com/spf13/pflag"

	"sluice/internal/node/cache"
)

// registerCache registers the flags that bound the cache.
//
// kubelet, as it comes, collects unused images when less than 15 % of their
// file system is free, until 20 % is, and evicts pods below 15 %. The default
// of --cache-free lies between: content that nobody uses goes before kubelet
// looks for something to delete, and an image may still become complete on a
// disk that kubelet has just tidied up.
func (c *nodeConfig) registerCache(f *pflag.FlagSet) {
	f.TextVar(&c.quota, "cache-quota", cache.Space{}, "`SPACE` that content may take, as 50GiB or 30% of the\ndisk; 0: as much as --cache-free leaves")
	f.TextVar(&c.free, "cache-free", cache.Space{Percent: 17}, "`SPACE` of the disk that stays free: when less is,\nlayers that nobody uses are evicted; 0: none")
	f.Float64Var(&c.low, "cache-low", 90, "`PERCENT` of what --cache-quota and --cache-free\nallow that eviction leaves")
}
