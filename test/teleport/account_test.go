package teleport

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice/internal/node/smb"
	"sluice/internal/remote"
	"sluice/internal/teleport/samba"
	"sluice/oci"
	"sluice/test/bed"
)

// A file server that the registry tells nothing, as Azure Files: one share that has the
// whole directory, and one account.
func TestFileServerWithAnAccount(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for smbd")
	}
	ctx := t.Context()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	s := &stage{t: t}
	src, err := filepath.Abs("../..")
	check(err)
	s.sluice, err = bed.BuildSluice(ctx, src, t.TempDir())
	check(err)
	s.box, err = bed.NewToolbox(ctx, filepath.Join(t.TempDir(), "image"), 8, 1<<20)
	check(err)
	dir, own, accounts := t.TempDir(), t.TempDir(), t.TempDir()
	s.samba, err = bed.StartSamba(ctx, own, accounts, func(port, state string) (string, error) {
		var n int
		if _, err := fmt.Sscan(port, &n); err != nil {
			return "", err
		}
		shares := "[disks]\n\tpath = " + filepath.Join(dir, "registry/teleport") + "\n\tread only = yes\n"
		return samba.Global(samba.GlobalOptions{Dir: accounts, Port: n, State: state}), os.WriteFile(filepath.Join(accounts, samba.SharesFile), []byte(shares), 0o600)
	})
	check(err)
	t.Cleanup(s.samba.Stop)
	const password = "of the account"
	add := exec.CommandContext(ctx, "smbpasswd", "-c", filepath.Join(own, "smb.conf"), "-s", "-a", "root")
	add.Stdin = strings.NewReader(password + "\n" + password + "\n")
	if out, err := add.CombinedOutput(); err != nil {
		t.Fatalf("smbpasswd: %v: %s", err, out)
	}
	secret := filepath.Join(dir, "password")
	check(os.WriteFile(secret, []byte(password+"\n"), 0o600))
	s.registry, err = bed.StartRegistry(ctx, s.sluice, dir, append(bed.TeleportServer(s.samba.Address()), "SLUICE_REGISTRY_LOG_LEVEL=warn",
		"SLUICE_REGISTRY_TELEPORT_SHARE=disks", "SLUICE_REGISTRY_TELEPORT_USERNAME=root", "SLUICE_REGISTRY_TELEPORT_PASSWORD_FILE="+secret)...)
	check(err)
	t.Cleanup(func() { s.registry.Stop() })
	s.client, err = remote.New(s.registry.Addr, remote.Options{})
	check(err)

	m := s.expanded("team/app")
	if m.SMB.Share != "disks" || m.SMB.Username != "root" || m.SMB.Password != password || time.Until(m.SMB.Expires) < time.Minute {
		t.Errorf("the API says %+v", m.SMB)
	}
	if _, err := os.Stat(filepath.Join(dir, "registry/teleport/_samba")); !os.IsNotExist(err) {
		t.Errorf("the registry keeps accounts of Samba's: %v", err)
	}
	share := smb.NewClient(smb.Options{Login: func(context.Context, string) (smb.Login, error) {
		return smb.Login{Server: m.SMB.Server, Share: m.SMB.Share, Username: m.SMB.Username, Password: m.SMB.Password, Expires: m.SMB.Expires}, nil
	}})
	defer share.Close()
	for _, l := range m.Layers {
		if !strings.HasPrefix(l.Path, "repositories/team/app/") || !strings.HasSuffix(l.URL, "/disks/"+l.Path) {
			t.Errorf("%+v isn't in the repository's directory", l)
		}
		for path, want := range map[string]oci.Digest{l.Path: l.VHDDigest, l.Sums.Path: l.Sums.Digest} {
			if content, err := share.ReadFile(ctx, path, 1<<30); err != nil || oci.DigestOf(content) != want {
				t.Errorf("%s: %d bytes, %v; want %s", path, len(content), err, want)
			}
		}
	}
}
