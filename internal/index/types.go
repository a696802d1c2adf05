package index

import (
	"errors"
	"time"

	"sluice/oci"
)

// The errors that callers tell apart; those returned wrap them and name what
// was asked for.
var (
	// ErrNotFound: no such row.
	ErrNotFound = errors.New("not in the index")

	// ErrCorrupt: the database can't be used, whoever tries. The text says
	// what to do.
	ErrCorrupt = errors.New("unusable index database")

	// ErrLeaseLost: the job was given to somebody else, or has ended.
	ErrLeaseLost = errors.New("lease lost")

	// ErrCanceled: somebody asked for the job to be canceled.
	ErrCanceled = errors.New("job canceled")
)

// Attributes are the locks and switches of a repository, manifest or tag. The
// zero value forbids everything; begin with DefaultAttributes, also before
// decoding JSON into it, so that what is absent has its default.
type Attributes struct {
	DeleteEnabled bool `json:"deleteEnabled"` // may be deleted
	WriteEnabled  bool `json:"writeEnabled"`  // may be changed
	ListEnabled   bool `json:"listEnabled"`   // appears in lists
	ReadEnabled   bool `json:"readEnabled"`   // may be pulled

	// Of repositories only.
	TeleportEnabled      bool `json:"teleportEnabled,omitempty"`
	StreamingEnabled     bool `json:"streamingEnabled,omitempty"`     // convert what is pushed
	AnonymousPullEnabled bool `json:"anonymousPullEnabled,omitempty"` // whoever asks may pull
}

// DefaultAttributes returns the attributes of what nobody has set any of:
// nothing locked, nothing switched on.
func DefaultAttributes() Attributes {
	return Attributes{DeleteEnabled: true, WriteEnabled: true, ListEnabled: true, ReadEnabled: true}
}

// The bits of Attributes in the database.
const (
	bitDelete = 1 << iota
	bitWrite
	bitList
	bitRead
	bitTeleport
	bitStreaming
	bitAnonymous
)

func (a Attributes) bits() int64 {
	var bits int64
	for bit, on := range map[int64]bool{
		bitDelete: a.DeleteEnabled, bitWrite: a.WriteEnabled, bitList: a.ListEnabled, bitRead: a.ReadEnabled,
		bitTeleport: a.TeleportEnabled, bitStreaming: a.StreamingEnabled, bitAnonymous: a.AnonymousPullEnabled,
	} {
		if on {
			bits |= bit
		}
	}
	return bits
}

func attributesOf(bits int64) Attributes {
	return Attributes{
		DeleteEnabled: bits&bitDelete != 0, WriteEnabled: bits&bitWrite != 0,
		ListEnabled: bits&bitList != 0, ReadEnabled: bits&bitRead != 0,
		TeleportEnabled: bits&bitTeleport != 0, StreamingEnabled: bits&bitStreaming != 0,
		AnonymousPullEnabled: bits&bitAnonymous != 0,
	}
}

// Repository is a repository as a whole.
type Repository struct {
	Name    string
	Created time.Time
	Updated time.Time // when a manifest or tag was last put or deleted, or attributes were set
	Attributes
	Manifests, Tags int // how many it has; filled by queries only
}

// Manifest is what the index keeps of a manifest.
type Manifest struct {
	Repo             string
	Digest           oci.Digest
	MediaType        string
	ArtifactType     string // what referrers are filtered by, see oci.ManifestInfo
	ConfigMediaType  string
	OS, Architecture string
	Size             int64      // of the manifest itself, in bytes
	ImageSize        int64      // manifest, config and layers together
	Subject          oci.Digest // empty when it refers to nothing
	Annotations      map[string]string
	Blobs            []oci.Descriptor // config and layers that it needs
	Children         []oci.Digest     // manifests that an index names
	Pushed           time.Time
	Updated          time.Time // when it was pushed last or its attributes were set
	By               string    // who pushed it
	Attributes
	Tags []string // that point at it, ordered; filled by queries only
}

// Tag is a name for a manifest.
type Tag struct {
	Repo, Name       string
	Digest           oci.Digest
	Created, Updated time.Time
	Attributes
}

// Blob is a blob in a repository.
type Blob struct {
	Repo   string
	Digest oci.Digest
	Size   int64

	// Touched is when somebody last relied on the blob being there: pushed,
	// mounted or asked for it. Garbage collection spares what was touched
	// lately; nothing else may depend on it, since a rebuilt index says now.
	Touched time.Time
}

// Deleted is a manifest that is deleted but can be restored.
type Deleted struct {
	Repo            string
	Digest          oci.Digest
	MediaType       string
	Tags            []string // that pointed at it
	Deleted         time.Time
	By              string           // who deleted it
	Blobs           []oci.Descriptor // needed to restore it and what was deleted with it
	Children        []oci.Digest
	Size, ImageSize int64
}

// Usage is space taken, in bytes.
type Usage struct {
	Manifests, Blobs int
	Size             int64 // of blobs and manifests, each digest once
	Shared           int64 // the part of Size in blobs that more than one repository has
}

// Order is the order of a list.
type Order int

// The orders of lists of tags and manifests. Times are those of Updated; equal
// ones are ordered by name, and TimeDescending is TimeAscending reversed.
const (
	ByName Order = iota // by tag, or digest
	TimeAscending
	TimeDescending
)

// micros is a time as the database has it. The zero time is 0.
func micros(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMicro()
}

func timeOf(us int64) time.Time {
	if us == 0 {
		return time.Time{}
	}
	return time.UnixMicro(us).UTC()
}
