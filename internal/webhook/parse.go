package webhook

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"sluice/oci"
)

// Limits of a request. Registries tell of one push, or a few, at a time.
const (
	MaxBody   = 1 << 20
	maxPushes = 1000
)

// Push tells that an image was pushed, or something that might be one.
type Push struct {
	Repository string     `json:"repository"`
	Digest     oci.Digest `json:"digest,omitempty"` // or else Tag
	Tag        string     `json:"tag,omitempty"`
}

// Reference is what to convert: the digest if it's known.
func (p Push) Reference() string {
	if p.Digest != "" {
		return p.Digest.String()
	}
	return p.Tag
}

// String names it as docker would.
func (p Push) String() string {
	if p.Digest != "" {
		return p.Repository + "@" + p.Digest.String()
	}
	return p.Repository + ":" + p.Tag
}

// body is the union of what registries send. encoding/json leaves out what it
// has no member for.
type body struct {
	// distribution: a list of events.
	Events []event `json:"events"`

	// Azure Container Registry: one event of the same kind.
	event

	// Harbor, "default" format.
	Type      string     `json:"type"`
	EventData *harborSet `json:"event_data"`

	// Harbor, "CloudEvents" format, which has Type as well.
	SpecVersion string     `json:"specversion"`
	Data        *harborSet `json:"data"`
}

// event is one of distribution's.
type event struct {
	Action string `json:"action"`
	Target struct {
		MediaType  string     `json:"mediaType"`
		Digest     oci.Digest `json:"digest"`
		Repository string     `json:"repository"`
		Tag        string     `json:"tag"`
	} `json:"target"`
	Request struct {
		UserAgent string `json:"useragent"`
	} `json:"request"`
}

// harborSet is what Harbor tells of.
type harborSet struct {
	Resources []struct {
		Digest oci.Digest `json:"digest"`
		Tag    string     `json:"tag"`
	} `json:"resources"`
	Repository struct {
		FullName string `json:"repo_full_name"`
	} `json:"repository"`
}

// Parse returns the pushes of images that a webhook's body tells of, without
// those that can't be one: pushes of blobs, the tags in which clients keep
// referrers, and what agent, the client's own User-Agent, pushed. A body that
// tells of something else, such as a deletion or a scan, has none; one that no
// registry sends is an error.
func Parse(content []byte, agent string) ([]Push, error) {
	var b body
	if err := json.Unmarshal(content, &b); err != nil {
		return nil, fmt.Errorf("not a registry's webhook: %w", err)
	}
	var pushes []Push
	add := func(p Push) { pushes = append(pushes, p) }
	switch {
	case b.Events != nil:
		for _, e := range b.Events {
			e.push(agent, add)
		}
	case b.Action != "":
		b.event.push(agent, add)
	case b.EventData != nil && (b.Type == "PUSH_ARTIFACT" || b.Type == "pushImage"): // of Harbor 2 and 1
		b.EventData.push(add)
	case b.SpecVersion != "" && b.Type == "harbor.artifact.pushed" && b.Data != nil:
		b.Data.push(add)
	case b.Type != "":
	default:
		return nil, errors.New("not a registry's webhook: it has no events, action or type")
	}
	if len(pushes) > maxPushes {
		return nil, fmt.Errorf("it tells of %d pushes, %d at once are taken", len(pushes), maxPushes)
	}
	for i, p := range pushes {
		if err := p.check(); err != nil {
			return nil, fmt.Errorf("push %d: %w", i, err)
		}
	}
	return pushes, nil
}

func (e event) push(agent string, add func(Push)) {
	t := e.Target
	switch {
	case e.Action != "push":
	case t.MediaType != "" && !oci.IsManifest(t.MediaType) && !oci.IsIndex(t.MediaType): // a blob
	case agent != "" && e.Request.UserAgent == agent:
	case isReferrersTag(t.Tag):
	default:
		add(Push{Repository: t.Repository, Digest: t.Digest, Tag: t.Tag})
	}
}

func (s *harborSet) push(add func(Push)) {
	for _, r := range s.Resources {
		tag := r.Tag
		if tag == r.Digest.String() {
			tag = "" // of an artifact without one
		}
		if !isReferrersTag(tag) {
			add(Push{Repository: s.Repository.FullName, Digest: r.Digest, Tag: tag})
		}
	}
}

// isReferrersTag reports whether a tag is the index of a manifest's referrers
// (distribution-spec 1.1, "Referrers Tag Schema").
func isReferrersTag(tag string) bool {
	algorithm, encoded, ok := strings.Cut(tag, "-")
	_, err := oci.ParseDigest(algorithm + ":" + encoded)
	return ok && err == nil
}

// check returns an error unless the push names something.
func (p Push) check() error {
	if err := oci.CheckRepository(p.Repository); err != nil {
		return err
	}
	if p.Digest != "" {
		_, err := oci.ParseDigest(p.Digest.String())
		return err
	}
	return oci.CheckTag(p.Tag)
}
