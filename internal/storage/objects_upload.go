package storage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
)

// maxParts is what S3 allows of one object; Azure Blob Storage allows 50,000.
const maxParts = 10_000

// partSizeOf returns the size of the part that n others precede: it doubles
// with every thousand parts, up to 2 GiB, which makes room for 5.9 TiB where the
// first have 8 MiB.
func (o *Objects) partSizeOf(n int) int { return o.partSize << min(n/1000, 8) }

// bucketUpload is an upload to an object store. Full parts are sent while the
// next one fills.
type bucketUpload struct {
	o        *Objects
	id       string
	recorded uploadRecord // the last checkpoint; its tail is not kept

	data  string   // ID in .sluice/data that the parts are for; "" before the first
	parts string   // the service's name of the upload of parts
	tags  []string // of the parts that were sent

	tail    []byte // follows the parts
	spare   []byte // memory for the next tail
	sending chan sentPart
	size    int64 // of all
	sealed  bool  // a checkpoint says what all parts are; nothing can be added
	whole   bool  // the parts have become an object
	err     error // the first failure; what was written since the checkpoint is lost

	// ctx ends with Close. It is of the writer's, since Write has none.
	ctx    context.Context
	cancel context.CancelFunc
	done   func()
}

type sentPart struct {
	tag  string
	part []byte
	err  error
}

// StartUpload implements Uploader.
func (o *Objects) StartUpload(ctx context.Context) (Upload, error) {
	id := newUploadID()
	done, err := o.uploads.acquire(ctx, id)
	if err != nil {
		return nil, err
	}
	u := o.newUpload(ctx, id, done)
	if err := u.record(ctx, uploadRecord{}); err != nil {
		u.Close()
		return nil, err
	}
	return u, nil
}

func (o *Objects) newUpload(ctx context.Context, id string, done func()) *bucketUpload {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	return &bucketUpload{o: o, id: id, ctx: ctx, cancel: cancel, done: done}
}

// ResumeUpload implements Uploader. It waits for Uploads of this process only;
// of several processes the first to checkpoint goes on, see uploadRecord. On S3
// the others may replace parts of it before they notice: then its Commit fails,
// and the upload has to be started anew. So callers with several processes do
// well to have a lock for each upload.
func (o *Objects) ResumeUpload(ctx context.Context, id string) (Upload, error) {
	if !uploadPattern.MatchString(id) {
		return nil, fmt.Errorf("upload %.100q: %w", id, ErrUploadUnknown)
	}
	done, err := o.uploads.acquire(ctx, id)
	if err != nil {
		return nil, err
	}
	r, err := o.lastRecord(ctx, id)
	if err != nil {
		done()
		return nil, err
	}
	u := o.newUpload(ctx, id, done)
	u.data, u.parts, u.tags, u.size, u.sealed = r.Data, r.Parts, slices.Clone(r.Tags), r.Size, r.Sealed
	u.tail, r.Tail = r.Tail, nil
	u.recorded = r
	if r.TailName != "" {
		u.tail, err = o.read(ctx, r.TailName, int64(o.partSizeOf(len(r.Tags))))
		if err != nil {
			u.Close()
			return nil, fmt.Errorf("upload %s: %w", id, err)
		}
	}
	return u, nil
}

func (u *bucketUpload) ID() string { return u.id }

func (u *bucketUpload) Position() (int64, []byte) { return u.size, u.recorded.State }

func (u *bucketUpload) Write(p []byte) (int, error) {
	if u.sealed && u.err == nil && len(p) > 0 {
		u.err = fmt.Errorf("upload %s: nothing can follow after its content was read or its commit began: start it anew", u.id)
	}
	n := 0
	for len(p) > 0 && u.err == nil {
		// A part that is being sent has its tag soon.
		full := u.o.partSizeOf(u.sent())
		k := min(len(p), full-len(u.tail))
		u.grow(k, full)
		u.tail = append(u.tail, p[:k]...)
		u.size += int64(k)
		n, p = n+k, p[k:]
		if len(u.tail) == full {
			u.send(u.ctx)
		}
	}
	return n, u.err
}

// sent counts the parts, including one that is being sent.
func (u *bucketUpload) sent() int {
	if u.sending != nil {
		return len(u.tags) + 1
	}
	return len(u.tags)
}

// grow makes room for k more bytes: as much as needed for a small object, and
// the memory of a whole part, once, for others.
func (u *bucketUpload) grow(k, full int) {
	if cap(u.tail)-len(u.tail) >= k {
		return
	}
	if cap(u.spare) >= full && len(u.tail) == 0 {
		u.tail, u.spare = u.spare[:0], nil
		return
	}
	if len(u.tail)+k > 1<<20 {
		u.tail = append(make([]byte, 0, full), u.tail...)
	}
}

