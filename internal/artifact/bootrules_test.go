package artifact

import (
	"archive/tar"
	"encoding/binary"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/layer"
	"sluice/oci"
)

// loaderCache makes an ld.so.cache of pairs of names and paths.
func loaderCache(pairs ...string) string {
	le := binary.LittleEndian
	b := append([]byte(cacheMagic), make([]byte, cacheHead-len(cacheMagic))...)
	le.PutUint32(b[20:], uint32(len(pairs)/2))
	b[28] = 2 // little endian
	strs := cacheHead + cacheEntry*len(pairs)/2
	var text string
	for i := 0; i < len(pairs); i += 2 {
		e := make([]byte, cacheEntry)
		le.PutUint32(e[4:], uint32(strs+len(text)))
		text += pairs[i] + "\x00"
		le.PutUint32(e[8:], uint32(strs+len(text)))
		text += pairs[i+1] + "\x00"
		b = append(b, e...)
	}
	return string(b) + text
}

// localeArchive makes a locale-archive with one locale, of whose categories one
// is there: at 1 MiB.
func localeArchive(name string) string {
	le := binary.LittleEndian
	b := make([]byte, 2<<20)
	const names, record, text = archiveHead, archiveHead + archiveName, archiveHead + archiveName + archiveRecord
	for i, v := range []uint32{archiveMagic, 1, names, 1, 1, text, 64, 64, record, 1, 1, text + 64, 0, 0} {
		le.PutUint32(b[4*i:], v)
	}
	le.PutUint32(b[names+4:], text)
	le.PutUint32(b[names+8:], record)
	le.PutUint32(b[record+4:], 1<<20)
	le.PutUint32(b[record+8:], 100)
	copy(b[text:], name)
	return string(b)
}

// jimage makes a lib/modules with resources of 100 bytes of the packages, each
// in a chunk of its own.
func jimage(packages ...string) string {
	le := binary.LittleEndian
	strs, locations := []byte("\x00java.base\x00"), []byte(nil)
	var offsets []byte
	for i, p := range packages {
		offsets = le.AppendUint32(offsets, uint32(len(locations)))
		locations = append(locations, jimageModule<<3, 1, jimageParent<<3, byte(len(strs)), jimageOffset<<3|2, byte(4*(i+1)), 0, 0, jimageContent<<3, 100, 0)
		strs = append(strs, p+"\x00"...)
	}
	b := make([]byte, jimageHead)
	for i, v := range []int{jimageMagic, 1 << 16, 0, len(packages), len(packages), len(locations), len(strs)} {
		le.PutUint32(b[4*i:], uint32(v))
	}
	b = slices.Concat(b, make([]byte, 4*len(packages)), offsets, locations, strs)
	return string(append(b, make([]byte, (len(packages)+1)*MaxChunkLength)...))
}

