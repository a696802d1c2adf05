package teleport

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"sluice/internal/durable"
	"sluice/oci"
)

// BlockSize is how many bytes of a disk each of its sums is about: what clients read,
// and check, at a time.
const BlockSize = 256 << 10

// Disk is an expanded layer.
type Disk struct {
	Layer  oci.Digest `json:"layer"`  // the blob in the registry
	DiffID oci.Digest `json:"diffID"` // of its tar

	// Size is the file's in bytes, Digest its SHA-256, and SumsDigest that of the
	// sums, which are the SHA-256 of its blocks of BlockSize bytes, 32 bytes each.
	Size       int64      `json:"size"`
	Digest     oci.Digest `json:"digest"`
	SumsDigest oci.Digest `json:"sumsDigest"`
	BlockSize  int64      `json:"blockSize"`

	// Name is the file's without .vhd, not part of the record.
	Name string `json:"-"`
}

// Paths returns where the disk and its sums are in the directory of a repository
// that has it: RepositoryDir.
func (d Disk) Paths() (disk, sums string) {
	return layersDir + "/" + d.Name + diskSuffix, layersDir + "/" + d.Name + sumsSuffix
}

const (
	poolDir    = "_layers"
	reposDir   = "repositories"
	layersDir  = "_layers"
	diskSuffix = ".vhd"
	sumsSuffix = ".sums"
	maxRecord  = 4096
)

// suffixes are those of a disk's files, in the order in which they appear.
func suffixes() []string { return []string{".json", sumsSuffix, diskSuffix} }

// share is the directory of disks.
type share struct{ dir string }

func (s share) pool() string { return filepath.Join(s.dir, poolDir) }

// reserve is how many bytes expansions leave free on the share, or a sixteenth of it if
// that is less. The file server's passwords are there as well, as a rule, and where
// they can't be changed nobody is let in any more, nor are containers that run.
const reserve = 64 << 20

// room returns an error if n more bytes don't leave as much free as they should.
func (s share) room(n int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil || st.Blocks == 0 {
		return err // some say nothing about their size
	}
	block := float64(st.Bsize)
	if float64(st.Bavail)*block-float64(n) < min(reserve, float64(st.Blocks)*block/16) {
		return &fs.PathError{Op: "write", Path: s.dir, Err: unix.ENOSPC}
	}
	return nil
}

// RepositoryDir returns the directory of a repository below that of the share,
// which is what its clients see.
func RepositoryDir(dir, repo string) string {
	return filepath.Join(dir, reposDir, filepath.FromSlash(repo))
}

func (s share) layers(repo string) string {
	return filepath.Join(RepositoryDir(s.dir, repo), layersDir)
}

// diskName returns the name of a layer's disk. below stands for the layers below
// it; it is empty where they don't matter.
func diskName(layer oci.Digest, below string) string {
	name := strings.ReplaceAll(layer.String(), ":", "-")
	if below != "" {
		name += "." + below
	}
	return name
}

// layerOf returns the layer that a file of the share belongs to.
func layerOf(name string) (oci.Digest, bool) {
	name, _, _ = strings.Cut(name, ".")
	d, err := oci.ParseDigest(strings.Replace(name, "-", ":", 1))
	return d, err == nil
}

// find returns a disk of a directory. That there is none is no error.
func find(dir, name string) (Disk, bool, error) {
	info, err := os.Stat(filepath.Join(dir, name+diskSuffix))
	if errors.Is(err, fs.ErrNotExist) {
		return Disk{}, false, nil
	}
	if err != nil {
		return Disk{}, false, err
	}
	file, err := os.Open(filepath.Join(dir, name+".json"))
	if errors.Is(err, fs.ErrNotExist) {
		return Disk{}, false, nil // somebody has removed a part of it
	}
	if err != nil {
		return Disk{}, false, err
	}
	defer file.Close()
	doc, err := io.ReadAll(io.LimitReader(file, maxRecord))
	if err != nil {
		return Disk{}, false, err
	}
	d := Disk{}
	if json.Unmarshal(doc, &d) != nil || d.Size != info.Size() || d.BlockSize != BlockSize {
		return Disk{}, false, nil // as before, or another version made it: it is made again
	}
	d.Name = name
	return d, true, nil
}

// give links a disk of the pool into a repository.
func (s share) give(name, repo string) error {
	dir := s.layers(repo)
	if err := durable.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := remove(dir, name); err != nil { // parts of another one
		return err
	}
	for _, suffix := range suffixes() {
		from, to := filepath.Join(s.pool(), name+suffix), filepath.Join(dir, name+suffix)
		err := durable.Link(from, to)
		if noLinks(err) {
			err = s.copyFile(from, to)
		}
		if err != nil {
			return fmt.Errorf("give %s the disk %s: %w", repo, name, err)
		}
	}
	return nil
}

// noLinks reports whether an error is that the file system has no hard links, or no
// more of them for this file.
func noLinks(err error) bool {
	for _, e := range []error{syscall.EPERM, syscall.EOPNOTSUPP, syscall.ENOSYS, syscall.EMLINK} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func (s share) copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err == nil {
		err = s.room(info.Size())
	}
	if err != nil {
		return err
	}
	out, err := durable.Create(filepath.Dir(to), 0o644)
	if err != nil {
		return err
	}
	defer out.Discard()
	if _, err := io.Copy(out, in); err != nil {
		return err
	}
	return out.Commit(to)
}

// remove removes the files of a disk, the disk itself first.
func remove(dir, name string) error {
	all := suffixes()
	for i := range all {
		if err := durable.Remove(filepath.Join(dir, name+all[len(all)-1-i])); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
