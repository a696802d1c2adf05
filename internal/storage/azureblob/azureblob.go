// Package azureblob keeps objects in a container of Azure Blob Storage. Open
// returns the storage.Objects in it; this package is the storage.Bucket below.
//
// The container must exist, in a storage account without hierarchical namespace.
// An identity needs the role Storage Blob Data Contributor on it, and for signed
// URLs Storage Blob Delegator on the account. Large objects are block blobs whose
// blocks are staged as they come. Versioning of blobs is not wanted: it keeps what
// was deleted; soft deletion by the account does so for as long as it says.
//
// Azure takes a backslash in a name for a slash, and advises against names that
// end with a dot; keys should have neither.
package azureblob

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/streaming"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/bloberror"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blockblob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/service"

	"sluice/internal/storage"
)

// Options says where the container is.
type Options struct {
	// ServiceURL is the account's, such as https://ACCOUNT.blob.core.windows.net.
	// The credentials are those of the environment: a managed identity, a
	// workload identity, AZURE_CLIENT_ID and so on, or those of az login.
	ServiceURL string

	// ConnectionString has the account and its key, instead.
	ConnectionString string

	Container string
	Prefix    string // of all objects; see storage.ObjectsOptions

	// Identity is that of storage.ObjectsOptions.
	Identity func(key string) string
}

// retries bounds how often a request is sent again.
const retries = 4

// labelName is a name of metadata, which must be an identifier of C#.
const labelName = "sluice"

// Open returns the store in a container. It sends nothing: see Check.
func Open(_ context.Context, opts Options) (*storage.Objects, error) {
	if opts.Container == "" {
		return nil, errors.New("azure blob storage: the name of the container is missing")
	}
	if (opts.ServiceURL == "") == (opts.ConnectionString == "") {
		return nil, errors.New("azure blob storage: give either the URL of the account or a connection string")
	}
	common := policy.ClientOptions{
		Transport: &http.Client{Transport: storage.NewTransport()},
		Retry:     policy.RetryOptions{MaxRetries: retries, RetryDelay: 200 * time.Millisecond, MaxRetryDelay: 5 * time.Second},
	}
	b := &bucket{}
	if opts.ConnectionString != "" {
		client, err := service.NewClientFromConnectionString(opts.ConnectionString, &service.ClientOptions{ClientOptions: common})
		if err != nil {
			// Its text might quote the key.
			return nil, errors.New("azure blob storage: the connection string can't be used: copy it anew from the account's access keys")
		}
		b.service, b.signsByKey = client, true
	} else {
		u, err := url.Parse(opts.ServiceURL)
		if err != nil || u.Host == "" || u.RawQuery != "" || u.User != nil || u.Scheme != "https" {
			return nil, errors.New("azure blob storage: the URL of the account must be like https://ACCOUNT.blob.core.windows.net")
		}
		cred, err := azidentity.NewDefaultAzureCredential(&azidentity.DefaultAzureCredentialOptions{ClientOptions: common})
		if err != nil {
			return nil, fmt.Errorf("azure blob storage at %s: credentials: %w", opts.ServiceURL, err)
		}
		if b.service, err = service.NewClient(opts.ServiceURL, cred, &service.ClientOptions{ClientOptions: common}); err != nil {
			return nil, fmt.Errorf("azure blob storage at %s: %w", opts.ServiceURL, err)
		}
	}
	b.container = b.service.NewContainerClient(opts.Container)
	b.name = opts.Container
	b.where, _, _ = strings.Cut(b.container.URL(), "?") // what follows may be a signature
	return storage.NewObjects(b, storage.ObjectsOptions{Prefix: opts.Prefix, Identity: opts.Identity})
}

type bucket struct {
	service    *service.Client
	container  *container.Client
	name       string // of the container
	where      string
	signsByKey bool // URLs are signed by the account's key

	mu         sync.Mutex
	delegation delegation // guarded by mu
}

func (b *bucket) String() string { return b.where }

func (b *bucket) blob(name string) *blockblob.Client { return b.container.NewBlockBlobClient(name) }