// send begins to send the tail as a part, when the one before has arrived.
func (u *bucketUpload) send(ctx context.Context) {
	if u.settle(); u.err != nil || len(u.tail) == 0 {
		return
	}
	if len(u.tags) == maxParts {
		u.fail(fmt.Errorf("it has %d bytes: that is too large for %s", u.size, u.o.bucket))
		return
	}
	if u.parts == "" {
		bounded, cancel := context.WithTimeout(ctx, requestTimeout)
		defer cancel()
		data := newUploadID()
		parts, err := u.o.bucket.BeginParts(bounded, u.o.dataName(data))
		if err != nil {
			u.fail(err)
			return
		}
		u.data, u.parts = data, parts
	}
	part, n, sending := u.tail, len(u.tags)+1, make(chan sentPart, 1)
	u.tail, u.sending = nil, sending
	name, parts := u.o.dataName(u.data), u.parts
	go func() { // settle waits for it
		ctx, cancel := context.WithTimeout(ctx, transferTimeout(len(part)))
		defer cancel()
		tag, err := u.o.bucket.PutPart(ctx, name, parts, n, part)
		sending <- sentPart{tag, part, err}
	}()
}

// settle waits for the part that is being sent.
func (u *bucketUpload) settle() {
	if u.sending == nil {
		return
	}
	sent := <-u.sending
	u.sending, u.spare = nil, sent.part[:0]
	if sent.err != nil {
		u.fail(sent.err)
		return
	}
	u.tags = append(u.tags, sent.tag)
}

// fail ends the use of this Upload. Perhaps the parts are gone because another
// process went on with them.
func (u *bucketUpload) fail(err error) {
	if u.err != nil {
		return
	}
	u.err = fmt.Errorf("upload %s: %w", u.id, err)
	last, lerr := u.o.lastRecord(u.ctx, u.id)
	switch {
	case errors.Is(lerr, ErrUploadUnknown):
		u.err = lerr
	case lerr == nil && last.number != u.recorded.number:
		u.err = fmt.Errorf("upload %s: %w", u.id, ErrUploadConflict)
	}
}

// record writes the next checkpoint, with what this upload has.
func (u *bucketUpload) record(ctx context.Context, r uploadRecord) error {
	r.Writer = newUploadID()
	if !r.Over {
		r.Size, r.Data, r.Parts, r.Tags, r.Sealed = u.size, u.data, u.parts, u.tags, u.sealed
	}
	if err := u.o.writeRecord(ctx, u.id, u.recorded.number, r); err != nil {
		if errors.Is(err, ErrUploadUnknown) || errors.Is(err, ErrUploadConflict) {
			u.err = err
		}
		return err
	}
	old := u.recorded.TailName
	r.number, r.Tags, r.Tail = u.recorded.number+1, slices.Clone(r.Tags), nil
	u.recorded = r
	if old != "" && old != r.TailName {
		_ = u.o.remove(ctx, old) // or Sweep does
	}
	return nil
}

// Checkpoint implements Upload.
func (u *bucketUpload) Checkpoint(ctx context.Context, state []byte) error {
	if len(state) > maxState {
		return fmt.Errorf("upload %s: state of %d bytes: %d are allowed", u.id, len(state), maxState)
	}
	if u.settle(); u.err != nil {
		return u.err
	}
	r := uploadRecord{State: bytes.Clone(state)}
	if len(u.tail) <= u.o.inline {
		r.Tail = u.tail
	} else {
		r.TailName = uploadDir(u.id) + "tail-" + newUploadID()
		if err := u.o.put(ctx, r.TailName, u.tail, BucketPut{IfAbsent: true}); err != nil && !errors.Is(err, ErrExists) {
			return fmt.Errorf("upload %s: %w", u.id, err)
		}
	}
	err := u.record(ctx, r)
	if err != nil && r.TailName != "" && u.err != nil {
		_ = u.o.remove(ctx, r.TailName)
	}
	return err
}

// Content implements Upload. Neither S3 nor Azure Blob Storage reads parts, so
// they become an object now.
func (u *bucketUpload) Content(ctx context.Context) (io.ReadCloser, error) {
	if u.settle(); u.err != nil {
		return nil, u.err
	}
	if u.parts == "" {
		return io.NopCloser(bytes.NewReader(u.tail)), nil
	}
	if err := u.seal(ctx); err != nil {
		return nil, err
	}
	body, info, err := u.o.bucket.Get(ctx, u.o.dataName(u.data), 0, -1)
	if err != nil {
		return nil, fmt.Errorf("upload %s: %w", u.id, err)
	}
	return newBucketObject("of upload "+u.id, body, info.Size, u.size), nil
}