func TestBootRules(t *testing.T) {
	elf := func(name string, needed ...string) entry { return program(name, elfOf("/lib/ld.so", needed...)) }
	config := func(dir string, env []string, args ...string) oci.ImageConfig {
		c := cmd(args...)
		c.Config.WorkingDir, c.Config.Env = dir, env
		return c
	}
	base := []entry{program("lib/ld.so", elfOf("")), elf("bin/sh"), elf("bin/sed"), elf("bin/other"), file("etc/other.conf", "x")}
	for what, c := range map[string]struct {
		config  oci.ImageConfig
		entries []entry
		want    []string
		not     []string
	}{
		"library in ld.so.cache": {
			cmd("app"), []entry{
				elf("bin/app", "libx.so"), file("etc/ld.so.cache", loaderCache("liby.so", "/opt/y/liby.so", "libx.so", "/opt/x/libx.so.1")),
				link("opt/x/libx.so.1", "libx.so.1.2", tar.TypeSymlink), program("opt/x/libx.so.1.2", elfOf("", "liby.so")), program("opt/y/liby.so", elfOf("", "libx.so")),
			}, []string{"opt/x/libx.so.1.2", "opt/y/liby.so", "etc/ld.so.cache"}, nil,
		},
		"library in ld.so.conf": {
			cmd("app"), []entry{
				elf("bin/app", "libx.so"), file("etc/ld.so.conf", "include ld.so.conf.d/*.conf\n"), file("etc/ld.so.conf.d/x.conf", "include /etc/ld.so.conf\n/opt/x # here\n"),
				program("opt/x/libx.so", elfOf("")),
			}, []string{"opt/x/libx.so"}, nil,
		},
		"musl's path": {
			cmd("app"), []entry{
				program("bin/app", elfOf("/lib/ld-musl-x86_64.so.1", "libx.so")), program("lib/ld-musl-x86_64.so.1", elfOf("")),
				file("etc/ld-musl-x86_64.path", "/nonesuch\n/opt/x"), program("opt/x/libx.so", elfOf("")),
			}, []string{"etc/ld-musl-x86_64.path", "opt/x/libx.so"}, nil,
		},
		"library for another machine": {
			cmd("app"), []entry{
				elf("bin/app", "libx.so"), program("opt/b/libx.so", elfOf("")),
				program("opt/a/libx.so", strings.Replace(elfOf(""), "\x7fELF\x02", "\x7fELF\x01", 1)), file("etc/ld.so.conf", "/opt/a\n/opt/b\n"),
			}, []string{"opt/b/libx.so"}, []string{"opt/a/libx.so"},
		},
		"entrypoint script": {
			func() oci.ImageConfig {
				c := cmd("app", "--flag")
				c.Config.Entrypoint = []string{"/entry.sh"}
				return c
			}(), []entry{
				program("entry.sh", "#!/usr/bin/env -S sh -e\nif [ -z \"$X\" ]; then X=$(sed s/a/b/ /etc/x); fi\n. /lib/more.sh\nfor f in /entry.d/*; do \"$f\"; done\necho other\nexec \"$@\"\n"),
				elf("usr/bin/env"), elf("bin/app"), elf("bin/helper"), elf("bin/inner"), program("lib/more.sh", "helper || . /lib/more.sh\n"), program("entry.d/1.sh", "#!/bin/sh\ninner\n"),
			}, []string{"entry.sh", "usr/bin/env", "bin/sh", "bin/sed", "lib/more.sh", "bin/helper", "entry.d/1.sh", "bin/inner", "bin/app"}, []string{"bin/other"},
		},
		"wrapper": {
			cmd("tini", "--", "gosu", "root", "app", "--config=/srv/app.yml"),
			[]entry{elf("bin/tini"), elf("bin/gosu"), elf("bin/app"), file("srv/app.yml", "x"), file("etc/app/app.toml", "x"), file("etc/app/app.bak", "x")},
			[]string{"bin/tini", "bin/gosu", "bin/app", "srv/app.yml", "etc/app/app.toml"}, []string{"etc/app/app.bak"},
		},
		"node": {
			config("/app", nil, "node", "--enable-source-maps", "server"), []entry{
				elf("usr/bin/node"), file("app/server.js", `const a = require('./lib'); import x from "pkg/sub"; require("@own/thing"); require('fs'); require('global')`),
				file("app/package.json", "{}"), file("app/lib/index.js", "require('../server')"), file("app/lib/unused.js", "x"),
				file("app/node_modules/pkg/package.json", `{"exports":{".":"./no.js","./sub":{"import":"./no.js","require":"./yes.cjs"}}}`),
				file("app/node_modules/pkg/yes.cjs", "x"), file("app/node_modules/pkg/no.js", "x"),
				file("app/node_modules/@own/thing/package.json", `{"main":"main"}`), file("app/node_modules/@own/thing/main.js", "x"), file("usr/lib/node/global.js", "x"),
			}, []string{"usr/bin/node", "app/server.js", "app/package.json", "app/lib/index.js", "app/node_modules/pkg/yes.cjs", "app/node_modules/@own/thing/main.js", "usr/lib/node/global.js"},
			[]string{"app/lib/unused.js", "app/node_modules/pkg/no.js"},
		},
		"python in a virtual environment": {
			config("/srv", []string{"PATH=/venv/bin:/bin", "PYTHONPATH=/extra"}, "serve", "--port", "1", "own.wsgi:app"), []entry{
				elf("usr/bin/python3.11"), link("venv/bin/python", "/usr/bin/python3.11", tar.TypeSymlink), file("venv/pyvenv.cfg", "home = /usr/bin\n"),
				program("venv/bin/serve", "#!/venv/bin/python\nimport sys\n"), file("venv/lib/python3.11/site-packages/serve-1.0.dist-info/entry_points.txt", "[console_scripts]\nserve = served.main:run\n"),
				file("venv/lib/python3.11/site-packages/served/main.py", "import more\n"), file("venv/lib/python3.11/site-packages/served/__init__.py", "x"),
				file("srv/own/__init__.py", "x"), file("srv/own/wsgi.py", "from . import views\n"), file("srv/own/views.py", "x"), file("srv/own/unused.py", "x"), file("extra/more.py", "x"),
			}, []string{
				"venv/pyvenv.cfg", "venv/bin/serve", "venv/lib/python3.11/site-packages/serve-1.0.dist-info/entry_points.txt",
				"venv/lib/python3.11/site-packages/served/main.py", "srv/own/wsgi.py", "srv/own/views.py", "extra/more.py",
			}, []string{"srv/own/unused.py"},
		},
		"java": {
			config("/", []string{"CLASSPATH=/b.jar"}, "java", "-cp", "/opt/*", "-jar", "/a.jar"), []entry{
				elf("jdk/bin/java"), link("bin/java", "/jdk/bin/java", tar.TypeSymlink), file("jdk/lib/jvm.cfg", "-server KNOWN"), program("jdk/lib/server/libjvm.so", elfOf("")),
				file("jdk/lib/server/classes.jsa", "x"), file("jdk/conf/security/java.security", "x"), file("a.jar", "x"), file("b.jar", "x"), file("opt/c.jar", "x"), file("opt/c.txt", "x"),
			}, []string{"jdk/bin/java", "jdk/lib/jvm.cfg", "jdk/lib/server/libjvm.so", "jdk/lib/server/classes.jsa", "jdk/conf/security/java.security", "a.jar", "b.jar", "opt/c.jar"}, []string{"opt/c.txt"},
		},
		"perl": {
			config("/app", nil, "./app.pl"), []entry{
				elf("usr/bin/perl"), program("app/app.pl", "#!/usr/bin/perl -w\nuse 5.36;\nuse Data::Fast qw(x);\n"), file("usr/share/perl/5.36/strict.pm", "1"),
				file("usr/share/perl/5.36/Data/Fast.pm", "use strict;\n"), program("usr/lib/x/perl/5.36/auto/Data/Fast/Fast.so", elfOf("")), file("usr/share/perl/5.36/Unused.pm", "1"),
			}, []string{"app/app.pl", "usr/bin/perl", "usr/share/perl/5.36/Data/Fast.pm", "usr/lib/x/perl/5.36/auto/Data/Fast/Fast.so", "usr/share/perl/5.36/strict.pm"}, []string{"usr/share/perl/5.36/Unused.pm"},
		},
		"ruby": {
			config("/app", nil, "ruby", "-r", "json", "app.rb"), []entry{
				elf("usr/bin/ruby3.1"), link("usr/bin/ruby", "ruby3.1", tar.TypeSymlink), file("app/app.rb", "require 'json'\nrequire_relative 'lib/own'\n    require 'late'\n"),
				file("app/lib/own.rb", "x"), file("usr/lib/ruby/3.1.0/json.rb", "x"), file("usr/lib/ruby/3.1.0/rubygems.rb", "x"), file("usr/lib/ruby/3.1.0/late.rb", "x"),
			}, []string{"app/app.rb", "app/lib/own.rb", "usr/lib/ruby/3.1.0/json.rb", "usr/lib/ruby/3.1.0/rubygems.rb"}, []string{"usr/lib/ruby/3.1.0/late.rb"},
		},
		"php": {
			config("/app", nil, "php", "-d", "x=1", "index.php"), []entry{
				elf("usr/bin/php8.2"), link("usr/bin/php", "php8.2", tar.TypeSymlink), file("etc/php/8.2/cli/conf.d/10-x.ini", "; off\n;extension=no\nextension=yes.so\n"),
				program("usr/lib/php/20220829/yes.so", elfOf("")), program("usr/lib/php/20220829/no.so", elfOf("")),
				file("app/index.php", "<?php require __DIR__ . '/vendor/autoload.php';"), file("app/vendor/autoload.php", "<?php include_once('../index.php');"),
			}, []string{"etc/php/8.2/cli/conf.d/10-x.ini", "usr/lib/php/20220829/yes.so", "app/index.php", "app/vendor/autoload.php"}, []string{"usr/lib/php/20220829/no.so"},
		},
		"nginx": {
			cmd("nginx", "-g", "daemon off;"), []entry{
				elf("usr/sbin/nginx"), file("etc/nginx/nginx.conf", "load_module modules/m.so;\nhttp { include mime.types; include /etc/nginx/conf.d/*.conf; ssl_certificate /etc/tls.crt; }"),
				program("usr/share/nginx/modules/m.so", elfOf("")), file("etc/nginx/mime.types", "x"), file("etc/nginx/conf.d/a.conf", "include conf.d/*.conf;"), file("etc/nginx/conf.d/a.txt", "x"), file("etc/tls.crt", "x"),
			}, []string{"etc/nginx/nginx.conf", "usr/share/nginx/modules/m.so", "etc/nginx/mime.types", "etc/nginx/conf.d/a.conf", "etc/tls.crt"}, []string{"etc/nginx/conf.d/a.txt"},
		},
		"apache": {
			cmd("/start"), []entry{
				program("start", "#!/bin/sh\nHTTPD=${HTTPD:-/usr/sbin/apache2}\nexec $HTTPD -D FOREGROUND\n"), elf("usr/sbin/apache2"),
				file("etc/apache2/apache2.conf", "IncludeOptional mods/*.load\n# Include no.conf\n"), file("etc/apache2/mods/a.load", "LoadModule a_module /usr/lib/a.so\nInclude apache2.conf"),
				program("usr/lib/a.so", elfOf("")), file("etc/apache2/no.conf", "x"),
			}, []string{"start", "usr/sbin/apache2", "etc/apache2/apache2.conf", "etc/apache2/mods/a.load", "usr/lib/a.so"}, nil,
		},
		"postgres": {
			cmd("/usr/lib/postgresql/15/bin/initdb"), []entry{
				elf("usr/lib/postgresql/15/bin/initdb"), elf("usr/lib/postgresql/15/bin/postgres"), elf("usr/lib/postgresql/15/bin/psql"),
				file("usr/share/postgresql/15/postgres.bki", "x"), file("usr/share/postgresql/15/timezonesets/Default", "x"), program("usr/lib/postgresql/15/lib/plpgsql.so", elfOf("")),
			}, []string{"usr/lib/postgresql/15/bin/postgres", "usr/share/postgresql/15/postgres.bki", "usr/share/postgresql/15/timezonesets/Default", "usr/lib/postgresql/15/lib/plpgsql.so"},
			[]string{"usr/lib/postgresql/15/bin/psql"},
		},
		"locale": {
			config("/", []string{"LANG=de_DE.UTF-8"}, "other"), []entry{file("usr/lib/locale/de_DE.utf8/LC_TIME", "x"), file("usr/lib/locale/fr_FR.utf8/LC_TIME", "x")},
			[]string{"bin/other", "etc/other.conf", "usr/lib/locale/de_DE.utf8/LC_TIME"}, []string{"usr/lib/locale/fr_FR.utf8/LC_TIME"},
		},
	} {
		t.Run(what, func(t *testing.T) {
			got := packedFiles(t, c.config, slices.Concat(base, c.entries)...)
			for _, w := range c.want {
				if !slices.Contains(got, w) {
					t.Errorf("%s is missing from %v", w, got)
				}
			}
			for _, w := range c.not {
				if slices.Contains(got, w) {
					t.Errorf("%s shouldn't be in %v", w, got)
				}
			}
		})
	}
}

