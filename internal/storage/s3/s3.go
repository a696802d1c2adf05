// Package s3 keeps objects in a bucket of S3, or of a service that speaks its
// protocol, such as MinIO. Open returns the storage.Objects in it; this package
// is the storage.Bucket below.
//
// The bucket must exist. What is needed of the service, besides the usual, is
// If-None-Match: * on PutObject. The rights needed are s3:GetObject, PutObject,
// DeleteObject, AbortMultipartUpload on its objects, and s3:ListBucket and
// ListBucketMultipartUploads on it. Versioning of the bucket is not wanted: it
// keeps what was deleted.
package s3

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"sluice/internal/storage"
)

// Options says where the bucket is.
type Options struct {
	Endpoint string // HOST or HOST:PORT; empty is Amazon's
	Bucket   string
	Prefix   string // of all objects; see storage.ObjectsOptions
	Region   string // empty: asked for, where the endpoint needs it

	// AccessKey and SecretKey are the credentials. Both empty: those of the
	// environment (AWS_ACCESS_KEY_ID and so on), or of the machine's role.
	AccessKey, SecretKey string

	Insecure bool // plain HTTP

	// Identity is that of storage.ObjectsOptions.
	Identity func(key string) string
}

// retries bounds how often a request is sent.
const retries = 5

// labelName is a name of user metadata.
const labelName = "Sluice"

// Open returns the store in a bucket. It sends nothing: see Check.
func Open(_ context.Context, opts Options) (*storage.Objects, error) {
	if opts.Bucket == "" {
		return nil, errors.New("s3: the name of the bucket is missing")
	}
	if (opts.AccessKey == "") != (opts.SecretKey == "") {
		return nil, errors.New("s3: an access key needs a secret key, and the other way round")
	}
	if opts.Endpoint == "" {
		opts.Endpoint = "s3.amazonaws.com"
	}
	creds := credentials.NewStaticV4(opts.AccessKey, opts.SecretKey, "")
	if opts.AccessKey == "" {
		creds = credentials.NewChainCredentials([]credentials.Provider{&credentials.EnvAWS{}, &credentials.IAM{}})
	}
	client, err := minio.NewCore(opts.Endpoint, &minio.Options{
		Creds: creds, Secure: !opts.Insecure, Region: opts.Region, Transport: storage.NewTransport(), MaxRetries: retries,
	})
	if err != nil {
		return nil, fmt.Errorf("s3: endpoint %s: %w", opts.Endpoint, err)
	}
	b := &bucket{client: client, name: opts.Bucket, where: fmt.Sprintf("s3://%s at %s", opts.Bucket, opts.Endpoint)}
	return storage.NewObjects(b, storage.ObjectsOptions{Prefix: opts.Prefix, Identity: opts.Identity})
}

type bucket struct {
	client *minio.Core
	name   string
	where  string
}

func (b *bucket) String() string { return b.where }

// Get implements storage.Bucket.
func (b *bucket) Get(ctx context.Context, name string, offset, length int64) (io.ReadCloser, storage.BucketInfo, error) {
	var opts minio.GetObjectOptions
	switch {
	case length >= 0:
		opts.Set("Range", fmt.Sprintf("bytes=%d-%d", offset, offset+length-1))
	case offset > 0:
		opts.Set("Range", fmt.Sprintf("bytes=%d-", offset))
	}
	body, info, header, err := b.client.GetObject(ctx, b.name, name, opts)
	if err != nil {
		return nil, storage.BucketInfo{}, b.failed("get", name, err)
	}
	result := bucketInfo(info)
	if r := header.Get("Content-Range"); r != "" { // "bytes 0-9/SIZE"
		_, size, _ := strings.Cut(r, "/")
		if result.Size, err = strconv.ParseInt(size, 10, 64); err != nil {
			body.Close()
			return nil, result, b.failed("get", name, fmt.Errorf("its answer has the range %q", r))
		}
	}
	return body, result, nil
}

func bucketInfo(info minio.ObjectInfo) storage.BucketInfo {
	return storage.BucketInfo{Size: info.Size, Modified: info.LastModified, Label: info.Metadata.Get("X-Amz-Meta-" + labelName)}
}

