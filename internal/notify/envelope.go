package notify

import (
	"net/url"
	"time"

	"sluice/oci"
)

// MediaType is the body's.
const MediaType = "application/vnd.docker.distribution.events.v2+json"

// The shape of distribution's notifications, field for field.
type envelope struct {
	Events []message `json:"events"`
}

type message struct {
	ID        string    `json:"id"`
	Timestamp time.Time `json:"timestamp"`
	Action    string    `json:"action"`
	Target    target    `json:"target"`
	Request   request   `json:"request"`
	Actor     actor     `json:"actor"`
	Source    source    `json:"source"`
}

type target struct {
	MediaType  string     `json:"mediaType,omitempty"`
	Digest     oci.Digest `json:"digest,omitempty"`
	Size       int64      `json:"size,omitempty"`
	Length     int64      `json:"length,omitempty"` // Size by its older name
	Repository string     `json:"repository"`
	URL        string     `json:"url,omitempty"`
	Tag        string     `json:"tag,omitempty"`
}

type request struct {
	ID        string `json:"id,omitempty"`
	Addr      string `json:"addr,omitempty"`
	Host      string `json:"host,omitempty"`
	Method    string `json:"method,omitempty"`
	UserAgent string `json:"useragent,omitempty"`
}

type actor struct {
	Name string `json:"name,omitempty"`
}

type source struct {
	Addr       string `json:"addr,omitempty"`
	InstanceID string `json:"instanceID,omitempty"`
}

// envelope returns what is sent of e. base is the registry's URL as its
// clients know it, and may be nil.
func (e Event) envelope(base *url.URL, instance string) envelope {
	m := message{
		ID: e.ID, Timestamp: e.Time, Action: e.Action,
		Target: target{
			MediaType: e.MediaType, Digest: e.Digest, Size: e.Size, Length: e.Size,
			Repository: e.Repository, Tag: e.Tag,
		},
		Request: request{ID: e.RequestID, Addr: e.Remote, UserAgent: e.Agent, Method: methods[e.Action]},
		Actor:   actor{Name: e.Actor},
		Source:  source{InstanceID: instance},
	}
	if base != nil {
		m.Request.Host, m.Source.Addr = base.Host, base.Host
		if e.Digest != "" {
			m.Target.URL = base.JoinPath("v2", e.Repository, "manifests", e.Digest.String()).String()
		}
	}
	return envelope{Events: []message{m}}
}
