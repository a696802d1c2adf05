package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"sluice/internal/config"
	"sluice/internal/storage"
	"sluice/internal/storage/azureblob"
	"sluice/internal/storage/s3"
	"sluice/internal/stored"
)

// store is a place for images that a server can look after.
type store struct {
	maintained
	where string // "images in …", for people
}

type maintained interface {
	storage.Store
	storage.Maintainer
}

// openStore opens the configured storage.
func openStore(ctx context.Context, c *config.Registry) (store, error) {
	switch c.Storage.Kind {
	case config.StorageAzure:
		a := c.Storage.Azure
		opened, err := azureblob.Open(ctx, azureblob.Options{
			ServiceURL: a.ServiceURL, ConnectionString: a.ConnectionString.Value(), Container: a.Container,
			Prefix: a.Prefix, Identity: stored.BlobIdentity,
		})
		return store{opened, "images in container " + a.Container}, err
	case config.StorageS3:
		b := c.Storage.S3
		opened, err := s3.Open(ctx, s3.Options{
			Endpoint: b.Endpoint, Bucket: b.Bucket, Prefix: b.Prefix, Region: b.Region,
			AccessKey: b.AccessKey, SecretKey: b.SecretKey.Value(), Insecure: b.Insecure, Identity: stored.BlobIdentity,
		})
		return store{opened, "images in bucket " + b.Bucket + " of " + b.Endpoint}, err
	}
	local, err := openLocalStore(c.Data)
	return store{local, "images in " + c.Data}, err
}

func openLocalStore(dir string) (*storage.Local, error) {
	local, err := storage.OpenLocal(dir, storage.LocalOptions{Identity: stored.BlobIdentity})
	if errors.Is(err, storage.ErrLocked) {
		return nil, fmt.Errorf("%w: is another registry running on it? Choose another --data", err)
	}
	if errors.Is(err, os.ErrPermission) {
		return nil, fmt.Errorf("%w: choose another --data, or run as a user who may write there", err)
	}
	return local, err
}
