package storage

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// uploadRecord is what a checkpoint of an upload to an object store records.
// Checkpoints are objects with increasing numbers, each written only if there is
// none of that number: of several processes that continue one upload from the
// same checkpoint, one gets to write the next, and the others learn that they
// lost. The last one says that the upload is over. All stay until Sweep removes
// them, so that somebody who was asleep can't begin a second history.
type uploadRecord struct {
	Version int    `json:"version"`
	Writer  string `json:"writer"` // random, for knowing one's own record after a retry
	Over    bool   `json:"over,omitempty"`

	Size  int64  `json:"size"`
	State []byte `json:"state,omitempty"` // the caller's

	// Bytes come from the parts, then from the tail, which is here if it is
	// small and in an object of its own otherwise.
	Data     string   `json:"data,omitempty"`  // ID in .sluice/data that the parts are for
	Parts    string   `json:"parts,omitempty"` // the service's name of the upload of parts
	Tags     []string `json:"tags,omitempty"`  // of the parts, in order
	Sealed   bool     `json:"sealed,omitempty"`
	Tail     []byte   `json:"tail,omitempty"`
	TailName string   `json:"tailName,omitempty"`

	number int // its own
}

const (
	recordVersion = 1
	maxRecord     = 8 << 20   // bytes: 10,000 tags of at most some 100 bytes, a tail
	maxRecords    = 1_000_000 // of one upload
)

var errBadRecord = errors.New("checkpoint can't be used")

func uploadDir(id string) string     { return bucketUploadsDir + id + "/" }
func recordsPrefix(id string) string { return uploadDir(id) + "state-" }
func recordName(id string, number int) string {
	return fmt.Sprintf("%s%08d", recordsPrefix(id), number)
}

// lastRecord returns the last checkpoint of an upload that isn't over. Errors:
// ErrUploadUnknown.
func (o *Objects) lastRecord(ctx context.Context, id string) (uploadRecord, error) {
	var r uploadRecord
	unknown := fmt.Errorf("upload %.100q: %w", id, ErrUploadUnknown)
	if !uploadPattern.MatchString(id) {
		return r, unknown
	}
	last := ""
	for e, err := range o.walk(ctx, recordsPrefix(id)) {
		if err != nil {
			return r, fmt.Errorf("upload %s: %w", id, err)
		}
		last = e.Name
	}
	if last == "" {
		return r, unknown
	}
	r, err := o.readRecord(ctx, last)
	switch {
	case errors.Is(err, ErrNotFound), err == nil && r.Over:
		return r, unknown
	case err != nil:
		return r, fmt.Errorf("upload %s: %w", id, err)
	}
	return r, nil
}

func (o *Objects) readRecord(ctx context.Context, name string) (uploadRecord, error) {
	encoded, err := o.read(ctx, name, maxRecord)
	if err != nil {
		return uploadRecord{}, err
	}
	return parseRecord(name, encoded)
}

// parseRecord checks a checkpoint as far as this process relies on it.
func parseRecord(name string, encoded []byte) (uploadRecord, error) {
	var r uploadRecord
	err := json.Unmarshal(encoded, &r)
	dir, number, _ := strings.Cut(name, "/state-")
	if err == nil {
		_, err = fmt.Sscanf(number, "%08d", &r.number)
	}
	switch {
	case err != nil:
	case r.Version != recordVersion:
		err = fmt.Errorf("version %d: this sluice knows %d", r.Version, recordVersion)
	case r.Size < 0 || r.number < 1 || r.number > maxRecords || len(r.Tags) > maxParts || len(r.State) > maxState,
		len(r.Tail) > 0 && r.TailName != "",
		r.TailName != "" && !strings.HasPrefix(r.TailName, dir+"/tail-"),
		(r.Data != "" || r.Parts != "" || len(r.Tags) > 0) && !uploadPattern.MatchString(r.Data):
		err = errors.New("it contradicts itself")
	}
	if err != nil {
		return uploadRecord{}, fmt.Errorf("%w: %s: %w", errBadRecord, name, err)
	}
	return r, nil
}

// writeRecord writes the checkpoint that follows number. Errors:
// ErrUploadUnknown if the upload is over, ErrUploadConflict if somebody else has
// continued it.
func (o *Objects) writeRecord(ctx context.Context, id string, number int, r uploadRecord) error {
	r.Version, r.number = recordVersion, number+1
	encoded, err := json.Marshal(r)
	if err == nil && r.number > maxRecords {
		err = fmt.Errorf("more than %d checkpoints: send larger chunks", maxRecords)
	}
	name := recordName(id, r.number)
	if err == nil {
		err = o.put(ctx, name, encoded, BucketPut{IfAbsent: true})
	}
	if !errors.Is(err, ErrExists) {
		if err != nil {
			err = fmt.Errorf("upload %s: %w", id, err)
		}
		return err
	}
	other, err := o.readRecord(ctx, name)
	if err == nil && other.Writer == r.Writer {
		return nil // this very request's, whose answer got lost
	}
	if err == nil {
		_, err = o.lastRecord(ctx, id)
	}
	if err == nil {
		err = fmt.Errorf("upload %s: %w", id, ErrUploadConflict)
	}
	return err
}

// StatUpload implements Uploader.
func (o *Objects) StatUpload(ctx context.Context, id string) (int64, []byte, error) {
	r, err := o.lastRecord(ctx, id)
	return r.Size, r.State, err
}

// CancelUpload implements Uploader.
func (o *Objects) CancelUpload(ctx context.Context, id string) error {
	for {
		r, err := o.lastRecord(ctx, id)
		if err != nil {
			return err
		}
		err = o.writeRecord(ctx, id, r.number, uploadRecord{Writer: newUploadID(), Over: true})
		if errors.Is(err, ErrUploadConflict) {
			continue // it goes on: end it there
		}
		if err == nil {
			o.dropUpload(ctx, r)
		}
		return err
	}
}

// dropUpload removes the bytes of an upload that is over. What fails is left to
// Sweep.
func (o *Objects) dropUpload(ctx context.Context, r uploadRecord) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
	defer cancel()
	if r.TailName != "" {
		_ = o.remove(ctx, r.TailName)
	}
	if r.Parts != "" {
		_ = o.bucket.AbortParts(ctx, o.dataName(r.Data), r.Parts)
	}
}

// sweepUploads ends uploads to which nothing happened for age, and removes what
// is left of those that were over before.
func (o *Objects) sweepUploads(ctx context.Context, age time.Duration, result *SweepResult) error {
	var names []string // of the upload that is being listed
	var id string
	var newest time.Time
	flush := func() error {
		if len(names) == 0 || o.now().Sub(newest) < age {
			return nil
		}
		err := o.CancelUpload(ctx, id)
		if err == nil {
			result.Uploads++
		} else if !errors.Is(err, ErrUploadUnknown) && !errors.Is(err, errBadRecord) {
			return err
		}
		// The end is the last of the names, or not among them yet.
		for _, name := range names {
			if err := o.remove(ctx, name); err != nil {
				return err
			}
		}
		return nil
	}
	for e, err := range o.walk(ctx, bucketUploadsDir) {
		if err != nil {
			return err
		}
		this, _, _ := strings.Cut(strings.TrimPrefix(e.Name, bucketUploadsDir), "/")
		if this != id {
			if err := flush(); err != nil {
				return err
			}
			names, id, newest = names[:0], this, time.Time{}
		}
		names = append(names, e.Name)
		if e.Modified.After(newest) {
			newest = e.Modified
		}
	}
	return flush()
}