// Get implements storage.Bucket.
func (b *bucket) Get(ctx context.Context, name string, offset, length int64) (io.ReadCloser, storage.BucketInfo, error) {
	r, err := b.blob(name).DownloadStream(ctx, &blob.DownloadStreamOptions{
		Range: blob.HTTPRange{Offset: offset, Count: max(length, 0)}, // 0 is all that follow
	})
	if err != nil {
		return nil, storage.BucketInfo{}, b.failed("get", name, err)
	}
	info := storage.BucketInfo{Size: value(r.ContentLength), Modified: value(r.LastModified), Label: label(r.Metadata)}
	if r.ContentRange != nil { // "bytes 0-9/SIZE"
		_, size, _ := strings.Cut(*r.ContentRange, "/")
		if info.Size, err = strconv.ParseInt(size, 10, 64); err != nil {
			r.Body.Close()
			return nil, info, b.failed("get", name, fmt.Errorf("its answer has the range %q", *r.ContentRange))
		}
	}
	// It goes on reading the same blob, by its ETag, when a connection breaks.
	return r.NewRetryReader(ctx, &blob.RetryReaderOptions{MaxRetries: retries}), info, nil
}

// label finds the label in metadata, whose names come back as HTTP headers do.
func label(metadata map[string]*string) string {
	for name, v := range metadata {
		if strings.EqualFold(name, labelName) {
			return value(v)
		}
	}
	return ""
}

func value[T any](p *T) T {
	if p == nil {
		var zero T
		return zero
	}
	return *p
}

// Head implements storage.Bucket.
func (b *bucket) Head(ctx context.Context, name string) (storage.BucketInfo, error) {
	r, err := b.blob(name).GetProperties(ctx, nil)
	if err != nil {
		return storage.BucketInfo{}, b.failed("look for", name, err)
	}
	return storage.BucketInfo{Size: value(r.ContentLength), Modified: value(r.LastModified), Label: label(r.Metadata)}, nil
}

// absent is the condition that there is no blob of the name.
func absent() *blob.AccessConditions {
	any := azcore.ETagAny
	return &blob.AccessConditions{ModifiedAccessConditions: &blob.ModifiedAccessConditions{IfNoneMatch: &any}}
}

// Put implements storage.Bucket.
func (b *bucket) Put(ctx context.Context, name string, data []byte, opts storage.BucketPut) error {
	var o blockblob.UploadOptions
	if opts.Label != "" {
		o.Metadata = map[string]*string{labelName: &opts.Label}
	}
	if opts.IfAbsent {
		o.AccessConditions = absent()
	}
	_, err := b.blob(name).Upload(ctx, streaming.NopCloser(bytes.NewReader(data)), &o)
	return b.failed("put", name, err)
}

// Delete implements storage.Bucket.
func (b *bucket) Delete(ctx context.Context, name string) error {
	_, err := b.blob(name).Delete(ctx, nil)
	if err = b.failed("delete", name, err); errors.Is(err, storage.ErrNotFound) {
		return nil
	}
	return err
}

// List implements storage.Bucket.
func (b *bucket) List(ctx context.Context, prefix, after, delimiter string) iter.Seq2[storage.BucketEntry, error] {
	return func(yield func(storage.BucketEntry, error) bool) {
		var start *string
		if after > prefix {
			start = &after // a service that doesn't know it lists all
		}
		next := b.pages(prefix, start, delimiter)
		for {
			blobs, prefixes, more, err := next(ctx)
			if err != nil {
				yield(storage.BucketEntry{}, b.failed("list", prefix, err))
				return
			}
			if !yieldPage(blobs, prefixes, after, yield) || !more {
				return
			}
		}
	}
}

// pages returns a function that returns a page of a listing at each call.
func (b *bucket) pages(prefix string, start *string, delimiter string) func(context.Context) ([]*container.BlobItem, []*container.BlobPrefix, bool, error) {
	if delimiter == "" {
		pager := b.container.NewListBlobsFlatPager(&container.ListBlobsFlatOptions{Prefix: &prefix, StartFrom: start})
		return func(ctx context.Context) ([]*container.BlobItem, []*container.BlobPrefix, bool, error) {
			page, err := pager.NextPage(ctx)
			if err != nil || page.Segment == nil {
				return nil, nil, false, err
			}
			return page.Segment.BlobItems, nil, pager.More(), nil
		}
	}
	pager := b.container.NewListBlobsHierarchyPager(delimiter, &container.ListBlobsHierarchyOptions{Prefix: &prefix, StartFrom: start})
	return func(ctx context.Context) ([]*container.BlobItem, []*container.BlobPrefix, bool, error) {
		page, err := pager.NextPage(ctx)
		if err != nil || page.Segment == nil {
			return nil, nil, false, err
		}
		return page.Segment.BlobItems, page.Segment.BlobPrefixes, pager.More(), nil
	}
}

