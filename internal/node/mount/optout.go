package mount

import (
	"sync"
	"time"

	"sluice/oci"
)

// optOut is who wants an image pulled the ordinary way, now.
type optOut struct {
	pulls int    // of this kind under way
	why   string // of the last
	noted bool   // among the outcomes
}

// OptOut has every Pull of an image by the name ref fail with reason Disabled and
// the text why, until end is called: whoever pulls it now doesn't want it
// streamed. containerd doesn't say for which pull it asks about a layer, so
// another pull of the same name at the same time goes the ordinary way, too. An
// image whose layers containerd has already, streamed, isn't asked about, and is
// shared. Pulls that end later are asked anew.
func (m *Manager) OptOut(ref, why string) (end func()) {
	r, err := oci.ParseReference(ref)
	if err != nil {
		return func() {} // such an image isn't streamed
	}
	key := r.String()
	m.mu.Lock()
	defer m.mu.Unlock()
	o := m.optOuts[key]
	if o == nil {
		o = &optOut{}
		m.optOuts[key] = o
	}
	o.pulls++
	o.why, o.noted = why, false
	return sync.OnceFunc(func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if o.pulls--; o.pulls == 0 {
			delete(m.optOuts, key)
		}
	})
}

// optedOut is the error of a pull by a name that somebody pulls the ordinary way
// now, nil if nobody does.
func (m *Manager) optedOut(r oci.Reference, manifest oci.Digest) error {
	m.mu.Lock()
	o := m.optOuts[r.String()]
	if o == nil {
		m.mu.Unlock()
		return nil
	}
	err := notStreaming(Disabled, "%s", o.why)
	first := !o.noted
	o.noted = true
	m.mu.Unlock()
	if first {
		m.note(Outcome{Time: time.Now(), Reference: r.String(), Manifest: manifest, Reason: Disabled, Message: err.Error()})
	}
	return err
}
