// Package samba is what a Samba file server needs to be told to share Teleport's
// disks: with each repository's disks apart, for those only who have credentials of
// that repository, which expire.
//
// Start with Keeper (keeper.go), which gives out credentials and keeps three files
// that smbd reads: the shares, their accounts' passwords, and, for the C library,
// the accounts. Global is the rest of Samba's configuration, which doesn't change.
//
// # Credentials that expire
//
// Time is cut into periods of the lifetime that credentials have at least. In each,
// a repository has another account and password, made from a secret of the registry;
// nothing is stored for who is given them, and all replicas give out the same. smbd
// is told those of the period before, of this one and of the next: so a credential
// is good to the end of the period after its own, and is refused from then on. There
// are three accounts a repository, which take turns. Sessions that are open when
// their credential expires stay open, as is SMB's way.
//
// # Where this comes from
//
// The password file's form is Samba's smbpasswd(5): hashes of the kind that NTLMv2
// is made from, MD4 of the password in UTF-16 (MS-NLMP, section 3.3.1). Whoever can
// read it can sign in, so it is for root only.
package samba

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"fmt"
	"path"
	"path/filepath"
	"strings"
	"time"
	"unicode/utf16"

	"golang.org/x/crypto/md4" //nolint:staticcheck // it is what Windows' passwords are hashed with

	"sluice/internal/teleport"
)

// Credential is what a client needs to read a repository's disks.
type Credential struct {
	Share    string // name of the share
	Dir      string // of the repository's disks in it; empty: the share is the repository's
	Username string
	Password string
	Expires  time.Time
}

// Accounts makes credentials.
type Accounts struct {
	Key      []byte        // the registry's secret
	Lifetime time.Duration // for which a credential is good at least; at most twice as long
}

// slots is how many accounts of a repository take turns.
const slots = 3

// period returns the number of the period that a time is in.
func (a Accounts) period(t time.Time) int64 { return t.Unix() / a.seconds() }

func (a Accounts) seconds() int64 { return max(int64(a.Lifetime/time.Second), 1) }

func (a Accounts) begin(period int64) time.Time { return time.Unix(period*a.seconds(), 0).UTC() }

// Credential returns what is to be given out at a time.
func (a Accounts) Credential(repo string, now time.Time) Credential {
	return a.credential(repo, a.period(now))
}

func (a Accounts) credential(repo string, period int64) Credential {
	h := hmac.New(sha256.New, a.Key)
	h.Write(binary.BigEndian.AppendUint64(nil, uint64(period)))
	h.Write([]byte(repo))
	return Credential{
		Share: ShareName(repo), Username: account(repo, period),
		Password: base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(h.Sum(nil)),
		Expires:  a.begin(period + 2),
	}
}

// ShareName returns the name of a repository's share. Names of repositories may be
// longer than those of shares, and have slashes.
func ShareName(repo string) string { return fmt.Sprintf("repository-%x", hashOf(repo)[:10]) }

func account(repo string, period int64) string {
	return fmt.Sprintf("sluice-%x-%d", hashOf(repo)[:4], period%slots)
}

// Accounts of the C library have numbers from firstID on: as high as Samba's way to
// make identifiers from them allows, where nobody else's are.
const (
	firstID = 0x60000000
	idBits  = 28
)

func idOf(name string) uint32 {
	return firstID + binary.BigEndian.Uint32(hashOf(name))>>(32-idBits)
}

func hashOf(s string) []byte {
	sum := sha256.Sum256([]byte(s))
	return sum[:]
}

// passwords returns the smbpasswd file at a time.
func (a Accounts) passwords(repos []string, now time.Time) string {
	var b strings.Builder
	n := a.period(now)
	for _, repo := range repos {
		for period := n - 1; period <= n+1; period++ {
			c := a.credential(repo, period)
			fmt.Fprintf(&b, "%s:%d:%s:%X:[U          ]:LCT-%08X:\n",
				c.Username, idOf(c.Username), strings.Repeat("X", 32), ntHash(c.Password), uint32(a.begin(period).Unix()))
		}
	}
	return b.String()
}

// ntHash returns what Windows keeps of a password.
func ntHash(password string) []byte {
	h := md4.New()
	for _, u := range utf16.Encode([]rune(password)) {
		h.Write(binary.LittleEndian.AppendUint16(nil, u))
	}
	return h.Sum(nil)
}

// accounts returns the passwd(5) file, and an error if two accounts have one number.
func accounts(repos []string) (string, error) {
	var b strings.Builder
	names := make(map[uint32]string)
	for _, repo := range repos {
		for slot := range int64(slots) {
			name := account(repo, slot)
			id := idOf(name)
			if other, ok := names[id]; ok {
				return "", fmt.Errorf("the accounts %s and %s (of %s) would have one number: rename the repository", other, name, repo)
			}
			names[id] = name
			fmt.Fprintf(&b, "%s:x:%d:65534:Teleport:/nonexistent:/usr/sbin/nologin\n", name, id)
		}
	}
	return b.String(), nil
}

// shares returns the part of smb.conf that has the shares. user is who owns the
// disks.
func shares(dir, user string, repos []string) string {
	var b strings.Builder
	b.WriteString("# Kept by the registry; changes are lost.\n")
	for _, repo := range repos {
		var names []string
		for slot := range int64(slots) {
			names = append(names, account(repo, slot))
		}
		fmt.Fprintf(&b, "\n# %s\n[%s]\n\tpath = %s\n\tvalid users = %s\n\tforce user = %s\n\tread only = yes\n\tbrowseable = no\n\tfollow symlinks = no\n",
			repo, ShareName(repo), teleport.RepositoryDir(dir, repo), strings.Join(names, " "), user)
	}
	return b.String()
}

// The names of a Keeper's files in its directory.
const (
	SharesFile    = "shares.conf" // included by smb.conf
	PasswordsFile = "smbpasswd"   // passdb backend
	AccountsFile  = "passwd"      // of the C library
)

// GlobalOptions says what is different from Samba's defaults in Global.
type GlobalOptions struct {
	Dir   string // of a Keeper's files
	Port  int    // 0: 445
	State string // directory for smbd's own files; empty: Samba's
}

// Global returns the smb.conf of a server that shares Teleport's disks and nothing
// else: SMB 3.1.1, signed and encrypted, read-only, for nobody without credentials.
func Global(opts GlobalOptions) string {
	lines := []string{
		"server role = standalone server",
		"workgroup = SLUICE",
		"server min protocol = SMB3_11",
		"server signing = mandatory",
		"server smb encrypt = required",
		"ntlm auth = ntlmv2-only",
		"map to guest = never",
		"restrict anonymous = 2",
		"passdb backend = smbpasswd:" + filepath.Join(opts.Dir, PasswordsFile),
		"disable netbios = yes",
		"disable spoolss = yes",
		"load printers = no",
		"printcap name = /dev/null",
		"usershare max shares = 0",
		"log level = 1",
	}
	if opts.Port != 0 {
		lines = append(lines, fmt.Sprintf("smb ports = %d", opts.Port))
	}
	if opts.State != "" {
		for _, d := range []string{"private dir", "lock directory", "state directory", "cache directory", "pid directory", "ncalrpc dir"} {
			lines = append(lines, d+" = "+path.Join(opts.State, strings.Fields(d)[0]))
		}
		lines = append(lines, "log file = "+path.Join(opts.State, "log.%m"))
	}
	return "# Made by sluice registry smb-config.\n[global]\n\t" + strings.Join(lines, "\n\t") +
		"\n\ninclude = " + filepath.Join(opts.Dir, SharesFile) + "\n"
}
