package bed

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
)

// MinIO is a server of the S3 protocol on a directory.
type MinIO struct {
	*Process
	Addr                 string // HOST:PORT, plain HTTP
	AccessKey, SecretKey string
	dir                  string
}

var minioTool = tool{
	module:   "minio",
	packages: []string{"github.com/minio/minio"},
	env:      []string{"CGO_ENABLED=0"},
}

// StartMinIO starts an empty MinIO whose data and log lie in dir, built from
// its module unless it is cached. It ends by Stop or Kill, or with this
// process. src is the checkout of Sluice; say tells a person what takes long.
func StartMinIO(ctx context.Context, src, dir string, say func(string)) (*MinIO, error) {
	bin, err := minioTool.build(ctx, src, say)
	if err != nil {
		return nil, err
	}
	addr, err := freeAddress()
	if err != nil {
		return nil, err
	}
	m := &MinIO{Addr: addr, AccessKey: "sluice", SecretKey: "sluice-test-bed", dir: filepath.Join(dir, "minio")}
	if err := os.MkdirAll(m.dir, 0o755); err != nil {
		return nil, err
	}
	env := []string{
		"MINIO_ROOT_USER=" + m.AccessKey, "MINIO_ROOT_PASSWORD=" + m.SecretKey,
		"MINIO_BROWSER=off", "MINIO_UPDATE=off", "MINIO_CALLHOME_ENABLE=off",
	}
	if m.Process, err = Start(dir, "minio", env, filepath.Join(bin, "minio"), "server", "--quiet", "--address", addr, m.dir); err != nil {
		return nil, err
	}
	// It reports its health before it can tell who may do what.
	if err := m.AwaitHTTP(ctx, "http://"+addr+"/", http.StatusForbidden); err != nil {
		m.Kill()
		return nil, err
	}
	return m, nil
}

// NewBucket makes an empty bucket: to a MinIO on one directory, a bucket is a
// directory in it.
func (m *MinIO) NewBucket(name string) error {
	return os.Mkdir(filepath.Join(m.dir, name), 0o755)
}

// RegistryEnv makes a registry store in a bucket.
func (m *MinIO) RegistryEnv(bucket string) []string {
	return []string{
		"SLUICE_REGISTRY_STORAGE_KIND=s3", "SLUICE_REGISTRY_STORAGE_S3_ENDPOINT=" + m.Addr, "SLUICE_REGISTRY_STORAGE_S3_INSECURE=true",
		"SLUICE_REGISTRY_STORAGE_S3_BUCKET=" + bucket, "SLUICE_REGISTRY_STORAGE_S3_ACCESS_KEY=" + m.AccessKey,
		"SLUICE_REGISTRY_STORAGE_S3_SECRET_KEY=" + m.SecretKey,
	}
}
