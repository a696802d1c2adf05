package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"sluice/internal/acr"
	"sluice/internal/remote"
	"sluice/oci"
)

func newArtifactStreamingCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "artifact-streaming",
		Short: "Make and manage the streaming artifacts of images",
		Long: `Make and manage the streaming artifacts of images.

IMAGE is HOST[:PORT]/REPOSITORY with :TAG or @DIGEST, REPOSITORY the same
without them. With --registry HOST[:PORT], which may also be a URL, both are
written without the host.

Credentials are docker's ("docker login") unless --username gives others.
Registries on the loopback interface are spoken to without TLS.`,
		RunE: group,
	}
	cmd.AddCommand(
		newArtifactStreamingCreateCommand(), newArtifactStreamingShowCommand(), newArtifactStreamingUpdateCommand(),
		newArtifactStreamingOperationCommand(), newArtifactStreamingListCommand(), newArtifactStreamingDeleteCommand(),
		newArtifactStreamingVerifyCommand(), newArtifactStreamingInspectCommand(), newArtifactStreamingWatchCommand(),
	)
	return cmd
}

// streamingFlags are those of every verb beneath artifact-streaming.
type streamingFlags struct {
	managementFlags
	imageFlag, repositoryFlag string
}

// addImage is for a verb that takes an image as an argument or by a flag.
func (f *streamingFlags) addImage(cmd *cobra.Command) {
	f.add(cmd)
	cmd.Flags().StringVarP(&f.imageFlag, "image", "t", "", "the `IMAGE`, instead of an argument")
}

// addRepository is for a verb that takes a repository as an argument or by a
// flag.
func (f *streamingFlags) addRepository(cmd *cobra.Command) {
	f.add(cmd)
	cmd.Flags().StringVar(&f.repositoryFlag, "repository", "", "the `REPOSITORY`, instead of an argument")
}

// place is a registry as these verbs see it: images, and their management.
type place struct {
	host   string
	images *remote.Registry
	manage *acr.Client
}

// name returns the name that the argument or the flag gives.
func name(args []string, flag, flagName, what string) (string, error) {
	switch {
	case len(args) == 1 && flag != "":
		return "", fmt.Errorf("name the %s either as an argument or by --%s, not both", what, flagName)
	case len(args) == 1:
		return args[0], nil
	case flag == "":
		return "", fmt.Errorf("which %s? Name it as an argument, or by --registry and --%s", what, flagName)
	}
	return flag, nil
}

// at returns the registry that --registry or the name's beginning says, and the
// rest of the name.
func (f *streamingFlags) at(cmd *cobra.Command, name string) (*place, string, error) {
	if err := f.parseRegistry(); err != nil {
		return nil, "", err
	}
	host, rest := f.registry, name
	if host == "" {
		first, after, found := strings.Cut(name, "/")
		if !found || !strings.ContainsAny(first, ".:") && first != "localhost" {
			return nil, "", fmt.Errorf("%s names no registry: write HOST[:PORT]/%s, or add --registry HOST[:PORT]", name, name)
		}
		host, rest = first, after
	}
	p, err := f.open(cmd, host)
	return p, strings.TrimPrefix(rest, host+"/"), err
}

// parseRegistry turns a URL in --registry into a host.
func (f *streamingFlags) parseRegistry() error {
	host := f.registry
	if rest, ok := strings.CutPrefix(host, "http://"); ok {
		host, f.plainHTTP = rest, true
	}
	f.registry = strings.TrimSuffix(strings.TrimPrefix(host, "https://"), "/")
	if strings.Contains(f.registry, "/") {
		return fmt.Errorf("--registry %s: a registry is HOST[:PORT]; write the repository's name with the image", host)
	}
	return nil
}

func (f *streamingFlags) open(cmd *cobra.Command, host string) (*place, error) {
	opts, err := f.connection(cmd)
	if err != nil {
		return nil, err
	}
	opts.Transport = remote.NewTransport()
	p := &place{host: host}
	if p.images, err = remote.New(host, opts); err != nil {
		return nil, err
	}
	p.manage, err = acr.NewClient(host, opts)
	return p, err
}

// image returns the image that the verb is to deal with, and its registry.
func (f *streamingFlags) image(cmd *cobra.Command, args []string) (*place, oci.Reference, error) {
	name, err := name(args, f.imageFlag, "image", "image")
	if err != nil {
		return nil, oci.Reference{}, err
	}
	p, rest, err := f.at(cmd, name)
	if err != nil {
		return nil, oci.Reference{}, err
	}
	// A host without a dot is one here, unlike in a reference as docker reads it.
	ref, err := oci.ParseReference("registry.invalid/" + rest)
	if err != nil {
		return nil, ref, fmt.Errorf("image %q: write REPOSITORY:TAG or REPOSITORY@DIGEST: %w", name, err)
	}
	ref.Registry = p.host
	return p, ref, nil
}

// repository returns the repository that the verb is to deal with, and its
// registry.
func (f *streamingFlags) repository(cmd *cobra.Command, args []string) (*place, string, error) {
	name, err := name(args, f.repositoryFlag, "repository", "repository")
	if err != nil {
		return nil, "", err
	}
	p, repo, err := f.at(cmd, name)
	if err == nil && strings.ContainsAny(repo, ":@") {
		err = fmt.Errorf("%s: a repository has no tag and no digest; leave them away", name)
	}
	if err == nil {
		err = oci.CheckRepository(repo)
	}
	return p, repo, err
}

// withCode puts the error's code in front, by which documentation is searched.
func withCode(err error) error {
	var coded *oci.Error
	if errors.As(err, &coded) && coded.Code != "" {
		return fmt.Errorf("%s: %w", coded.Code, err)
	}
	return err
}

// interrupted is the exit code of a program that ended by ^C, as shells have it.
const interrupted = 130

func parsePlatforms(list []string) ([]oci.Platform, error) {
	var platforms []oci.Platform
	for _, s := range list {
		parts := strings.Split(s, "/")
		if len(parts) < 2 || len(parts) > 3 || parts[0] == "" || parts[1] == "" {
			return nil, fmt.Errorf("--platform %q: write OS/ARCHITECTURE, or OS/ARCHITECTURE/VARIANT", s)
		}
		p := oci.Platform{OS: parts[0], Architecture: parts[1]}
		if len(parts) == 3 {
			p.Variant = parts[2]
		}
		platforms = append(platforms, p)
	}
	return platforms, nil
}

func platformName(p oci.Platform) string {
	s := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		s += "/" + p.Variant
	}
	return s
}

// shortDigest returns as much of a digest as people compare.
func shortDigest(d oci.Digest) string { return string(d)[:min(len(d), len("sha256:")+12)] }
