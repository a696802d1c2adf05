package hosts_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"sluice/internal/node/hosts"
)

// Files that change count from then on, without a restart; wrong ones are
// reported, and what was before stays in force.
func TestFilesChange(t *testing.T) {
	reg, mirror := serve(t).fill(t), serve(t).fill(t)
	root := t.TempDir()
	h := openDirs(t, root)
	ask := func() {
		t.Helper()
		r, err := h.Registry(reg.addr(), repo)
		if err != nil {
			t.Fatal(err)
		}
		checkRange(t, r, 0, 10)
	}
	ask()
	if len(reg.requests()) != 1 {
		t.Error("without files, the registry isn't asked")
	}
	file := filepath.Join(root, reg.addr(), "hosts.toml")
	write(t, file, mirrors(reg.URL, mirror.URL))
	eventually(t, "the mirror is asked", func() bool { ask(); return len(mirror.requests()) > 0 })

	reg.requests()
	write(t, file, "server = \"http://x\"\n[host\n")
	eventually(t, "the file's error is a problem", func() bool { ask(); return len(h.Problems()) > 0 })
	if p := h.Problems()[0]; p.Registry != reg.addr() || p.Host != "" || !strings.Contains(p.Error, file+", line 2: ") {
		t.Errorf("the problem is %+v", p)
	}
	ask()
	if asked := reg.requests(); len(asked) > 0 {
		t.Errorf("the mirror isn't in force any more: %q", asked)
	}
	write(t, file, mirrors(reg.URL))
	eventually(t, "the registry is asked again", func() bool { ask(); return len(reg.requests()) > 0 })
	if p := h.Problems(); len(p) > 0 {
		t.Errorf("problems: %+v", p)
	}
}

// Files that don't change aren't read again: the same readers, with their tokens
// and what they know of hosts, stay in use.
func TestFilesStay(t *testing.T) {
	files, text := map[string]string{}, ""
	for i := range 10 {
		text += fmt.Sprintf("[host.\"https://mirror-%d\"]\nca = \"%d.pem\"\n", i, i)
		files[fmt.Sprintf("example.test/%d.pem", i)] = newAuthority(t).pem
	}
	files["example.test/hosts.toml"] = text
	h := openDirs(t, dir(t, files))
	first := example(t, h)
	for end := time.Now().Add(2500 * time.Millisecond); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if example(t, h) != first {
			t.Fatal("another reader")
		}
	}
}

// Files that name a CA count anew when that changes.
func TestCertificatesChange(t *testing.T) {
	old, ca := newAuthority(t), newAuthority(t)
	s := serveTLS(t, ca, nil).fill(t)
	root := dir(t, map[string]string{
		"example.test/hosts.toml": fmt.Sprintf("server = %q\nca = \"../ca.pem\"\n", s.URL), "ca.pem": old.pem,
	})
	h := openDirs(t, root)
	if _, err := example(t, h).ResolveManifest(t.Context(), repo, "v1"); err == nil {
		t.Error("a certificate of another CA is believed")
	}
	write(t, filepath.Join(root, "ca.pem"), ca.pem)
	eventually(t, "the new CA counts", func() bool {
		_, err := example(t, h).ResolveManifest(t.Context(), repo, "v1")
		return err == nil
	})
}