// Head implements storage.Bucket.
func (b *bucket) Head(ctx context.Context, name string) (storage.BucketInfo, error) {
	info, err := b.client.StatObject(ctx, b.name, name, minio.StatObjectOptions{})
	if err != nil {
		return storage.BucketInfo{}, b.failed("look for", name, err)
	}
	return bucketInfo(info), nil
}

// Put implements storage.Bucket.
func (b *bucket) Put(ctx context.Context, name string, data []byte, opts storage.BucketPut) error {
	o := minio.PutObjectOptions{ContentType: "application/octet-stream", DisableContentSha256: true}
	if opts.Label != "" {
		o.UserMetadata = map[string]string{labelName: opts.Label}
	}
	if opts.IfAbsent {
		o.SetMatchETagExcept("*")
	}
	for attempt := 1; ; attempt++ {
		_, err := b.client.PutObject(ctx, b.name, name, body(data), int64(len(data)), "", hash(data), o)
		if err == nil {
			return nil
		}
		// S3 says so when two conditional writes meet, and that one should
		// try again (its documentation of PutObject).
		if minio.ToErrorResponse(err).Code != "ConditionalRequestConflict" || attempt == retries {
			return b.failed("put", name, err)
		}
		select {
		case <-time.After(time.Duration(attempt) * 50 * time.Millisecond):
		case <-ctx.Done():
			return b.failed("put", name, ctx.Err())
		}
	}
}

// body is a request's, which has to be none for it to have a length of 0.
func body(data []byte) io.Reader {
	if len(data) == 0 {
		return nil
	}
	return bytes.NewReader(data)
}

