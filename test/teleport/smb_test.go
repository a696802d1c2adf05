package teleport

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice/internal/index"
	"sluice/internal/node/smb"
	"sluice/internal/node/smb/smbtest"
	"sluice/internal/storage"
	"sluice/internal/teleport"
	"sluice/internal/teleport/samba"
	"sluice/test/bed"
)

const repository = "team/app"

// shareServer is a smbd, configured as the registry has it configured, with the share of
// one repository.
type shareServer struct {
	t      *testing.T
	samba  *bed.Samba
	keeper *samba.Keeper
	dir    string // of the repository
	share  func(o smb.Options) smb.Share
}

func newShareServer(t *testing.T, lifetime time.Duration) *shareServer {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for smbd")
	}
	disks := t.TempDir()
	kept := filepath.Join(disks, "_samba")
	s := &shareServer{t: t, dir: teleport.RepositoryDir(disks, repository), share: func(o smb.Options) smb.Share { return smb.NewClient(o) }}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	db, err := index.Open(t.Context(), index.Options{URL: "sqlite::memory:"})
	check(err)
	t.Cleanup(func() { db.Close() })
	s.keeper, err = samba.Open(t.Context(), new(storage.Memory), db, samba.Options{
		Dir: kept, Disks: disks, Lifetime: lifetime, Log: slog.New(slog.DiscardHandler),
		Enabled: func(context.Context) ([]string, error) { return []string{repository}, nil },
	})
	check(err)
	check(os.MkdirAll(s.dir, 0o755))
	check(s.keeper.Write(t.Context()))
	s.samba, err = bed.StartSamba(t.Context(), t.TempDir(), kept, func(port, state string) (string, error) {
		return samba.Global(samba.GlobalOptions{Dir: kept, Port: portNumber(port), State: state}), nil
	})
	check(err)
	t.Cleanup(func() {
		s.samba.Crash()
		if t.Failed() {
			log, _ := os.ReadFile(s.samba.Log)
			t.Logf("smbd says:\n%s", log)
		}
	})
	return s
}

func portNumber(port string) (n int) {
	for _, digit := range port {
		n = n*10 + int(digit-'0')
	}
	return n
}

func (s *shareServer) check(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *shareServer) Put(path string, content []byte) {
	s.t.Helper()
	name := filepath.Join(s.dir, filepath.FromSlash(path))
	s.check(os.MkdirAll(filepath.Dir(name), 0o755))
	s.check(os.WriteFile(name+".new", content, 0o644))
	s.check(os.Rename(name+".new", name))
}

func (s *shareServer) Truncate(path string, size int64) {
	s.t.Helper()
	s.check(os.Truncate(filepath.Join(s.dir, filepath.FromSlash(path)), size))
}

func (s *shareServer) Login() smb.Login {
	s.t.Helper()
	c, err := s.keeper.Credential(s.t.Context(), repository)
	s.check(err)
	return smb.Login{Server: s.samba.Address(), Share: c.Share, Username: c.Username, Password: c.Password, Expires: c.Expires}
}

func (s *shareServer) Stop()                         { s.samba.Crash() }
func (s *shareServer) Start()                        { s.t.Helper(); s.check(s.samba.Restart(s.t.Context())) }
func (s *shareServer) Share(o smb.Options) smb.Share { return s.share(o) }

// eachClient runs a test with each of the ways to read a share. start makes a server
// for one of them.
func eachClient(t *testing.T, lifetime time.Duration, test func(t *testing.T, start func(t *testing.T) *shareServer)) {
	t.Run("userspace", func(t *testing.T) {
		test(t, func(t *testing.T) *shareServer { return newShareServer(t, lifetime) })
	})
	t.Run("kernel", func(t *testing.T) {
		if err := smb.KernelSupported(); err != nil {
			t.Skipf("NOT TESTED here, the kernel's CIFS: %v", err)
		}
		test(t, func(t *testing.T) *shareServer {
			s, dir := newShareServer(t, lifetime), t.TempDir()
			s.share = func(o smb.Options) smb.Share { return smb.NewKernel(dir, o) }
			return s
		})
	})
}

func TestShare(t *testing.T) {
	eachClient(t, time.Hour, func(t *testing.T, start func(t *testing.T) *shareServer) {
		smbtest.Run(t, func(t *testing.T) smbtest.Server { return start(t) })
	})
}

// A share that the kernel has mounted is signed, encrypted and read-only, and nobody
// sees the password.
func TestKernelMount(t *testing.T) {
	if err := smb.KernelSupported(); err != nil {
		t.Skipf("NOT TESTED here, the kernel's CIFS: %v", err)
	}
	s, dir := newShareServer(t, time.Hour), t.TempDir()
	s.Put("disk", []byte("content"))
	share := smb.NewKernel(dir, smb.Options{Login: always(s)})
	if _, err := share.ReadFile(t.Context(), "disk", 10); err != nil {
		t.Fatal(err)
	}
	mount := func() string {
		mounts, err := os.ReadFile("/proc/self/mounts")
		s.check(err)
		if strings.Contains(string(mounts), s.Login().Password) {
			t.Error("everybody can see the password")
		}
		for line := range strings.Lines(string(mounts)) {
			if strings.Contains(line, dir) {
				return line
			}
		}
		return ""
	}
	for _, want := range []string{" cifs ", "ro,", "nosuid", "nodev", "noexec", "vers=3.1.1", "seal", "username=" + s.Login().Username} {
		if got := mount(); !strings.Contains(got, want) {
			t.Errorf("no %q in %s", want, got)
		}
	}
	if err := share.Close(); err != nil || mount() != "" {
		t.Errorf("after Close, which ended with %v: %s", err, mount())
	}
}

// always returns a Login function that has the credentials of the time.
func always(s *shareServer) func(context.Context, string) (smb.Login, error) {
	return func(context.Context, string) (smb.Login, error) { return s.Login(), nil }
}
