package storage

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"time"
)

// Bytes that several pointers share live as long as one of them does. No
// database knows how many there are, and any number of processes add and remove
// pointers at the same time, so this is a protocol of small objects beside the
// bytes, .sluice/data/ID/data. It needs no more than a strongly consistent store:
//
//	add a pointer     1. write a ref of its own: it is never used again
//	                  2. is there ID/dying? Then give the ref up
//	                  3. are the bytes there? If not, give the ref up
//	                  4. write the pointer, at most 10 minutes after 1
//	remove a pointer  1. delete it
//	                  2. delete its ref
//	free the bytes    1. no refs, and the bytes are older than an hour: write ID/dying
//	                  2. an hour later (whoever was reading has finished): no
//	                     refs? Then delete the bytes
//	                  3. delete ID/dying
//	drop a ref        if it is older than an hour and its pointer isn't there or
//	                  has another ref: a crash left it
//
// Why no pointer loses its bytes: say a ref was written. If that was before the
// listing of free 2, the listing has it, and the bytes stay. If it was after, then
// ID/dying was written still earlier, and add 2 finds it — or it is gone again,
// and then the bytes went before it, and add 3 finds that. A ref of a live pointer
// is not dropped: the pointer names it. A ref of a pointer to be written is not,
// since that is written within 10 minutes or never. Nobody takes ID/dying away
// while there are refs, so that two who free can't mislead each other; the
// price is that bytes which were found unused and got a pointer in that moment
// keep living but get no further ones, and are stored anew when pushed again.
//
// .sluice/shared/IDENTITY says where bytes of an identity are. It is a hint:
// wrong or missing it costs a copy, never an object. Of several processes that
// store the same bytes at the same time the one that writes the hint first (if
// absent) has the bytes; the others point to those and delete theirs.

const (
	maxLinking  = 10 * time.Minute // from ref to pointer
	grace       = time.Hour        // how long refs and bytes without pointer are kept
	maxRef      = maxKey           // bytes
	maxIdentity = 64               // bytes of a hint
)

// pointer says where the bytes of an object are.
type pointer struct {
	Version int    `json:"version"`
	Data    string `json:"data"` // ID in .sluice/data
	Size    int64  `json:"size"`
	Ref     string `json:"ref"` // name below refs/
}

const pointerVersion = 1