// seal makes an object of the parts. The checkpoint before fixes which they are,
// so that whoever resumes after a crash finds just that object.
func (u *bucketUpload) seal(ctx context.Context) error {
	if u.whole {
		return nil
	}
	if !u.sealed {
		u.send(ctx)
		if u.settle(); u.err != nil {
			return u.err
		}
		r := uploadRecord{State: u.recorded.State}
		if u.size != u.recorded.Size {
			r.State = nil // it is about less than there is
		}
		u.sealed = true
		if err := u.record(ctx, r); err != nil {
			u.fail(err)
			return u.err
		}
	}
	bounded, cancel := context.WithTimeout(ctx, maxLinking)
	defer cancel()
	name := u.o.dataName(u.data)
	if err := u.o.bucket.CompleteParts(bounded, name, u.parts, u.tags); err != nil {
		// Was it done before, by a request whose answer got lost?
		info, herr := u.o.bucket.Head(bounded, name)
		if herr != nil || info.Size != u.size {
			u.fail(err)
			return u.err
		}
	}
	u.whole = true
	return nil
}

// Commit implements Upload.
func (u *bucketUpload) Commit(ctx context.Context, key string) error {
	if err := CheckKey(key); err != nil {
		return err
	}
	if u.settle(); u.err != nil {
		return u.err
	}
	defer func() {
		if u.recorded.Over {
			u.Close()
		}
	}()
	if u.parts == "" && u.size <= int64(u.o.inline) {
		if err := u.end(ctx); err != nil {
			return err
		}
		return u.o.put(ctx, key, u.tail, BucketPut{IfAbsent: true})
	}
	c, ok, err := u.o.shared(ctx, key, u.size)
	if err != nil {
		return err
	}
	if ok {
		if err := u.end(ctx); err != nil {
			u.o.unclaim(ctx, c)
			return err
		}
		u.discard(ctx)
		return u.o.point(ctx, c, key)
	}
	return u.commitOwn(ctx, key)
}

// commitOwn stores what was written, and makes it the object of key.
func (u *bucketUpload) commitOwn(ctx context.Context, key string) error {
	own, err := u.store(ctx, key)
	if err != nil {
		return err
	}
	if err := u.end(ctx); err != nil {
		u.o.unclaim(ctx, own)
		return err
	}
	c, err := u.o.offer(ctx, own, key)
	if err != nil {
		u.o.unclaim(ctx, own)
		return err
	}
	if c.Data != own.Data {
		u.o.unclaim(ctx, own)
		_ = u.o.remove(ctx, dataDir+own.Data+"/data") // nobody else knows of it
	}
	return u.o.point(ctx, c, key)
}

// store makes an object of the bytes and claims it. The ref comes first: bytes
// without one are taken for garbage.
func (u *bucketUpload) store(ctx context.Context, key string) (claim, error) {
	id := u.data
	if u.parts == "" {
		id = newUploadID()
	} else if !u.sealed {
		// Now, since it may take long and the claim's time runs.
		u.send(ctx)
		if u.settle(); u.err != nil {
			return claim{}, u.err
		}
	}
	own, err := u.o.claim(ctx, id, u.size, key)
	if err != nil {
		return own, err
	}
	if u.parts != "" {
		err = u.seal(ctx)
	} else {
		err = u.o.put(ctx, dataDir+id+"/data", u.tail, BucketPut{})
	}
	if err == nil {
		var ok bool
		if ok, err = u.o.alive(ctx, own); err == nil && !ok {
			err = fmt.Errorf("upload %s: its bytes are gone or damaged: start it anew", u.id)
		}
	}
	if err != nil {
		u.o.unclaim(ctx, own)
	}
	return own, err
}

// end says that the upload is over. Whoever says so first has it.
func (u *bucketUpload) end(ctx context.Context) error {
	if err := u.record(ctx, uploadRecord{Over: true}); err != nil {
		return err
	}
	u.err = fmt.Errorf("upload %s: %w", u.id, ErrUploadUnknown)
	return nil
}

// discard removes the bytes of an upload that is over and wasn't stored.
func (u *bucketUpload) discard(ctx context.Context) {
	if u.parts == "" {
		return
	}
	if u.sealed {
		_ = u.o.remove(ctx, dataDir+u.data+"/data")
	}
	u.o.dropUpload(ctx, uploadRecord{Data: u.data, Parts: u.parts})
}

// Close implements Upload.
func (u *bucketUpload) Close() error {
	if u.done == nil {
		return nil
	}
	u.cancel()
	if u.sending != nil {
		<-u.sending
		u.sending = nil
	}
	if u.parts != "" && u.parts != u.recorded.Parts && !u.recorded.Over {
		// No checkpoint knows of these parts.
		u.o.dropUpload(u.ctx, uploadRecord{Data: u.data, Parts: u.parts})
	}
	u.tail, u.spare = nil, nil
	u.done()
	u.done = nil
	return nil
}
