package acr

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"

	"sluice/internal/remote"
	"sluice/internal/storage"
)

// secretKey is where the key lies that credentials of import sources are
// encrypted with: in the storage, not in the database. So whoever gets hold of
// the database or a dump of it has no credentials, while every replica can
// continue an import after a restart. Who can read the storage can read all
// images and sign any token anyway.
const (
	secretKey  = "registry/import-key"
	secretSize = 32 // AES-256
)

// seal encrypts a credential for the job of the given key, nowhere else to be
// opened. None gives nil.
func (h *Handler) seal(ctx context.Context, c remote.Credential, job string) ([]byte, error) {
	if c == (remote.Credential{}) {
		return nil, nil
	}
	box, err := h.box(ctx)
	if err != nil {
		return nil, err
	}
	plain, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	return box.Seal(nil, nil, plain, []byte(job)), nil
}

// unseal is the inverse of seal.
func (h *Handler) unseal(ctx context.Context, sealed []byte, job string) (c remote.Credential, err error) {
	if len(sealed) == 0 {
		return c, nil
	}
	box, err := h.box(ctx)
	if err != nil {
		return c, err
	}
	plain, err := box.Open(nil, nil, sealed, []byte(job))
	if err != nil {
		return c, fmt.Errorf("the import's credentials can't be decrypted: was %s in the storage replaced? Start the import again", secretKey)
	}
	err = json.Unmarshal(plain, &c)
	return c, err
}

// box returns the cipher of the registry's key, which is made if there is none.
func (h *Handler) box(ctx context.Context) (cipher.AEAD, error) {
	// Two replicas must not make one each.
	unlock, err := h.index.Exclude(ctx, secretKey)
	if err != nil {
		return nil, err
	}
	defer unlock()
	key, err := storage.ReadAll(ctx, h.store, secretKey, secretSize)
	if errors.Is(err, storage.ErrNotFound) {
		key = make([]byte, secretSize)
		rand.Read(key) // which never fails
		err = h.store.Put(ctx, secretKey, key)
	}
	if err != nil {
		return nil, fmt.Errorf("key for the credentials of imports: %w", err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("%s in the storage is damaged, delete it: %w", secretKey, err)
	}
	return cipher.NewGCMWithRandomNonce(block)
}
