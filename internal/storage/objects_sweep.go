package storage

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"
)

// partsAge is for how long bytes of an upload may be where no checkpoint knows
// of them, on top of the age at which uploads are abandoned. Azure Blob Storage
// itself drops them after a week.
const partsAge = 7 * 24 * time.Hour

// Sweep implements Maintainer. It lists everything below .sluice, and reads about
// ten thousand refs and hints each: all of a small store; of a large one, others
// each time.
func (o *Objects) Sweep(ctx context.Context, uploadAge time.Duration) (SweepResult, error) {
	var r SweepResult
	if err := o.sweepUploads(ctx, uploadAge, &r); err != nil {
		return r, fmt.Errorf("sweep uploads: %w", err)
	}
	n, err := o.bucket.AbortPartsBefore(ctx, o.prefix+dataDir, o.now().Add(-uploadAge-partsAge))
	if r.Temporary += n; err != nil {
		return r, fmt.Errorf("sweep parts: %w", err)
	}
	if err := o.sweepData(ctx, &r); err != nil {
		return r, fmt.Errorf("sweep shared bytes: %w", err)
	}
	if err := o.sweepHints(ctx, &r); err != nil {
		return r, fmt.Errorf("sweep hints: %w", err)
	}
	return r, nil
}

// generation is what a listing has of .sluice/data/ID.
type generation struct {
	id          string
	data, dying time.Time // when they were written; zero if there is none
	refs        int       // of those that weren't dropped
}

// sweepData goes through everything below .sluice/data, which a listing has in
// the order data, dying, refs.
func (o *Objects) sweepData(ctx context.Context, result *SweepResult) error {
	var g generation
	var seen int64
	for e, err := range o.walk(ctx, dataDir) {
		if err != nil {
			return err
		}
		id, name, _ := strings.Cut(strings.TrimPrefix(e.Name, dataDir), "/")
		if id != g.id {
			if err := o.sweepGeneration(ctx, g, result); err != nil {
				return err
			}
			g = generation{id: id}
		}
		switch {
		case name == "data":
			g.data = e.Modified
		case name == "dying":
			g.dying = e.Modified
		case strings.HasPrefix(name, "refs/"):
			seen++
			dropped := false
			if o.old(e.Modified) && o.chosen(max(seen, o.refsSeen.Load())) {
				if dropped, err = o.dropRef(ctx, id, e.Name); err != nil {
					return err
				}
			}
			if dropped {
				result.Temporary++
			} else {
				g.refs++
			}
		}
	}
	o.refsSeen.Store(seen)
	return o.sweepGeneration(ctx, g, result)
}

func (o *Objects) old(t time.Time) bool { return o.now().Sub(t) > grace }

// chosen reports whether one of n things is to be read.
func (o *Objects) chosen(n int64) bool {
	return n <= int64(o.checks) || rand.Int64N(n) < int64(o.checks)
}

// dropRef removes a ref that is old enough and has no pointer.
func (o *Objects) dropRef(ctx context.Context, id, name string) (bool, error) {
	key, err := o.read(ctx, name, maxRef)
	if errors.Is(err, ErrNotFound) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	if CheckKey(string(key)) == nil {
		info, err := o.head(ctx, string(key))
		if err != nil && !errors.Is(err, ErrNotFound) {
			return false, err
		}
		p, ok, err := parsePointer(string(key), info.Label)
		if err != nil || ok && p.Data == id && strings.HasSuffix(name, "/"+p.Ref) {
			return false, nil // it is needed, or this program is too old to know
		}
	}
	return true, o.remove(ctx, name)
}

// sweepGeneration does the next step of freeing bytes without refs.
func (o *Objects) sweepGeneration(ctx context.Context, g generation, result *SweepResult) error {
	switch {
	case g.refs > 0 || !uploadPattern.MatchString(g.id):
		return nil
	case g.dying.IsZero():
		if g.data.IsZero() || !o.old(g.data) {
			return nil
		}
		return o.put(ctx, dyingName(g.id), nil, BucketPut{})
	case !o.old(g.dying):
		return nil
	}
	// The listing that counts begins after dying was written.
	for _, err := range o.walk(ctx, refsDir(g.id)) {
		return err // a ref, and no error, keeps them alive
	}
	if !g.data.IsZero() {
		if err := o.remove(ctx, dataDir+g.id+"/data"); err != nil {
			return err
		}
		result.Shared++
	}
	return o.remove(ctx, dyingName(g.id))
}

// sweepHints removes hints at bytes that are gone.
func (o *Objects) sweepHints(ctx context.Context, result *SweepResult) error {
	var seen int64
	for e, err := range o.walk(ctx, identityDir) {
		if err != nil {
			return err
		}
		seen++
		if !o.old(e.Modified) || !o.chosen(max(seen, o.refsSeen.Load())) {
			continue
		}
		id, err := o.hint(ctx, e.Name)
		if err == nil && id != "" {
			_, err = o.head(ctx, dataDir+id+"/data")
		}
		if err == nil && id != "" {
			continue
		}
		if err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
		if err := o.remove(ctx, e.Name); err != nil {
			return err
		}
		result.Temporary++
	}
	return nil
}