// hash is signed together with a request, so that the service refuses a body
// that was damaged on its way.
func hash(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// Delete implements storage.Bucket.
func (b *bucket) Delete(ctx context.Context, name string) error {
	err := b.failed("delete", name, b.client.RemoveObject(ctx, b.name, name, minio.RemoveObjectOptions{}))
	if errors.Is(err, storage.ErrNotFound) {
		return nil
	}
	return err
}

// List implements storage.Bucket. The client library's page doesn't take a
// context; each is bounded by the transport, and the context is looked at in
// between.
func (b *bucket) List(ctx context.Context, prefix, after, delimiter string) iter.Seq2[storage.BucketEntry, error] {
	return func(yield func(storage.BucketEntry, error) bool) {
		token := ""
		for {
			err := ctx.Err()
			var page minio.ListBucketV2Result
			if err == nil {
				page, err = b.client.ListObjectsV2(b.name, prefix, after, token, delimiter, 1000)
			}
			if err != nil {
				yield(storage.BucketEntry{}, b.failed("list", prefix, err))
				return
			}
			if !yieldPage(page, after, yield) || !page.IsTruncated {
				return
			}
			if page.NextContinuationToken == token {
				yield(storage.BucketEntry{}, b.failed("list", prefix, errors.New("the listing goes in circles")))
				return
			}
			token = page.NextContinuationToken
		}
	}
}

// yieldPage yields the entries of a page, which come in two sorted lists, as one.
func yieldPage(page minio.ListBucketV2Result, after string, yield func(storage.BucketEntry, error) bool) bool {
	objects, prefixes := page.Contents, page.CommonPrefixes
	for len(objects) > 0 || len(prefixes) > 0 {
		var e storage.BucketEntry
		if len(prefixes) == 0 || len(objects) > 0 && objects[0].Key < prefixes[0].Prefix {
			e = storage.BucketEntry{Name: objects[0].Key, Size: objects[0].Size, Modified: objects[0].LastModified}
			objects = objects[1:]
		} else {
			e.Name, prefixes = prefixes[0].Prefix, prefixes[1:]
		}
		if e.Name > after && !yield(e, nil) {
			return false
		}
	}
	return true
}

// BeginParts implements storage.Bucket.
func (b *bucket) BeginParts(ctx context.Context, name string) (string, error) {
	id, err := b.client.NewMultipartUpload(ctx, b.name, name, minio.PutObjectOptions{ContentType: "application/octet-stream"})
	return id, b.failed("begin", name, err)
}

// PutPart implements storage.Bucket. The tag is the part's ETag: that of a part
// which was replaced is refused.
func (b *bucket) PutPart(ctx context.Context, name, upload string, n int, data []byte) (string, error) {
	part, err := b.client.PutObjectPart(ctx, b.name, name, upload, n, body(data), int64(len(data)),
		minio.PutObjectPartOptions{Sha256Hex: hash(data), DisableContentSha256: true})
	if err != nil {
		return "", b.failed(fmt.Sprintf("put part %d of", n), name, err)
	}
	return part.ETag, nil
}

// CompleteParts implements storage.Bucket.
func (b *bucket) CompleteParts(ctx context.Context, name, upload string, tags []string) error {
	parts := make([]minio.CompletePart, len(tags))
	for i, tag := range tags {
		parts[i] = minio.CompletePart{PartNumber: i + 1, ETag: tag}
	}
	_, err := b.client.CompleteMultipartUpload(ctx, b.name, name, upload, parts, minio.PutObjectOptions{})
	return b.failed("complete", name, err)
}

// AbortParts implements storage.Bucket.
func (b *bucket) AbortParts(ctx context.Context, name, upload string) error {
	err := b.client.AbortMultipartUpload(ctx, b.name, name, upload)
	if minio.ToErrorResponse(err).Code == minio.NoSuchUpload {
		return nil
	}
	return b.failed("abort", name, err)
}

// AbortPartsBefore implements storage.Bucket.
func (b *bucket) AbortPartsBefore(ctx context.Context, prefix string, before time.Time) (int, error) {
	n := 0
	key, id := "", ""
	for {
		page, err := b.client.ListMultipartUploads(ctx, b.name, prefix, key, id, "", 1000)
		if err != nil {
			return n, b.failed("list uploads to", prefix, err)
		}
		for _, u := range page.Uploads {
			if !strings.HasPrefix(u.Key, prefix) || !u.Initiated.Before(before) {
				continue
			}
			if err := b.AbortParts(ctx, u.Key, u.UploadID); err != nil {
				return n, err
			}
			n++
		}
		if !page.IsTruncated || page.NextKeyMarker == key && page.NextUploadIDMarker == id {
			return n, nil
		}
		key, id = page.NextKeyMarker, page.NextUploadIDMarker
	}
}

// SignURL implements storage.Bucket.
func (b *bucket) SignURL(ctx context.Context, name string, ttl time.Duration) (string, error) {
	u, err := b.client.PresignedGetObject(ctx, b.name, name, ttl, nil)
	if err != nil {
		return "", b.failed("sign a URL of", name, err)
	}
	return u.String(), nil
}

// failed says what failed, where, and what to do; it has no credentials: those of
// a URL that was signed are left out.
func (b *bucket) failed(what, name string, err error) error {
	if err == nil {
		return nil
	}
	where := fmt.Sprintf("%s %s in %s", what, name, b.where)
	var answer minio.ErrorResponse
	if !errors.As(err, &answer) {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err
		}
		return fmt.Errorf("%s: %w", where, err)
	}
	switch answer.Code {
	case minio.NoSuchKey:
		return fmt.Errorf("%s: %w", where, storage.ErrNotFound)
	case minio.PreconditionFailed:
		return fmt.Errorf("%s: %w", where, storage.ErrExists)
	case "InvalidRange":
		return fmt.Errorf("%s: %w", where, storage.ErrRange)
	}
	return fmt.Errorf("%s: %s (%s, HTTP %d, request %s)%s", where, answer.Message, answer.Code, answer.StatusCode, answer.RequestID, advice(answer))
}

func advice(answer minio.ErrorResponse) string {
	switch answer.Code {
	case minio.NoSuchBucket:
		return ": create the bucket, or correct its name"
	case "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidTokenId", "ExpiredToken":
		return ": check the access key and the secret key"
	case "AccessDenied":
		return ": give these credentials the rights to read, write, delete and list in the bucket"
	case "RequestTimeTooSkewed":
		return ": set this machine's clock"
	}
	return ""
}