// plannedChunks returns which chunks of the file /f are planned by a rule.
func plannedChunks(t *testing.T, content string, rule func(p *bootPlanner, f resolved)) []int {
	t.Helper()
	files, f := fuzzImage(t, []byte(content))
	rule(newBootPlanner(files, cmd()), f)
	var chunks []int
	for _, ref := range files.order {
		chunks = append(chunks, ref.Index)
	}
	return chunks
}

func TestBootPackHasPartsOfLargeFiles(t *testing.T) {
	if got := plannedChunks(t, localeArchive("de_DE.utf8"), func(p *bootPlanner, f resolved) { p.localeArchive(f, "de_DE.utf8", why{}) }); !cmp.Equal(got, []int{0, 4}) {
		t.Errorf("locale-archive: chunks %v", got)
	}
	if got := plannedChunks(t, localeArchive("de_DE.utf8"), func(p *bootPlanner, f resolved) { p.localeArchive(f, "fr_FR.utf8", why{}) }); !cmp.Equal(got, []int{0}) {
		t.Errorf("locale-archive without the locale: chunks %v", got)
	}
	image := jimage("java/io", "sun/nio/ch", "java/io", "java/awt", "java/util")
	if got := plannedChunks(t, image, func(p *bootPlanner, f resolved) { p.javaModules(f, why{}, true) }); !cmp.Equal(got, []int{0, 3, 5}) {
		t.Errorf("modules with a class data archive: chunks %v", got)
	}
	if got := plannedChunks(t, image, func(p *bootPlanner, f resolved) { p.javaModules(f, why{}, false) }); !cmp.Equal(got, []int{0, 1, 2, 3, 5}) {
		t.Errorf("modules without one: chunks %v", got)
	}
}

