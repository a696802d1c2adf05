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
	// ConversionPending: there's none yet, and the registry says that it's
	// making one.
	ConversionPending Reason = "ConversionPending"
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
	// Disabled: streaming was switched off, or this pull's pod opted out.
	Disabled Reason = "Disabled"
	// AlreadyPresent: nothing was pulled, because the image was here already, the
	// ordinary way. It's no pull's reason, but a container's.
	AlreadyPresent Reason = "AlreadyPresent"
)

// Reasons returns all reasons, the most common first.
func Reasons() []Reason {
	return []Reason{
		NoStreamingArtifact, ConversionPending, PlatformUnsupported, RegistryUnavailable, RegistryUnsupported,
		Unauthorized, IntegrityFailure, PlaneUnavailable, Disabled, AlreadyPresent,
	}
}

// Meaning says in a few words, for people, what the reason says; docs/containerd.md
// has the same words.
func (r Reason) Meaning() string {
	switch r {
	case NoStreamingArtifact:
		return "nobody has converted the image"
	case ConversionPending:
		return "the registry is still converting the image"
	case AlreadyPresent:
		return "the image was on the node already, pulled the ordinary way when it didn't stream"
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
		return "streaming was switched off: on this node, for this registry, or by the pod"
	}
	return "the image can't be streamed"
}

// Remedy says, for people, what to do about it.
func (r Reason) Remedy() string {
	switch r {
	case NoStreamingArtifact:
		return "convert it: sluice artifact-streaming create IMAGE"
	case ConversionPending:
		return "nothing: what is pulled when it is converted streams; sluice artifact-streaming operation show tells how far it is"
	case AlreadyPresent:
		return "remove the image from the node, such as by crictl rmi IMAGE, so that it is pulled anew"
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
		return "if that isn't wanted: see who did, in the message: sluice node has --disable-streaming and --from, a node its label, a pod its annotation"
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