// yieldPage yields the entries of a page, which come in two sorted lists, as one.
func yieldPage(blobs []*container.BlobItem, prefixes []*container.BlobPrefix, after string, yield func(storage.BucketEntry, error) bool) bool {
	for len(blobs) > 0 || len(prefixes) > 0 {
		var e storage.BucketEntry
		if len(prefixes) == 0 || len(blobs) > 0 && value(blobs[0].Name) < value(prefixes[0].Name) {
			e.Name = value(blobs[0].Name)
			if p := blobs[0].Properties; p != nil {
				e.Size, e.Modified = value(p.ContentLength), value(p.LastModified)
			}
			blobs = blobs[1:]
		} else {
			e.Name, prefixes = value(prefixes[0].Name), prefixes[1:]
		}
		if e.Name > after && !yield(e, nil) {
			return false
		}
	}
	return true
}

// BeginParts implements storage.Bucket. Blocks need no beginning.
func (b *bucket) BeginParts(context.Context, string) (string, error) { return "blocks", nil }

// PutPart implements storage.Bucket. The tag is the ID of a block, which is
// random so that nobody replaces it; all of one blob are of the same length.
func (b *bucket) PutPart(ctx context.Context, name, _ string, n int, data []byte) (string, error) {
	id := make([]byte, 24)
	rand.Read(id) // never fails
	tag := base64.StdEncoding.EncodeToString(id)
	_, err := b.blob(name).StageBlock(ctx, tag, streaming.NopCloser(bytes.NewReader(data)), nil)
	return tag, b.failed(fmt.Sprintf("put part %d of", n), name, err)
}

// CompleteParts implements storage.Bucket.
func (b *bucket) CompleteParts(ctx context.Context, name, _ string, tags []string) error {
	_, err := b.blob(name).CommitBlockList(ctx, tags, nil)
	return b.failed("complete", name, err)
}

// AbortParts implements storage.Bucket. There is no request for it, but an empty
// blob takes the place of blocks that aren't committed.
func (b *bucket) AbortParts(ctx context.Context, name, _ string) error {
	err := b.Put(ctx, name, nil, storage.BucketPut{IfAbsent: true})
	if errors.Is(err, storage.ErrExists) {
		return nil // they are committed
	}
	if err != nil {
		return err
	}
	return b.Delete(ctx, name)
}

// AbortPartsBefore implements storage.Bucket: Azure drops blocks after a week.
func (b *bucket) AbortPartsBefore(context.Context, string, time.Time) (int, error) { return 0, nil }

// failed says what failed, where, and what to do. It has no text of the library,
// which quotes URLs, and those may have a signature.
func (b *bucket) failed(what, name string, err error) error {
	if err == nil {
		return nil
	}
	where := fmt.Sprintf("%s %s in %s", what, name, b.where)
	var answer *azcore.ResponseError
	if !errors.As(err, &answer) {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err
		}
		return fmt.Errorf("%s: %w", where, err)
	}
	code := bloberror.Code(answer.ErrorCode)
	switch {
	case code == bloberror.BlobNotFound, code == "" && answer.StatusCode == http.StatusNotFound:
		return fmt.Errorf("%s: %w", where, storage.ErrNotFound)
	case code == bloberror.BlobAlreadyExists, code == bloberror.ConditionNotMet:
		return fmt.Errorf("%s: %w", where, storage.ErrExists)
	case code == bloberror.InvalidRange:
		return fmt.Errorf("%s: %w", where, storage.ErrRange)
	}
	request := ""
	if answer.RawResponse != nil {
		request = ", request " + answer.RawResponse.Header.Get("x-ms-request-id")
	}
	return fmt.Errorf("%s: %s (HTTP %d%s)%s", where, answer.ErrorCode, answer.StatusCode, request, advice(code))
}

func advice(code bloberror.Code) string {
	switch code {
	case bloberror.ContainerNotFound:
		return ": create the container, or correct its name"
	case bloberror.AuthenticationFailed:
		return ": check the account's key, or the identity, and this machine's clock"
	case bloberror.AuthorizationFailure, bloberror.AuthorizationPermissionMismatch:
		return ": give the identity the role Storage Blob Data Contributor, and look at the account's network rules"
	}
	return ""
}