func TestShellCommands(t *testing.T) {
	for text, want := range map[string][][]string{
		"a b; c | d && e || f &\n":                       {{"a", "b"}, {"c"}, {"d"}, {"e"}, {"f"}},
		"X=1 Y=\"2 3\" exec nice -n 5 app \"$@\" # app2": {{"nice", "-n", "5", "app", "$@"}},
		"if ! test -f x; then\n\tgo\nfi":                 {{"test", "-f", "x"}, {"go"}, {"fi"}},
		"x=$(id -u) y=`who` \\\n  z":                     {{"id", "-u"}, {"who"}, {"z"}},
		"f() { inner 'a;b' \"$(sub x)\" ; }":             {{"f"}, {"inner", "a;b"}, {"sub", "x"}},
		"'open\nnext":                                    {{"open"}, {"next"}},
		"":                                               nil,
	} {
		if got := shellCommands(text); !cmp.Equal(got, want) {
			t.Errorf("%q is %q, want %q", text, got, want)
		}
	}
}

func FuzzShellCommands(f *testing.F) {
	f.Add("if [ \"${1#-}\" != \"$1\" ]; then set -- node \"$@\"; fi; exec \"$@\" `x $(y 'z` \\\n")
	f.Fuzz(func(t *testing.T, text string) {
		commands := shellCommands(text)
		if len(commands) > maxScriptCommands+2 {
			t.Errorf("%d commands", len(commands))
		}
		for _, words := range commands {
			if len(words) == 0 || len(words) > maxWords || words[0] == "" {
				t.Errorf("%q", words)
			}
		}
	})
}

