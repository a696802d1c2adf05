// Package control is how programs on the same machine have images mounted by
// teleportd: HTTP with JSON on a unix socket that only root can open. Server is the
// daemon's end, Client the other; orca is a client.
//
//	POST   /v1/mounts           Mount -> a stream of Lines
//	DELETE /v1/mounts?id=ID     ID of a Claim
//	GET    /v1/images           -> []Kept
//	DELETE /v1/images?name=NAME a reference, or a manifest's digest or its beginning
//	GET    /v1/status           -> Status
//	GET    /v1/events           see package happening/feed
//
// A mount's answer is JSON, one object a line, as things happen: stages, and at the
// end what is mounted, or an error. Other answers than 2xx have an Error as their
// body.
//
// A claim belongs to a process, and ends when that does. It is on disk before the
// image is mounted, and so are the images that somebody pulled, which stay until
// they are removed: a daemon that starts again goes on with both.
//
// Images come by Teleport where that's offered, and the ordinary way otherwise.
// When the registry can't be reached, an image is used as it was pulled last by the
// same reference.
//
// The files: server.go is a daemon's life, mount.go how an image is mounted,
// claim.go and keep.go what is remembered, http.go and client.go the two ends of
// the socket.
package control

import (
	"context"
	"encoding/json"
	"net/http"
	"time"

	"sluice/internal/node/mount"
	"sluice/internal/node/pulled"
	"sluice/oci"
)

// Teleport has images whose layers are disks: a *disks.Manager.
type Teleport interface {
	// Pull makes an image ready to be mounted. The error of one that can't be
	// teleported is a *mount.NotStreaming.
	Pull(ctx context.Context, ref string, manifest oci.Digest) (mount.Image, error)
	// LastPull returns what became of the last pull of an image by a name.
	LastPull(ref string) (mount.Outcome, bool)
	// Hold keeps an image's lowest layers up to the given one for owner.
	Hold(ctx context.Context, id oci.Digest, layer int, owner string) error
	// Usage returns how many bytes of a layer are on this machine.
	Usage(ctx context.Context, id oci.Digest, layer int) (int64, error)
	Images
}

// Ordinary has images that are pulled the ordinary way: a *pulled.Store.
type Ordinary interface {
	// Pull brings an image here and holds it for owner. The error is
	// pulled.ErrUnavailable if the registry didn't say what ref means.
	Pull(ctx context.Context, ref, owner string, progress func(pulled.Progress)) (pulled.Image, error)
	// Hold keeps an image for owner.
	Hold(ctx context.Context, id oci.Digest, owner string) error
	Images
}

// Images is what both kinds of images can.
type Images interface {
	// Stack mounts an image for owner, until Release, and returns the
	// directories whose stack is its root file system, the topmost first.
	Stack(ctx context.Context, id oci.Digest, owner string) (dirs []string, err error)
	// Config returns an image's config, verified.
	Config(ctx context.Context, id oci.Digest) ([]byte, error)
	// Release gives up all that owner has. Unknown owners are fine.
	Release(ctx context.Context, owner string) error
	// Collect removes what nobody holds any more.
	Collect(ctx context.Context)
}

// Mount is the body of POST /v1/mounts.
type Mount struct {
	Reference string `json:"reference"`

	// PID is the process with which the claim ends, in the daemon's PID
	// namespace. PullOnly: there's no claim, and nothing is mounted.
	PID      int  `json:"pid,omitempty"`
	PullOnly bool `json:"pullOnly,omitempty"`

	// Ordinary doesn't try Teleport.
	Ordinary bool `json:"ordinary,omitempty"`
}

// Stage is what is being done for a mount.
type Stage string

// The stages. A mount has Manifest, then Teleporting and Teleported, or Ordinary
// and Pulling, which has as many lines as there's progress, and Pulled. Kept comes
// instead of either when an image is used that was pulled before. An image that
// can't be teleported after all goes on with Ordinary.
const (
	StageManifest    Stage = "manifest"
	StageTeleporting Stage = "teleporting"
	StageTeleported  Stage = "teleported"
	StageOrdinary    Stage = "ordinary"
	StagePulling     Stage = "pulling"
	StagePulled      Stage = "pulled"
	StageKept        Stage = "kept"
)

