package stored

import (
	"crypto/rand"
	"time"

	"sluice/internal/index"
	"sluice/oci"
)

// EventQueue is the queue of the index that events are put into, each in the
// transaction of the change it tells of; the job's key is the repository.
const EventQueue = "events"

// Actions of events, named as in distribution's notifications. What else they
// name (pull, mount) isn't a change and makes no event.
const (
	ActionPush    = "push"    // of a manifest; one that was restored counts as pushed
	ActionDelete  = "delete"  // of a manifest, or with an empty Digest of a tag
	ActionConvert = "convert" // likewise, of a streaming artifact, with which a conversion is done
)

// pushAction returns the action of a push of a manifest.
func pushAction(m index.Manifest) string {
	if m.ArtifactType == oci.ArtifactTypeStreaming {
		return ActionConvert
	}
	return ActionPush
}

// Event tells that a repository was changed. Its JSON is the payload of a job:
//
//	{
//	  "id":         "…",                     unique, letters and digits
//	  "time":       "2026-11-24T02:09:50Z",  RFC 3339, UTC
//	  "action":     "push" | "delete" | "convert",
//	  "repository": "library/debian",
//	  "digest":     "sha256:…",              the manifest; absent when only a tag was deleted
//	  "tag":        "12",                    absent when none was given
//	  "mediaType":  "application/…",         of the manifest; absent when only a tag was deleted
//	  "size":       1234,                    of the manifest, in bytes; absent like mediaType
//	  "actor":      "robot",                 who did it; this and the rest are oci.Actor's,
//	  "remote":     "192.0.2.1:4711",        absent if not known
//	  "agent":      "docker/29.0",
//	  "requestID":  "…"
//	}
//
// Blobs make no events: a push ends with its manifest.
type Event struct {
	ID         string     `json:"id"`
	Time       time.Time  `json:"time"`
	Action     string     `json:"action"`
	Repository string     `json:"repository"`
	Digest     oci.Digest `json:"digest,omitempty"`
	Tag        string     `json:"tag,omitempty"`
	MediaType  string     `json:"mediaType,omitempty"`
	Size       int64      `json:"size,omitempty"`
	Actor      string     `json:"actor,omitempty"`
	Remote     string     `json:"remote,omitempty"`
	Agent      string     `json:"agent,omitempty"`
	RequestID  string     `json:"requestID,omitempty"`
}

// newEvent returns an event of what an actor did to a manifest.
func newEvent(action, repo, tag string, desc oci.Descriptor, at time.Time, by oci.Actor) Event {
	return Event{
		ID: rand.Text(), Time: at, Action: action, Repository: repo, Tag: tag,
		Digest: desc.Digest, MediaType: desc.MediaType, Size: desc.Size,
		Actor: by.Name, Remote: by.Remote, Agent: by.Agent, RequestID: by.RequestID,
	}
}