func FuzzLoaderCache(f *testing.F) {
	f.Add([]byte(loaderCache("libx.so", "/x/libx.so")))
	f.Add([]byte(cacheMagicOld + "\x01\x00\x00\x00" + strings.Repeat("\x00", 12) + loaderCache("a", "/b")))
	f.Fuzz(func(t *testing.T, b []byte) {
		for name, paths := range parseLoaderCache(b) {
			if name == "" || len(paths) > 8 || !strings.HasPrefix(paths[0], "/") {
				t.Errorf("%q: %q", name, paths)
			}
		}
	})
}

// FuzzBootFormats has every rule look at one file under the names that they look
// for.
func FuzzBootFormats(f *testing.F) {
	f.Add([]byte(localeArchive("C.utf8")[:4096]))
	f.Add([]byte(jimage("java/io")[:4096]))
	f.Add([]byte("include /etc/nginx/*; load_module x; extension=../x\nrequire 'f'\nuse F;\nimport x from './f'"))
	f.Add([]byte(`{"exports":{".":[{"node":{"default":"./f.js"}}]},"main":"."}`))
	names := []string{
		"/usr/lib/locale/locale-archive", "/etc/nsswitch.conf", "/etc/nginx/nginx.conf", "/etc/php/8/cli/php.ini", "/jdk/lib/modules", "/jdk/lib/jvm.cfg", "/etc/ld.so.cache", "/etc/ld-musl-x.path",
		"/package.json", "/f.js", "/f.pl", "/f.rb", "/f.php", "/f.sh", "/usr/lib/ruby/3.1.0/f.rb", "/usr/share/perl/5.1/F.pm",
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		if len(content) > 1<<18 {
			return
		}
		files, at := fuzzImage(t, content)
		for _, name := range names {
			dir := files.root
			parts := strings.Split(name[1:], "/")
			for _, p := range parts[:len(parts)-1] {
				if dir.Children[p] == nil {
					dir.Children[p] = &layer.Node{Mode: layer.TypeDir, Children: make(map[string]*layer.Node)}
				}
				dir = dir.Children[p]
			}
			same := *at.Node
			dir.Children[parts[len(parts)-1]] = &same
		}
		c := cmd()
		c.Config.Env = []string{"LANG=C.UTF-8"}
		p := newBootPlanner(files, c)
		p.common(at)
		p.node(at, []string{"/f.js"})
		p.java(resolved{at.Node, "/jdk/bin/java"}, []string{"-jar", "/f.js"})
		p.perl(at, []string{"/f.pl"})
		p.ruby(at, []string{"/f.rb"})
		p.php(resolved{at.Node, "/usr/bin/php8"}, []string{"/f.php"})
		p.nginx(at, nil)
		p.shell(at, []string{"/f.sh"})
		var info packageJSON
		if json.Unmarshal(content, &info) == nil {
			exported(info.Exports, ".", 0)
		}
		if files.err != nil || files.size > bootBudget {
			t.Fatal(files.err, files.size)
		}
	})
}