var refPattern = regexp.MustCompile(`^[0-9a-f]{32}-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// parsePointer returns the pointer in a label, if it isn't empty.
func parsePointer(key, label string) (pointer, bool, error) {
	if label == "" {
		return pointer{}, false, nil
	}
	var p pointer
	err := json.Unmarshal([]byte(label), &p)
	if err == nil && (p.Version != pointerVersion || !uploadPattern.MatchString(p.Data) || p.Size < 0 || !refPattern.MatchString(p.Ref)) {
		err = fmt.Errorf("its pointer %.300q is not one of version %d: was it written by a newer sluice?", label, pointerVersion)
	}
	if err != nil {
		return pointer{}, false, fmt.Errorf("object %s: %w", key, err)
	}
	return p, true, nil
}

func (o *Objects) dataName(id string) string { return o.prefix + dataDir + id + "/data" }
func dyingName(id string) string             { return dataDir + id + "/dying" }
func refsDir(id string) string               { return dataDir + id + "/refs/" }
func refName(id, ref string) string          { return refsDir(id) + ref }

// claim is a pointer on its way: it has a ref.
type claim struct {
	pointer
	made time.Time // before the ref was written
}

// claim writes the ref of a pointer to be.
func (o *Objects) claim(ctx context.Context, id string, size int64, key string) (claim, error) {
	hash := sha256.Sum256([]byte(key))
	c := claim{made: o.now(), pointer: pointer{
		Version: pointerVersion, Data: id, Size: size,
		Ref: fmt.Sprintf("%x-%s", hash[:16], newUploadID()),
	}}
	return c, o.put(ctx, refName(id, c.Ref), []byte(key), BucketPut{})
}

// alive reports whether a claim's bytes stay as long as its ref.
func (o *Objects) alive(ctx context.Context, c claim) (bool, error) {
	if _, err := o.head(ctx, dyingName(c.Data)); !errors.Is(err, ErrNotFound) {
		return false, err
	}
	info, err := o.head(ctx, dataDir+c.Data+"/data")
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	// Of another size it is damaged: don't spread it.
	return err == nil && info.Size == c.Size, err
}

// share claims bytes that are there already, if they stay.
func (o *Objects) share(ctx context.Context, id string, size int64, key string) (claim, bool, error) {
	c, err := o.claim(ctx, id, size, key)
	if err != nil {
		return c, false, err
	}
	ok, err := o.alive(ctx, c)
	if err != nil || !ok {
		o.unclaim(ctx, c)
	}
	return c, ok, err
}

// unclaim gives a claim up. What fails is left to Sweep.
func (o *Objects) unclaim(ctx context.Context, c claim) {
	_ = o.remove(context.WithoutCancel(ctx), refName(c.Data, c.Ref))
}

// point writes the pointer of a claim, or gives the claim up. Errors: ErrExists.
func (o *Objects) point(ctx context.Context, c claim, key string) error {
	if late := o.now().Sub(c.made); late > maxLinking {
		o.unclaim(ctx, c)
		return fmt.Errorf("object %s: storing it took %v, more than %v: is %s overloaded? Try again", key, late.Round(time.Second), maxLinking, o.bucket)
	}
	label, err := json.Marshal(c.pointer)
	if err != nil {
		return err
	}
	err = o.put(ctx, key, label, BucketPut{IfAbsent: true, Label: string(label)})
	if errors.Is(err, ErrExists) {
		// Perhaps it was this very request, whose answer got lost.
		if p, _, lerr := o.look(ctx, key); lerr == nil && p == c.pointer {
			return nil
		}
		o.unclaim(ctx, c)
	}
	// After any other error the pointer may be there, and needs its ref.
	return err
}

// shared claims the bytes of an object that is to be stored at key, if some of
// that identity are there.
func (o *Objects) shared(ctx context.Context, key string, size int64) (claim, bool, error) {
	name := o.identityName(key)
	if name == "" {
		return claim{}, false, nil
	}
	id, err := o.hint(ctx, name)
	if err != nil || id == "" {
		return claim{}, false, err
	}
	return o.share(ctx, id, size, key)
}

// offer makes the bytes of a claim those of its identity. It returns the claim
// to use: another one if somebody else was first.
func (o *Objects) offer(ctx context.Context, c claim, key string) (claim, error) {
	name := o.identityName(key)
	if name == "" {
		return c, nil
	}
	for range 2 {
		err := o.put(ctx, name, []byte(c.Data), BucketPut{IfAbsent: true})
		if !errors.Is(err, ErrExists) {
			return c, err
		}
		id, err := o.hint(ctx, name)
		if err != nil || id == c.Data {
			return c, err
		}
		if id == "" {
			continue
		}
		other, ok, err := o.share(ctx, id, c.Size, key)
		if err != nil {
			return c, err
		}
		if ok {
			return other, nil
		}
		// Those are dying, or gone.
		if err := o.remove(ctx, name); err != nil {
			return c, err
		}
	}
	return c, nil // not shared: that costs space, no more
}

// hint returns the ID in a hint, empty if there is none that makes sense.
func (o *Objects) hint(ctx context.Context, name string) (string, error) {
	id, err := o.read(ctx, name, maxIdentity)
	if errors.Is(err, ErrNotFound) {
		return "", nil
	}
	if err != nil || !uploadPattern.Match(id) {
		return "", err
	}
	return string(id), nil
}

func (o *Objects) identityName(key string) string {
	id := o.identity(key)
	if id == "" || CheckKey(id) != nil {
		return ""
	}
	return identityDir + id
}
