package teleport

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/remote"
	"sluice/internal/teleport/mountapi"
	"sluice/oci"
	"sluice/test/bed"
)

// stage is a registry and a file server.
type stage struct {
	t        *testing.T
	sluice   string
	registry *bed.Registry
	client   *remote.Registry
	samba    *bed.Samba
	box      bed.Toolbox
}

// newStage starts both; lifetime is that of credentials.
func newStage(t *testing.T, lifetime time.Duration) *stage {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for smbd and to mount")
	}
	ctx := t.Context()
	src, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	s := &stage{t: t}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	s.sluice, err = bed.BuildSluice(ctx, src, t.TempDir())
	check(err)
	s.box, err = bed.NewToolbox(ctx, filepath.Join(t.TempDir(), "image"), 7, 3<<20)
	check(err)
	dir := t.TempDir()
	s.samba, err = bed.StartFileServer(ctx, s.sluice, dir) // first: it finds the shares that come later
	check(err)
	t.Cleanup(func() { s.samba.Crash() }) // the one that runs then
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := os.ReadFile(s.samba.Log)
			t.Logf("smbd says:\n%s", log)
		}
	})
	s.registry, err = bed.StartRegistry(ctx, s.sluice, dir, append(bed.TeleportServer(s.samba.Address()),
		"SLUICE_REGISTRY_LOG_LEVEL=warn", "SLUICE_REGISTRY_TELEPORT_CREDENTIAL_LIFETIME="+lifetime.String())...)
	check(err)
	t.Cleanup(func() { s.registry.Stop() })
	s.client, err = remote.New(s.registry.Addr, remote.Options{})
	check(err)
	return s
}

