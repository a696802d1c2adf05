package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"sluice/internal/config"
	"sluice/internal/storage"
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
