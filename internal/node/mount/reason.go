package mount

import (
	"errors"
	"fmt"
)

// Reason says, in one word that programs and dashboards compare, why an image
// doesn't stream. It never means that the image can't be used: the ordinary
// pull is what follows.
type Reason string

// The reasons. They are part of the public interface: status output, events
// and metrics spell them like this.
const (
	// NoStreamingArtifact: the registry has no artifact for this image.
	NoStreamingArtifact Reason = "NoStreamingArtifact"
	// RegistryUnsupported: the registry doesn't know referrers or ranges.
	RegistryUnsupported Reason = "RegistryUnsupported"
	// RegistryUnavailable: the registry didn't answer in time, or with a
	// failure of its own.
	RegistryUnavailable Reason = "RegistryUnavailable"
	// Unauthorized: the registry wants credentials that this node lacks.
	Unauthorized Reason = "Unauthorized"
	// PlatformUnsupported: there are artifacts, none of them for this
	// machine's platform.
	PlatformUnsupported Reason = "PlatformUnsupported"
	// IntegrityFailure: something that the registry sent isn't what its
	// digest, size or format says.
	IntegrityFailure Reason = "IntegrityFailure"
	// PlaneUnavailable: this machine's kernel or disk couldn't take the mount.
	PlaneUnavailable Reason = "PlaneUnavailable"
	// Disabled: the operator switched streaming off.
	Disabled Reason = "Disabled"
)

// Reasons returns all reasons, the most common first.
func Reasons() []Reason {
	return []Reason{
		NoStreamingArtifact, PlatformUnsupported, RegistryUnavailable, RegistryUnsupported,
		Unauthorized, IntegrityFailure, PlaneUnavailable, Disabled,
	}
}

// Meaning says in a few words, for people, what the reason says; docs/containerd.md
// has the same words.
func (r Reason) Meaning() string {
	switch r {
	case NoStreamingArtifact:
		return "nobody has converted the image"
	case PlatformUnsupported:
		return "it was converted, but not for this machine's platform"
	case RegistryUnavailable:
		return "the registry didn't answer, or with a failure of its own, for --decide-timeout (10 s)"
	case RegistryUnsupported:
		return "the registry knows no referrers or ranges"
	case Unauthorized:
		return "the registry wants credentials that this node lacks"
	case IntegrityFailure:
		return "something isn't what its digest, size or format says"
	case PlaneUnavailable:
		return "kernel or disk can't take the mount"
	case Disabled:
		return "the operator switched streaming off, for all images or for those of this registry"
	}
	return "the image can't be streamed"
}

// Remedy says, for people, what to do about it.
func (r Reason) Remedy() string {
	switch r {
	case NoStreamingArtifact:
		return "convert it: sluice artifact-streaming create IMAGE"
	case PlatformUnsupported:
		return "convert it for that platform, too: sluice artifact-streaming create IMAGE"
	case RegistryUnavailable:
		return "look at the message and at the registry; a pull --recheck (1 min) later asks again"
	case RegistryUnsupported:
		return "use a registry that speaks OCI distribution 1.1"
	case Unauthorized:
		return "give this node credentials that may pull the image, such as by docker login as root"
	case IntegrityFailure:
		return "convert the image again; if it stays, distrust the registry"
	case PlaneUnavailable:
		return "the message says what is missing: a newer kernel, disk space, or permission"
	case Disabled:
		return "if that isn't wanted: start sluice node without --disable-streaming, or with --from for this registry"
	}
	return "look at the message"
}

// NotStreaming is the error of an image that can't be streamed now.
type NotStreaming struct {
	Reason Reason
	// Err tells what was tried and what happened.
	Err error
}

// Error gives the reason and its cause.
func (e *NotStreaming) Error() string { return fmt.Sprintf("%s: %v", e.Reason, e.Err) }

// Unwrap returns the cause.
func (e *NotStreaming) Unwrap() error { return e.Err }

// ReasonOf returns the reason that err carries, or "" when it has none.
func ReasonOf(err error) Reason {
	var n *NotStreaming
	if errors.As(err, &n) {
		return n.Reason
	}
	return ""
}

// notStreaming makes the error of a reason.
func notStreaming(r Reason, format string, args ...any) error {
	return &NotStreaming{Reason: r, Err: fmt.Errorf(format, args...)}
}