// run runs the command line.
func (s *stage) run(args ...string) (string, error) {
	out, err := exec.CommandContext(s.t.Context(), s.sluice, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("sluice %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// expanded pushes the image to a repository that takes part, and waits until it can
// be mounted.
func (s *stage) expanded(repo string) mountapi.Mount {
	s.t.Helper()
	for _, args := range [][]string{
		{"import", "oci:" + s.box.Layout, s.registry.Addr + "/" + repo + ":v1"},
		{"repository", "update", "-r", s.registry.Addr, repo, "--teleport-enabled", "true"},
	} {
		if _, err := s.run(args...); err != nil {
			s.t.Fatal(err)
		}
	}
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		m, err := mountapi.Get(s.t.Context(), s.client, mountapi.Query{Repository: repo, Reference: "v1"})
		var coded *oci.Error
		switch {
		case err == nil:
			return m
		case !errors.As(err, &coded) || coded.Code != mountapi.CodeExpanding || time.Now().After(deadline):
			s.t.Fatal(err)
		}
	}
}

// status asks as the scripts of the original did.
func (s *stage) status(repo string) int {
	s.t.Helper()
	resp, err := http.Get("http://" + s.registry.Addr + "/mount/v1/" + repo + "/_manifests/v1")
	if err != nil {
		s.t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

// read copies a file of the share to a new one.
func (s *stage) read(m *mountapi.SMB, path string) (string, error) {
	s.t.Helper()
	name := filepath.Join(s.t.TempDir(), "copy")
	_, err := s.samba.Do(s.t.Context(), m.Share, m.Username, m.Password, "get "+path+" "+name)
	return name, err
}

// What the API says is where it says, with what it says, and is the image.
func TestDisksFromSamba(t *testing.T) {
	s := newStage(t, time.Hour)
	if _, err := s.run("import", "oci:"+s.box.Layout, s.registry.Addr+"/team/app:v1"); err != nil {
		t.Fatal(err)
	}
	if got := s.status("team/app"); got != http.StatusNotFound {
		t.Errorf("before Teleport is enabled: %d", got)
	}
	m := s.expanded("team/app")
	if got := s.status("team/app"); got != http.StatusOK {
		t.Errorf("then: %d", got)
	}
	if m.Format != mountapi.FormatVHD || m.SMB.Server != s.samba.Address() || len(m.Layers) != 3 {
		t.Fatalf("%+v", m)
	}
	lower := []string{t.TempDir()} // overlayfs wants two
	for _, l := range m.Layers {
		if l.URL != "smb://"+s.samba.Address()+"/"+m.SMB.Share+"/"+l.Path {
			t.Errorf("%+v of %+v", l, m.SMB)
		}
		name, err := s.read(m.SMB, l.Path)
		if err != nil {
			t.Fatal(err)
		}
		content, err := os.ReadFile(name)
		if err != nil || int64(len(content)) != l.Size || oci.DigestOf(content) != l.VHDDigest {
			t.Fatalf("%s has %d bytes, %v; the API says %+v", l.Path, len(content), err, l)
		}
		sums, err := s.read(m.SMB, l.Sums.Path)
		if err != nil {
			t.Fatal(err)
		}
		blocks, err := os.ReadFile(sums)
		first := sha256.Sum256(content[:min(int64(len(content)), l.Sums.BlockSize)])
		if err != nil || oci.DigestOf(blocks) != l.Sums.Digest || string(blocks[:32]) != string(first[:]) {
			t.Errorf("%s: %v", l.Sums.Path, err)
		}
		dir := t.TempDir()
		if out, err := exec.Command("mount", "-t", "erofs", "-o", "ro,loop", name, dir).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
		lower = append(lower, dir)
	}
	slices.Reverse(lower)
	root := t.TempDir()
	if err := unix.Mount("overlay", root, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(lower, ":")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(root, unix.MNT_DETACH) })
	for name, want := range s.box.Sums {
		f, err := os.Open(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		h := sha256.New()
		_, err = io.Copy(h, f)
		f.Close()
		if got := fmt.Sprintf("%x", h.Sum(nil)); err != nil || got != want {
			t.Errorf("%s: %s, %v; want %s", name, got, err, want)
		}
	}
	if out, err := exec.Command("chroot", root, "/bin/sh", "-c", "echo started").CombinedOutput(); err != nil || string(out) != "started\n" {
		t.Errorf("a shell of the image: %v: %s", err, out)
	}
	s.refusals(m, s.expanded("other"))
}

// refusals: nobody reads without the repository's credentials, nobody writes, and
// nobody does without SMB 3.1.1.
func (s *stage) refusals(m, other mountapi.Mount) {
	t, ctx, smb := s.t, s.t.Context(), m.SMB
	if _, err := s.read(other.SMB, other.Layers[0].Path); err != nil {
		t.Errorf("the other repository: %v", err)
	}
	for what, try := range map[string]func() (string, error){
		"a wrong password": func() (string, error) { return s.samba.Do(ctx, smb.Share, smb.Username, "wrong", "ls") },
		"another's credentials": func() (string, error) {
			return s.samba.Do(ctx, smb.Share, other.SMB.Username, other.SMB.Password, "ls")
		},
		"nobody":                     func() (string, error) { return s.samba.Do(ctx, smb.Share, "", "", "ls", "--no-pass") },
		"a share that doesn't exist": func() (string, error) { return s.samba.Do(ctx, "global", smb.Username, smb.Password, "ls") },
		"writing":                    func() (string, error) { return s.samba.Do(ctx, smb.Share, smb.Username, smb.Password, "mkdir new") },
		"deleting": func() (string, error) {
			return s.samba.Do(ctx, smb.Share, smb.Username, smb.Password, "del "+m.Layers[0].Path)
		},
		"SMB 3.0": func() (string, error) {
			return s.samba.Do(ctx, smb.Share, smb.Username, smb.Password, "ls", "--max-protocol=SMB3_02")
		},
	} {
		out, err := try()
		if err == nil && !strings.Contains(out, "NT_STATUS_ACCESS_DENIED") && !strings.Contains(out, "NT_STATUS_MEDIA_WRITE_PROTECTED") {
			t.Errorf("%s: allowed: %s", what, out)
		}
	}
	if out, err := s.samba.Do(ctx, smb.Share, smb.Username, smb.Password, "ls", "--max-protocol=SMB3_11"); err != nil {
		t.Errorf("after that: %v: %s", err, out)
	}
}

// Credentials are good as long as they say, not much longer, and there are others by
// then.
func TestCredentialsExpire(t *testing.T) {
	const lifetime = 10 * time.Second
	s := newStage(t, lifetime)
	ctx := t.Context()
	s.expanded("team/app")
	ask := func() mountapi.Mount {
		m, err := mountapi.Get(ctx, s.client, mountapi.Query{Repository: "team/app", Reference: "v1"})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	use := func(m mountapi.Mount) error {
		_, err := s.samba.Do(ctx, m.SMB.Share, m.SMB.Username, m.SMB.Password, "ls")
		return err
	}
	asked := time.Now()
	m := ask()
	if m.SMB.Expires.Sub(asked) < lifetime || time.Until(m.SMB.Expires) > 2*lifetime {
		t.Errorf("a credential that was asked for at %v is good until %v", asked, m.SMB.Expires)
	}
	for {
		began := time.Now()
		err := use(m)
		if left := time.Until(m.SMB.Expires); err != nil && left > 0 {
			t.Fatalf("%v before it expires: %v", left, err)
		}
		if late := began.Sub(m.SMB.Expires); err == nil && late > 3*lifetime {
			t.Fatalf("%v after it expired, it is good", late)
		}
		if err != nil {
			break
		}
		if !sleep(ctx, time.Second) {
			t.Fatal("the test's time is over")
		}
	}
	if err := use(ask()); err != nil {
		t.Errorf("another one: %v", err)
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}