// What's wrong with files is said, with the file's name; the registry itself is
// asked then.
func TestWrongFiles(t *testing.T) {
	for name, c := range map[string]struct {
		toml string
		make func(t *testing.T, dir string)
		want []string
	}{
		"no TOML":             {toml: "server = \n", want: []string{"hosts.toml, line 1: "}},
		"unknown capability":  {toml: "capabilities = [\"fly\"]\n", want: []string{"hosts.toml: unknown capability fly"}},
		"wrong duration":      {toml: "dial_timeout = \"soon\"\n", want: []string{"hosts.toml: ", "soon"}},
		"wrong type":          {toml: "ca = 5\n", want: []string{"hosts.toml: ", "\"ca\""}},
		"no URL":              {toml: "server = \"://\"\n", want: []string{"hosts.toml: "}},
		"no HTTP":             {toml: "server = \"httpx://h\"\n", want: []string{"hosts.toml: host \"httpx://h", "use a URL"}},
		"missing CA":          {toml: "ca = \"gone.pem\"\n", want: []string{"gone.pem", "no such file"}},
		"empty CA":            {toml: "ca = \"ca.pem\"\n", make: func(t *testing.T, dir string) { write(t, dir+"/ca.pem", "") }, want: []string{"ca.pem"}},
		"key without a match": {toml: "client = \"ca.pem\"\n", make: func(t *testing.T, dir string) { write(t, dir+"/ca.pem", newAuthority(t).pem) }, want: []string{"key"}},
		"too long":            {toml: "# " + strings.Repeat("x", 1<<20) + "\n", want: []string{"hosts.toml", "bytes"}},
		"too many hosts":      {toml: manyHosts(65), want: []string{"65 hosts"}},
		"a pipe": {make: func(t *testing.T, dir string) {
			if err := syscall.Mkfifo(dir+"/hosts.toml", 0o600); err != nil {
				t.Fatal(err)
			}
		}, want: []string{"not a regular file"}},
		"a directory": {make: func(t *testing.T, dir string) {
			if err := os.Mkdir(dir+"/hosts.toml", 0o700); err != nil {
				t.Fatal(err)
			}
		}, want: []string{"not a regular file"}},
		"a pipe as a CA": {toml: "ca = \"pipe\"\n", make: func(t *testing.T, dir string) {
			if err := syscall.Mkfifo(dir+"/pipe", 0o600); err != nil {
				t.Fatal(err)
			}
		}, want: []string{"not a regular file"}},
	} {
		t.Run(name, func(t *testing.T) {
			reg := serve(t).fill(t)
			root := t.TempDir()
			sub := filepath.Join(root, reg.addr())
			if err := os.Mkdir(sub, 0o700); err != nil {
				t.Fatal(err)
			}
			if c.toml != "" {
				write(t, filepath.Join(sub, "hosts.toml"), c.toml)
			}
			if c.make != nil {
				c.make(t, sub)
			}
			h := openDirs(t, root)
			r, err := h.Registry(reg.addr(), repo)
			if err != nil {
				t.Fatal(err)
			}
			checkRange(t, r, 0, 10)
			p := h.Problems()
			if len(p) != 1 || len(p[0].Error) > 1000 || slices.ContainsFunc(c.want, func(w string) bool { return !strings.Contains(p[0].Error, w) }) {
				t.Errorf("problems are %+v, want %q", p, c.want)
			}
		})
	}
}

func manyHosts(n int) string {
	text := ""
	for i := range n {
		text += fmt.Sprintf("[host.\"https://mirror-%d\"]\n", i)
	}
	return text
}

// Names that aren't those of registries don't become paths.
func TestNamesOfRegistries(t *testing.T) {
	h := openDirs(t, t.TempDir())
	for _, name := range []string{"", ".", "..", "../x", "a/b", `a\b`, "_default", "a b", "a@b", "a?b", "\x00"} {
		if _, err := h.Registry(name, repo); err == nil {
			t.Errorf("%q is a registry", name)
		}
	}
}

// Whatever is in the files, a registry can be asked for, within bounds.
func FuzzFiles(f *testing.F) {
	for _, text := range configurations {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		root := dir(t, map[string]string{"example.test/hosts.toml": text})
		h := hosts.Open(hosts.Options{Dirs: []string{root}})
		defer h.Close()
		if _, err := h.Registry("example.test", repo); err != nil {
			t.Errorf("%v for %q", err, text)
		}
		for _, p := range h.Problems() {
			if len(p.Error) > 1000 {
				t.Errorf("%d bytes of an error", len(p.Error))
			}
		}
	})
}
