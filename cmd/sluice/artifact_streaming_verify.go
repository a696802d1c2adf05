package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"sluice/cmd/internal/program"
	"sluice/cmd/internal/progress"
	"sluice/internal/artifact"
	"sluice/internal/blob"
	"sluice/internal/human"
	"sluice/oci"
)

// verified is what `verify` tells of an artifact.
type verified struct {
	Platform string     `json:"platform"`
	Artifact oci.Digest `json:"artifact"`
	Layers   int        `json:"layers"`
	Devices  int        `json:"devices"`
	Chunks   int        `json:"chunks"`
	Bytes    int64      `json:"bytes"`           // of all devices' content
	Files    int        `json:"files,omitempty"` // compared in a mount
	Seconds  float64    `json:"seconds"`
	Error    string     `json:"error,omitempty"`
}

func newArtifactStreamingVerifyCommand() *cobra.Command {
	var f streamingFlags
	var mount bool
	cmd := &cobra.Command{
		Use:   "verify IMAGE",
		Short: "Prove that the streaming artifacts of an image are what they should be",
		Long: `Prove that the streaming artifacts of an image are what they should be.

All of each artifact is downloaded and decoded: the layers' tars must have the
diff IDs that the image's config says, and the metadata must be what those tars
give. As root on Linux 6.12 or later the artifact is also mounted, and every file
compared with the image's original layers, which are downloaded for that.`,
		Example: `  sluice artifact-streaming verify registry.example.com/team/app:v1`,
		Args:    arguments(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, ref, err := f.image(cmd, args)
			if err != nil {
				return err
			}
			v := verifier{reg: p.images, ref: ref, stderr: cmd.ErrOrStderr()}
			v.must = cmd.Flags().Changed("mount")
			if mount {
				v.mount = mountVerifier(&f, p)
			}
			all, err := v.run(cmd.Context())
			if err != nil {
				return err
			}
			if err := f.print(cmd.OutOrStdout(), all, func(w io.Writer) { printVerified(w, all) }); err != nil {
				return err
			}
			for _, a := range all {
				if a.Error != "" {
					return fmt.Errorf("%s: a streaming artifact is not what it should be: delete it with `sluice artifact-streaming delete`, and make it anew", ref)
				}
			}
			return nil
		},
	}
	f.addImage(cmd)
	cmd.Flags().BoolVar(&mount, "mount", os.Geteuid() == 0, "also mount each artifact and compare every file")
	return noFiles(cmd)
}

func printVerified(w io.Writer, all []verified) {
	fmt.Fprintln(w, "PLATFORM\tARTIFACT\tLAYERS\tCHUNKS\tCONTENT\tFILES\tTIME\tRESULT")
	for _, a := range all {
		result, files := "as it should be", "-"
		if a.Error != "" {
			result = a.Error
		}
		if a.Files > 0 {
			files = fmt.Sprint(a.Files)
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%s\t%s\t%v\t%s\n", a.Platform, shortDigest(a.Artifact), a.Layers, a.Chunks, human.Bytes(a.Bytes), files,
			time.Duration(a.Seconds*float64(time.Second)).Round(100*time.Millisecond), result)
	}
}

// verifier verifies the artifacts of one image.
type verifier struct {
	reg    oci.Registry
	ref    oci.Reference
	stderr io.Writer

	// mount, if set, compares an artifact that is mounted with the image, and
	// returns how many files it compared. must says that it's an error if that
	// can't be done here.
	mount func(context.Context, *verifier, *streamed) (files int, err error)
	must  bool
}

