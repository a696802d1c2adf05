package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"sluice/cmd/internal/progress"
	"sluice/internal/human"
	"sluice/internal/remote"
	"sluice/internal/transfer"
	"sluice/oci"
)

// importConfig is the flags of `sluice import`.
type importConfig struct {
	tags, platforms            []string
	referrers, streaming       bool
	username                   string
	passwordStdin              bool
	plainHTTP, sourcePlainHTTP bool
	jobs                       int
	dryRun                     bool
	output                     string
}

func newImportCommand() *cobra.Command {
	var c importConfig
	cmd := &cobra.Command{
		Use:   "import SOURCE TARGET",
		Short: "Copy an image into a registry, from another, a directory or a tar",
		Long: `Copy an image into a registry, from another, a directory or a tar.

SOURCE is one of
  HOST/REPOSITORY:TAG or @DIGEST   an image in a registry
  oci:DIR[:NAME|@DIGEST]           an OCI image layout
  oci-archive:FILE[:NAME|@DIGEST]  a tar of one
  docker-archive:FILE[:NAME]       what "docker save" or "podman save" wrote
  DIR or FILE                      any of these three with only one image
  -                                a tar on standard input

TARGET is HOST[:PORT]/REPOSITORY[:TAG]. Without a tag the image gets the
source's; with --tag those named.

All platforms of an image are copied. With one --platform the target gets that
platform's image itself; with several, an index of these, whose digest is not
that of the original. What the target has already is not copied again. An import
that was interrupted goes on where it stopped when the same command is run again.

Credentials are docker's ("docker login"). Registries on the loopback interface
are spoken to without TLS.`,
		Example: `  sluice import debian:12 registry.example.com/base/debian
  docker save app:v1 | sluice import - registry.example.com/team/app:v1
  sluice import oci:./layout:v1 127.0.0.1:5000/team/app --tag v1 --tag latest`,
		Args: arguments(2, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.run(cmd.Context(), args[0], args[1], cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&c.tags, "tag", nil, "set `TAG` in the target; may be repeated")
	f.StringSliceVar(&c.platforms, "platform", nil, "copy only `PLATFORM`, as linux/arm64 or linux/arm/v7;\nmay be repeated (default all)")
	f.BoolVar(&c.referrers, "referrers", false, "copy signatures, attestations and SBOMs, too")
	f.BoolVar(&c.streaming, "streaming-artifacts", false, "with --referrers, copy streaming artifacts, too, which\nthe target must allow")
	f.StringVar(&c.username, "source-username", "", "`NAME` at the source's registry")
	f.BoolVar(&c.passwordStdin, "source-password-stdin", false, "read the password for it from standard input")
	f.BoolVar(&c.plainHTTP, "plain-http", false, "speak HTTP without TLS with any target")
	f.BoolVar(&c.sourcePlainHTTP, "source-plain-http", false, "speak HTTP without TLS with any source")
	f.IntVar(&c.jobs, "jobs", 0, "copy `N` blobs at once (default 4)")
	f.BoolVar(&c.dryRun, "dry-run", false, "only say what would be copied")
	f.StringVarP(&c.output, "output", "o", "table", "print a `FORMAT`: table or json")
	cmd.MarkFlagsRequiredTogether("source-username", "source-password-stdin")
	return cmd
}

func (c importConfig) run(ctx context.Context, from, to string, stdin io.Reader, stdout, stderr io.Writer) error {
	if c.output != "table" && c.output != "json" {
		return fmt.Errorf("--output %q: table or json", c.output)
	}
	platforms, err := parsePlatforms(c.platforms)
	if err != nil {
		return err
	}
	target, err := importTarget(to)
	if err != nil {
		return err
	}
	source, err := c.openSource(ctx, from, target, stdin)
	if err != nil {
		return err
	}
	defer source.end()
	dst, err := c.target(target, source)
	if err != nil {
		return err
	}
	show := progress.New(stderr)
	opts := transfer.Options{
		Platforms: platforms, Referrers: c.referrers, Streaming: c.streaming, SameRegistry: source.same, Jobs: c.jobs,
		StateDir: stateDir(), DryRun: c.dryRun,
		Log: slog.New(slog.NewTextHandler(show, &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
	if !c.dryRun {
		opts.Progress = (&importProgress{name: target.Repository, show: show.Show}).update
	}
	result, err := transfer.Copy(ctx, dst, source.Source, opts)
	show.Close()
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("interrupted: %s is not complete in the target, and none of its tags has been set; run the same command again to go on", from)
	}
	if err != nil {
		return fmt.Errorf("%s was not imported: %w", from, withCode(err))
	}
	for _, note := range result.Notes {
		fmt.Fprintln(stderr, note)
	}
	if len(dst.Tags) == 0 {
		fmt.Fprintln(stderr, "The source has no tag, and none was named: the image can be pulled by its digest. Name tags with --tag.")
	}
	target.Tag = ""
	if c.output == "json" {
		return printImportJSON(stdout, target, result, c.dryRun)
	}
	return printImport(stdout, target, result, c.dryRun)
}

// stateDir returns where unfinished uploads are remembered, or "" if the user
// has no such place.
func stateDir() string {
	dir, err := os.UserCacheDir()
	if err != nil {
		return ""
	}
	return filepath.Join(dir, "sluice", "import")
}

// importTarget parses TARGET. Its Tag is empty if it has none.
func importTarget(to string) (oci.Reference, error) {
	host, _, found := strings.Cut(to, "/")
	if !found || !strings.ContainsAny(host, ".:") && host != "localhost" {
		return oci.Reference{}, fmt.Errorf("target %q names no registry: write HOST[:PORT]/REPOSITORY[:TAG]", to)
	}
	ref, err := oci.ParseReference(to)
	if err != nil {
		return ref, fmt.Errorf("target: %w", err)
	}
	if ref.Digest != "" {
		return ref, fmt.Errorf("target %q: the digest is the image's; write HOST[:PORT]/REPOSITORY[:TAG]", to)
	}
	if !strings.HasSuffix(to, ":"+ref.Tag) {
		ref.Tag = ""
	}
	return ref, nil
}

// importChunk is how many bytes an upload sends in one request, which each of
// the blobs under way holds in memory about twice.
const importChunk = 4 << 20

// target returns where the image is copied to.
func (c importConfig) target(ref oci.Reference, source *importSource) (transfer.Target, error) {
	opts := remote.Options{ChunkSize: importChunk}
	if c.plainHTTP {
		opts.PlainHTTP = remote.PlainHTTPAlways
	}
	reg, err := remote.New(ref.Registry, opts)
	if err != nil {
		return transfer.Target{}, fmt.Errorf("target: %w", err)
	}
	tags := c.tags
	if ref.Tag != "" {
		tags = append([]string{ref.Tag}, tags...)
	}
	if len(tags) == 0 && source.tag != "" {
		tags = []string{source.tag}
	}
	return transfer.Target{Registry: reg, Repo: ref.Repository, Tags: tags, Name: ref.Registry}, nil
}

// importProgress shows a copy as a work whose parts are the blobs. What needn't
// be copied counts as no bytes, so that rate and time left are of the rest.
type importProgress struct {
	name    string
	show    func(progress.Step)
	skipped int64
}

func (i *importProgress) update(p transfer.Progress) {
	s := progress.Step{Name: i.name, Verb: "copying", Ended: "copied", Parts: plural(p.Blobs, "blob")}
	switch p.Stage {
	case transfer.StageBlobs:
		if p.Number < 0 {
			break
		}
		s.Label, s.Part, s.Done, s.Total = shortDigest(p.Blob.Digest), p.Number, p.Done, p.Blob.Size
		switch p.State {
		case transfer.Skipped, transfer.Mounted:
			i.skipped += p.Blob.Size
			s.Done, s.Total = 0, 0
			fallthrough
		case transfer.Copied:
			s.Finished = true
		}
	case transfer.StageDone:
		s.Complete = true
	}
	s.Size = p.Size - i.skipped
	i.show(s)
}

// platformsText lists platforms for people.
func platformsText(list []oci.Platform) string {
	var names []string
	for _, p := range list {
		names = append(names, platformName(p))
	}
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ",")
}

// printImport prints what has been imported as a table.
func printImport(w io.Writer, target oci.Reference, r transfer.Result, dry bool) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if dry {
		fmt.Fprintln(t, "BLOB\tSIZE\tWOULD BE")
		for _, b := range r.Blobs {
			fmt.Fprintf(t, "%s\t%s\t%s\n", shortDigest(b.Digest), human.Bytes(b.Size), b.State)
		}
		if err := t.Flush(); err != nil {
			return err
		}
		fmt.Fprintln(w)
	}
	copied, bytes := r.Count(transfer.Copied)
	skipped, _ := r.Count(transfer.Skipped)
	mounted, _ := r.Count(transfer.Mounted)
	fmt.Fprintln(t, "IMAGE\tTAGS\tDIGEST\tPLATFORMS\tMANIFESTS\tCOPIED\tSKIPPED\tMOUNTED\tBYTES\tTIME\tRATE")
	tags := strings.Join(r.Tags, ",")
	if tags == "" {
		tags = "none"
	}
	took, rate := r.Duration.Round(100_000_000).String(), human.Bytes(rateOf(r))+"/s"
	if dry {
		took, rate = "dry run", "-"
	}
	fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t%d\t%d\t%d\t%s\t%s\t%s\n", target.String(), tags, shortDigest(r.Root.Digest), platformsText(r.Platforms),
		r.Manifests, copied, skipped, mounted, human.Bytes(bytes), took, rate)
	return t.Flush()
}

// rateOf returns how many bytes a second were copied.
func rateOf(r transfer.Result) int64 {
	_, bytes := r.Count(transfer.Copied)
	return int64(float64(bytes) / max(r.Duration.Seconds(), 0.001))
}

// printImportJSON prints what has been imported for programs.
func printImportJSON(w io.Writer, target oci.Reference, r transfer.Result, dry bool) error {
	type blob struct {
		Digest oci.Digest     `json:"digest"`
		Size   int64          `json:"size"`
		State  transfer.State `json:"state"`
	}
	type count struct {
		Blobs int   `json:"blobs"`
		Bytes int64 `json:"bytes"`
	}
	doc := struct {
		Image            string     `json:"image"`
		Tags             []string   `json:"tags"`
		Moved            []string   `json:"movedTags"`
		Digest           oci.Digest `json:"digest"`
		MediaType        string     `json:"mediaType"`
		Platforms        []string   `json:"platforms"`
		Manifests        int        `json:"manifests"`
		ManifestsSkipped int        `json:"manifestsSkipped"`
		Referrers        int        `json:"referrers"`
		Copied           count      `json:"copied"`
		Skipped          count      `json:"skipped"`
		Mounted          count      `json:"mounted"`
		Seconds          float64    `json:"seconds"`
		BytesPerSecond   int64      `json:"bytesPerSecond"`
		DryRun           bool       `json:"dryRun,omitempty"`
		Notes            []string   `json:"notes,omitempty"`
		Blobs            []blob     `json:"blobs"`
	}{
		Image: target.String(), Tags: append([]string{}, r.Tags...), Moved: append([]string{}, r.Moved...), Digest: r.Root.Digest, MediaType: r.Root.MediaType, Platforms: []string{},
		Manifests: r.Manifests, ManifestsSkipped: r.ManifestsSkipped, Referrers: r.Referrers,
		Seconds: r.Duration.Seconds(), BytesPerSecond: rateOf(r), DryRun: dry, Notes: r.Notes, Blobs: []blob{},
	}
	for _, p := range r.Platforms {
		doc.Platforms = append(doc.Platforms, platformName(p))
	}
	doc.Copied.Blobs, doc.Copied.Bytes = r.Count(transfer.Copied)
	doc.Skipped.Blobs, doc.Skipped.Bytes = r.Count(transfer.Skipped)
	doc.Mounted.Blobs, doc.Mounted.Bytes = r.Count(transfer.Mounted)
	for _, b := range r.Blobs {
		doc.Blobs = append(doc.Blobs, blob{b.Digest, b.Size, b.State})
	}
	return printJSON(w, doc)
}
