package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"sluice/internal/remote"
	"sluice/internal/transfer"
	"sluice/oci"
)

// importSource is an image to import.
type importSource struct {
	transfer.Source
	tag  string // by which the source has it, "" if by none
	same bool   // the target is a repository of the same registry
	end  func() // closes it
}

// openSource opens what SOURCE names.
func (c importConfig) openSource(ctx context.Context, from string, target oci.Reference, stdin io.Reader) (*importSource, error) {
	kind, rest := sourceKind(from)
	if kind == sourceRegistry {
		return c.registrySource(rest, target, stdin)
	}
	if c.username != "" {
		return nil, fmt.Errorf("--source-username is for registries, and %s is none", from)
	}
	var archive *transfer.Archive
	var err error
	var name, image string
	switch kind {
	case sourceStdin:
		archive, err = transfer.OpenStream(ctx, stdin, "standard input")
	case sourceLayout:
		if name, image, err = splitPath(rest); err == nil {
			archive, err = transfer.OpenLayout(ctx, name)
		}
	default:
		if name, image, err = splitPath(rest); err == nil {
			archive, err = transfer.OpenArchive(ctx, name)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("source: %w", err)
	}
	found, err := archive.Find(image)
	if err != nil {
		archive.Close()
		return nil, fmt.Errorf("source: %w", err)
	}
	s := &importSource{tag: found.Tag(), end: func() { archive.Close() }}
	s.Source = transfer.Source{Registry: archive, Repo: "archive", Reference: found.Descriptor.Digest.String()}
	if oci.CheckTag(image) == nil {
		s.tag = image
	}
	return s, nil
}

// The kinds of SOURCE.
const (
	sourceRegistry = "docker"
	sourceLayout   = "oci"
	sourceArchive  = "docker-archive"
	sourceStdin    = "-"
)

// sourceKind tells what SOURCE is, and returns it without its kind.
func sourceKind(from string) (kind, rest string) {
	if from == "-" {
		return sourceStdin, from
	}
	for prefix, kind := range map[string]string{
		"docker://": sourceRegistry, "oci:": sourceLayout, "oci-archive:": sourceLayout, "docker-archive:": sourceArchive,
	} {
		if rest, ok := strings.CutPrefix(from, prefix); ok {
			return kind, rest
		}
	}
	for _, prefix := range []string{"/", "./", "../"} {
		if strings.HasPrefix(from, prefix) {
			return sourceArchive, from
		}
	}
	if _, err := os.Stat(from); err == nil {
		return sourceArchive, from
	}
	return sourceRegistry, from
}

// splitPath splits PATH:NAME and PATH@DIGEST. Both parts may have colons: the
// longest PATH that exists is meant.
func splitPath(s string) (name, image string, err error) {
	for end := len(s); end > 0; end = strings.LastIndexAny(s[:end], ":@") {
		if _, err := os.Stat(s[:end]); err == nil {
			return s[:end], strings.TrimLeft(s[end:], ":@"), nil
		}
	}
	_, err = os.Stat(s)
	if err == nil {
		err = os.ErrNotExist
	}
	return "", "", err
}

// registrySource returns an image in a registry.
func (c importConfig) registrySource(from string, target oci.Reference, stdin io.Reader) (*importSource, error) {
	ref, err := oci.ParseReference(from)
	if err != nil {
		return nil, fmt.Errorf("source: %w (a file or directory needs to exist, or a / in front)", err)
	}
	opts := remote.Options{}
	if c.sourcePlainHTTP {
		opts.PlainHTTP = remote.PlainHTTPAlways
	}
	if c.username != "" {
		password, err := readPassword(stdin)
		if err != nil {
			return nil, err
		}
		opts.Credentials = func(_ context.Context, host string) (remote.Credential, error) {
			if host != ref.Registry {
				return remote.Credential{}, nil
			}
			return remote.Credential{Username: c.username, Password: password}, nil
		}
	}
	reg, err := remote.New(ref.Registry, opts)
	if err != nil {
		return nil, fmt.Errorf("source: %w", err)
	}
	return &importSource{
		Source: transfer.Source{Registry: reg, Repo: ref.Repository, Reference: ref.Target()},
		tag:    ref.Tag,
		same:   ref.Registry == target.Registry,
		end:    func() {},
	}, nil
}

// maxPassword bounds a password in bytes; tokens of some registries are long.
const maxPassword = 64 << 10

// readPassword reads a password from the first line of r.
func readPassword(r io.Reader) (string, error) {
	line, err := bufio.NewReader(io.LimitReader(r, maxPassword)).ReadString('\n')
	if err != nil && err != io.EOF {
		return "", fmt.Errorf("--source-password-stdin: %w", err)
	}
	password := strings.TrimRight(line, "\r\n")
	if password == "" {
		return "", errors.New("--source-password-stdin: there is no password on standard input")
	}
	return password, nil
}
