package cache

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"sluice/internal/config"
)

// Space is an amount of disk: bytes, or a share of the file system that the
// cache is on, whatever its size. The zero value is nothing.
type Space struct {
	Bytes   int64
	Percent float64 // instead of Bytes, if not 0
}

// ParseSpace parses "20%", "10GiB", "500MB" or a number of bytes.
func ParseSpace(text string) (Space, error) {
	text = strings.TrimSpace(text)
	if number, ok := strings.CutSuffix(text, "%"); ok {
		p, err := strconv.ParseFloat(number, 64)
		if err != nil || !(p >= 0 && p <= 100) {
			return Space{}, errors.New(`a share of the disk must lie between "0%" and "100%"`)
		}
		return Space{Percent: p}, nil
	}
	n, err := config.ParseSize(text)
	if err != nil {
		return Space{}, fmt.Errorf(`%w, or a share of the disk such as "20%%"`, err)
	}
	return Space{Bytes: int64(n)}, nil
}

// String is the reverse of ParseSpace.
func (s Space) String() string {
	if s.Percent != 0 {
		return strconv.FormatFloat(s.Percent, 'f', -1, 64) + "%"
	}
	return config.Size(s.Bytes).String()
}

// MarshalText and UnmarshalText let flags and JSON have a Space as text.
func (s Space) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText is ParseSpace.
func (s *Space) UnmarshalText(text []byte) (err error) {
	*s, err = ParseSpace(string(text))
	return err
}

// of returns the bytes that s is of a file system with total bytes.
func (s Space) of(total int64) int64 {
	if s.Percent != 0 {
		return int64(float64(total) * s.Percent / 100)
	}
	return s.Bytes
}

// disk is the size of a file system and what ordinary users' processes may
// still write to it, which is what df(1) and kubelet call available.
type disk struct{ total, free int64 }

func diskOf(dir string) (disk, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return disk{}, fmt.Errorf("size of the file system of %s: %w", dir, err)
	}
	return disk{total: int64(st.Blocks) * st.Bsize, free: int64(st.Bavail) * st.Bsize}, nil
}
