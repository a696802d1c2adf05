package samba

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice/internal/index"
	"sluice/internal/storage"
)

func accountsOf(key string) Accounts { return Accounts{Key: []byte(key), Lifetime: time.Hour} }

func TestPasswordHash(t *testing.T) {
	// MS-NLMP, section 4.2.2.1.2.
	if got := hex.EncodeToString(ntHash("Password")); got != "a4f49c406510bdcab6824ee7c30fd852" {
		t.Errorf("the hash of Password is %s", got)
	}
}

// accepts reports whether a file of passwords has a credential.
func accepts(file string, c Credential) bool {
	for line := range strings.Lines(file) {
		f := strings.Split(line, ":")
		if f[0] == c.Username {
			return f[3] == fmt.Sprintf("%X", ntHash(c.Password))
		}
	}
	return false
}

// A credential is good from when it is given out to when it says, also where the
// passwords were written a period ago, and from then on no more.
func TestCredentialsExpire(t *testing.T) {
	a := accountsOf("key")
	begin := time.Unix(1_700_000_000, 0)
	for offset := time.Duration(0); offset < 5*time.Hour; offset += 7 * time.Minute {
		given := begin.Add(offset)
		c := a.Credential("team/app", given)
		if left := c.Expires.Sub(given); left <= time.Hour || left > 2*time.Hour {
			t.Fatalf("good for %v", left)
		}
		for later := time.Duration(0); given.Add(later).Before(c.Expires.Add(5 * time.Hour)); later += 11 * time.Minute {
			at := given.Add(later)
			if got, want := accepts(a.passwords([]string{"other", "team/app"}, at), c), at.Before(c.Expires); got != want {
				t.Fatalf("%v after it was given out, %v before it expires: accepted is %v", later, c.Expires.Sub(at), got)
			}
		}
		if !accepts(a.passwords([]string{"team/app"}, given.Add(-time.Hour)), c) {
			t.Fatal("passwords that were written a period ago don't have it")
		}
	}
}

func TestCredentialsAreOfOneRepository(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	one, two := accountsOf("key").Credential("one", now), accountsOf("key").Credential("two", now)
	if one.Share == two.Share || one.Username == two.Username || one.Password == two.Password {
		t.Errorf("%+v, %+v", one, two)
	}
	if other := accountsOf("another").Credential("one", now); other.Password == one.Password {
		t.Error("two registries have the same passwords")
	}
	if again := accountsOf("key").Credential("one", now); again != one {
		t.Error("two replicas have different ones")
	}
	if len(one.Username) > 20 || len(one.Share) > 80 {
		t.Errorf("%+v is too long for somebody", one)
	}
}

func TestFiles(t *testing.T) {
	repos := []string{"team/app", strings.Repeat("long/", 40) + "name"}
	names, err := accounts(repos)
	if err != nil || strings.Count(names, "\n") != 2*slots {
		t.Errorf("%v\n%s", err, names)
	}
	if _, err := accounts([]string{"one", "one"}); err == nil {
		t.Error("two accounts have one number")
	}
	ids := map[string]bool{}
	for line := range strings.Lines(names) {
		f := strings.Split(line, ":")
		if len(f) != 7 || ids[f[2]] || !strings.HasSuffix(f[6], "nologin\n") {
			t.Errorf("%s", line)
		}
		ids[f[2]] = true
	}
	conf := shares("/disks", "me", repos)
	for _, want := range []string{
		"[" + ShareName("team/app") + "]", "path = /disks/repositories/team/app\n", "read only = yes", "force user = me\n",
		"valid users = " + account("team/app", 0) + " " + account("team/app", 1) + " " + account("team/app", 2) + "\n",
	} {
		if !strings.Contains(conf, want) {
			t.Errorf("no %q in\n%s", want, conf)
		}
	}
	for _, want := range []string{"server min protocol = SMB3_11", "server signing = mandatory", "server smb encrypt = required", "smb ports = 1445", "include = /files/shares.conf", "smbpasswd:/files/smbpasswd"} {
		if global := Global(GlobalOptions{Dir: "/files", Port: 1445}); !strings.Contains(global, want) {
			t.Errorf("no %q in\n%s", want, global)
		}
	}
}

func TestKeeper(t *testing.T) {
	db, err := index.Open(t.Context(), index.Options{URL: "sqlite::memory:"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	store := new(storage.Memory)
	repos := []string{"one"}
	var away error // why the files can't be written
	dir := filepath.Join(t.TempDir(), "samba")
	open := func() *Keeper {
		k, err := Open(t.Context(), store, db, Options{
			Dir: dir, Disks: "/disks", Lifetime: time.Hour, Log: slog.New(slog.DiscardHandler),
			Enabled: func(context.Context) ([]string, error) { return repos, away },
		})
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	k := open()
	now := time.Unix(1_700_000_000, 0)
	k.now = func() time.Time { return now }
	read := func(name string) string {
		content, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(content)
	}
	credential := func(repo string) Credential {
		c, err := k.Credential(t.Context(), repo)
		if err != nil || !accepts(read(PasswordsFile), c) || !strings.Contains(read(SharesFile), c.Share) || !strings.Contains(read(AccountsFile), c.Username) {
			t.Errorf("%+v, %v: smbd doesn't know of it", c, err)
		}
		return c
	}
	first := credential("one")
	repos = append(repos, "two")
	credential("two")
	now = now.Add(3 * time.Hour)
	credential("one")
	if accepts(read(PasswordsFile), first) {
		t.Error("what has expired is accepted")
	}
	away = errors.New("the database is away")
	now = now.Add(time.Hour)
	credential("one")
	if c, err := k.Credential(t.Context(), "three"); !errors.Is(err, away) {
		t.Errorf("of a repository that smbd doesn't know: %+v, %v", c, err)
	}
	now = now.Add(time.Hour)
	if c, err := k.Credential(t.Context(), "one"); !errors.Is(err, away) {
		t.Errorf("that smbd doesn't know: %+v, %v", c, err)
	}
	away = nil
	credential("one")
	if info, err := os.Stat(filepath.Join(dir, PasswordsFile)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("everybody may read passwords: %v, %v", info.Mode(), err)
	}
	repos = repos[:1]
	if err := k.Write(t.Context()); err != nil || strings.Contains(read(SharesFile), ShareName("two")) {
		t.Errorf("who takes part no longer is shared on: %v", err)
	}
	if other := open(); string(other.accounts.Key) != string(k.accounts.Key) || len(k.accounts.Key) != keySize {
		t.Error("another process has another secret")
	}
}
