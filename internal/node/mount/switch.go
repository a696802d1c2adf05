package mount

import "strings"

// Switch says whether images that are pulled from now on stream: the zero value,
// that they do. Those that are mounted do in any case.
type Switch struct {
	Off bool   `json:"off"`
	Why string `json:"why,omitempty"` // it is off, for people
}

// maxWhy bounds Switch.Why, in bytes.
const maxWhy = 1024

// SetSwitch switches streaming off, so that every Pull fails with reason
// Disabled, or on again, unless Options.Disabled says otherwise. It's so until
// the process ends.
func (m *Manager) SetSwitch(s Switch) {
	if len(s.Why) > maxWhy {
		s.Why = strings.ToValidUTF8(s.Why[:maxWhy], "") + "…"
	}
	if !s.Off {
		s.Why = ""
	}
	m.mu.Lock()
	changed := s != m.turned
	m.turned = s
	if changed {
		// What was answered before isn't the answer any more.
		for subject, c := range m.calls {
			if c.ended() {
				delete(m.calls, subject)
			}
		}
	}
	m.mu.Unlock()
	if changed {
		m.log.Info("streaming of new images is switched", "off", s.Off, "why", s.Why)
	}
}

// switched returns whether images that are pulled now stream. The caller has
// m.mu.
func (m *Manager) switched() Switch {
	if m.opts.Disabled {
		return Switch{Off: true, Why: "streaming is switched off on this node"}
	}
	return m.turned
}

// switchedOff is the error of a pull while the switch is off, nil while it's on.
func (m *Manager) switchedOff() error {
	m.mu.Lock()
	s := m.switched()
	m.mu.Unlock()
	switch {
	case !s.Off:
		return nil
	case s.Why == "":
		return notStreaming(Disabled, "streaming of new images was switched off")
	}
	return notStreaming(Disabled, "%s", s.Why)
}
