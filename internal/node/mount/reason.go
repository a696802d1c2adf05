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
