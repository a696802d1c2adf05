package fuse

import (
	"sort"
	"sync"

	"sluice/internal/node/plane/internal/supply"
)

// device is one file of the FUSE mount. node never changes.
type device struct {
	*supply.Supply
	node uint64
}

// table finds devices by node and by name.
type table struct {
	mu     sync.RWMutex // of the maps
	byNode map[uint64]*device
	byName map[string]*device
}

func newTable() *table {
	return &table{byNode: map[uint64]*device{}, byName: map[string]*device{}}
}

func (t *table) node(n uint64) *device {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.byNode[n]
}

func (t *table) name(n []byte) *device {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.byName[string(n)]
}

func (t *table) add(d *device) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.byNode[d.node], t.byName[d.Name] = d, d
}

func (t *table) remove(d *device) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.byNode, d.node)
	delete(t.byName, d.Name)
}

// all returns the devices ordered by node.
func (t *table) all() []*device {
	t.mu.RLock()
	defer t.mu.RUnlock()
	list := make([]*device, 0, len(t.byNode))
	for _, d := range t.byNode {
		list = append(list, d)
	}
	sort.Slice(list, func(i, j int) bool { return list[i].node < list[j].node })
	return list
}