// Line is a line of the answer to POST /v1/mounts: a Stage, what is Mounted, or an
// Error.
type Line struct {
	Stage Stage `json:"stage,omitempty"`

	// Which image it is, of all stages but the first, StageOrdinary and
	// StagePulling.
	Manifest oci.Digest `json:"manifest,omitempty"`
	Platform string     `json:"platform,omitempty"` // linux/arm64/v8
	Layers   int        `json:"layers,omitempty"`

	// Of StageTeleporting: how many requests of the file server it took to make the
	// image ready, and how many bytes came. 0: nothing was asked for.
	Requests int64 `json:"requests,omitempty"`
	Bytes    int64 `json:"bytes,omitempty"`

	// Why, of StageOrdinary and StageKept, says what didn't work; Reason is a
	// word for it.
	Why    string       `json:"why,omitempty"`
	Reason mount.Reason `json:"reason,omitempty"`

	// Progress, of StagePulling.
	Progress *pulled.Progress `json:"progress,omitempty"`

	Mounted *Mounted `json:"mounted,omitempty"`
	Error   *Error   `json:"error,omitempty"`
}

// Mounted is what came of a Mount.
type Mounted struct {
	// ID is the claim's; empty if nothing is mounted.
	ID string `json:"id,omitempty"`
	Kept

	// Why it wasn't teleported.
	Why string `json:"why,omitempty"`

	// Dirs are the directories whose stack, the topmost first, is the root file
	// system. They are out of reach for anybody but root.
	Dirs []string `json:"dirs,omitempty"`

	Config json.RawMessage `json:"config"` // the image's, verified
}

// Kept is an image that was pulled by its reference and stays until it is removed.
type Kept struct {
	Reference  string     `json:"reference"`
	ID         oci.Digest `json:"image"`    // as Teleport or Ordinary know it
	Manifest   oci.Digest `json:"manifest"` // for the platform
	Platform   string     `json:"platform"`
	Teleported bool       `json:"teleported"`
	Layers     int        `json:"layers"`
	Size       int64      `json:"size"` // bytes on this machine, those of other images too
	Pulled     time.Time  `json:"pulled"`
}

// Claim is an image that is mounted for a process.
type Claim struct {
	ID         string     `json:"id"`
	Reference  string     `json:"reference"`
	Image      oci.Digest `json:"image"`
	Manifest   oci.Digest `json:"manifest"`
	Teleported bool       `json:"teleported"`
	PID        int        `json:"pid"`
	Started    uint64     `json:"started"` // clock ticks since boot, from /proc
	Created    time.Time  `json:"created"`
}

// Info is what a daemon says of itself.
type Info struct {
	PID  int    `json:"pid"`
	Root string `json:"root"`
	// Standalone: started by orca, ends by itself.
	Standalone bool `json:"standalone,omitempty"`
	// Snapshotter is the socket that containerd uses, if there's one.
	Snapshotter string `json:"snapshotter,omitempty"`
	// Unusable says why disks can't be mounted on this machine, so that images are
	// pulled the ordinary way. Empty: they can.
	Unusable []string `json:"unusable,omitempty"`
}

// Status is the answer to GET /v1/status.
type Status struct {
	Daemon Info    `json:"daemon"`
	Claims []Claim `json:"claims"`
	Images []Kept  `json:"images"` // that orca pulled

	// Node is how Teleport fares on this machine, as the daemon says it to its own
	// verbs (Options.Node).
	Node json.RawMessage `json:"node,omitempty"`
}

// Error is the answer to what failed, and a client's error.
type Error struct {
	Reason  mount.Reason `json:"reason,omitempty"`
	Message string       `json:"message"`

	code int // of the answer; 0 in a stream
}

// Error returns the message.
func (e *Error) Error() string { return e.Message }

// Is reports whether the answer meant ErrUnknown or ErrInUse.
func (e *Error) Is(target error) bool {
	return target == ErrUnknown && e.code == http.StatusNotFound || target == ErrInUse && e.code == http.StatusConflict
}