func (v *verifier) run(ctx context.Context) ([]verified, error) {
	_, found, err := findArtifacts(ctx, v.reg, v.ref.Repository, v.ref.Target())
	if err != nil {
		return nil, err
	}
	var all []verified
	for _, s := range found {
		if s.parsed == nil {
			if s.format != "" {
				fmt.Fprintf(v.stderr, "%s is a streaming artifact of format %q, of which nothing is known\n", s.artifact.Digest, s.format)
			}
			continue
		}
		a := verified{Platform: platformName(s.platform), Artifact: s.artifact.Digest}
		start := time.Now()
		err := v.artifact(ctx, s, &a)
		a.Seconds = time.Since(start).Seconds()
		if ctx.Err() != nil {
			return nil, &program.CodedError{Err: errors.New("interrupted: not everything has been verified"), Code: interrupted}
		}
		if err != nil {
			a.Error = err.Error()
		}
		all = append(all, a)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%s has no streaming artifact to verify", v.ref)
	}
	return all, nil
}

// artifact verifies one.
func (v *verifier) artifact(ctx context.Context, s *streamed, a *verified) error {
	if s.image.Digest == s.parsed.Subject.Digest && s.manifest.Config.Digest != "" && s.parsed.Config.Digest != s.manifest.Config.Digest {
		return fmt.Errorf("its config is %s, the image's is %s", s.parsed.Config.Digest, s.manifest.Config.Digest)
	}
	config, err := readBlob(ctx, v.reg, v.ref.Repository, s.parsed.Config)
	if err != nil {
		return err
	}
	watch := newVerifyProgress(s, v.stderr)
	defer watch.close()
	report, err := artifact.Verify(ctx, s.parsed, config, func(desc oci.Descriptor) blob.Source {
		src := blob.Retry(blob.FromRegistry(v.reg, v.ref.Repository, desc), blob.RetryOptions{Total: 24 * time.Hour})
		return &watchedSource{Source: src, count: watch.count}
	})
	a.Layers, a.Devices, a.Chunks, a.Bytes = report.Layers, report.Devices, report.Chunks, report.Bytes
	if err != nil {
		return err
	}
	watch.end()
	if v.mount == nil {
		return nil
	}
	var not *cannotMount
	a.Files, err = v.mount(ctx, v, s)
	if errors.As(err, &not) && !v.must {
		fmt.Fprintf(v.stderr, "%s: not mounted and compared: %v\n", platformName(s.platform), err)
		return nil
	}
	return err
}

// readBlob reads a small blob whole, verified.
func readBlob(ctx context.Context, reg oci.Reader, repo string, desc oci.Descriptor) ([]byte, error) {
	r, err := reg.GetBlob(ctx, repo, desc.Digest)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(oci.VerifyReader(r, desc))
}

// verifyProgress shows how much of an artifact has been read.
type verifyProgress struct {
	mu   sync.Mutex // guards all below
	show progress.Progress
	step progress.Step
	last time.Time
}

func newVerifyProgress(s *streamed, stderr io.Writer) *verifyProgress {
	layers, metadata := s.sizes()
	if s.parsed.BootPack != nil {
		metadata += s.parsed.BootPack.Size
	}
	p := &verifyProgress{show: progress.New(stderr), step: progress.Step{
		Name: platformName(s.platform), Verb: "verifying", Ended: "verified", Parts: plural(len(s.parsed.Layers), "layer"), Size: layers + metadata,
		Label: "artifact", Single: true, Total: layers + metadata,
	}}
	return p
}

// count counts what has been read.
func (p *verifyProgress) count(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.step.Done = min(p.step.Done+int64(n), p.step.Total)
	if now := time.Now(); now.Sub(p.last) > 100*time.Millisecond {
		p.last = now
		p.show.Show(p.step)
	}
}

// end shows that everything was read and right.
func (p *verifyProgress) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.step
	s.Complete = true
	p.show.Show(s)
}

func (p *verifyProgress) close() { p.show.Close() }

// watchedSource counts the bytes that pass.
type watchedSource struct {
	blob.Source
	count func(n int)
}

func (s *watchedSource) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	r, err := s.Source.ReadRange(ctx, off, n)
	if err != nil {
		return nil, err
	}
	return &watchedReader{r, s.count}, nil
}

type watchedReader struct {
	io.ReadCloser
	count func(n int)
}

func (r *watchedReader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	r.count(n)
	return n, err
}
