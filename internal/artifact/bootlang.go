package artifact

import (
	"path"
	"regexp"
	"slices"
	"strings"

	"sluice/internal/layer"
)

// modules follows what the files of a program load, for languages in which that
// can be told from lines of text.
type modules struct {
	p       *bootPlanner
	pattern *regexp.Regexp                              // its first group that matches names a module
	find    func(name string, from resolved) []resolved // the files of a module
	why     why
}

// follow plans a file and what it loads, and what that loads.
func (m *modules) follow(f resolved) {
	if m.p.seen[f.Node] || len(m.p.seen) > maxModules || m.p.full() {
		return
	}
	if strings.HasSuffix(f.path, ".so") {
		m.p.program(f, m.why)
		return
	}
	m.p.seen[f.Node] = true
	if f.Size > maxInspected {
		m.p.pack(f, m.why, 0, 1)
		return
	}
	m.p.packAll(f, m.why)
	for _, match := range m.pattern.FindAllStringSubmatch(m.p.text(f.Node), 500) {
		for _, name := range match[1:] {
			if name == "" {
				continue
			}
			for _, found := range m.find(name, f) {
				m.follow(found)
			}
			break
		}
	}
}

// name follows a module by its name.
func (m *modules) name(name string, from resolved) {
	for _, f := range m.find(name, from) {
		m.follow(f)
	}
}

// firstOf returns the first of the files that exists.
func (p *bootPlanner) firstOf(names ...string) []resolved {
	for _, name := range names {
		if f, ok := p.file(name); ok {
			return []resolved{f}
		}
	}
	return nil
}

// scriptOf returns the script that the arguments of an interpreter name, and the
// words of its options before it. with are the letters of options that have an
// argument of their own.
func (p *bootPlanner) scriptOf(args []string, with string) (script resolved, ok bool, options []string) {
	for i := 0; i < len(args); i++ {
		a := args[i]
		if !strings.HasPrefix(a, "-") || a == "-" {
			script, ok = p.file(p.absolute(a))
			return script, ok, options
		}
		options = append(options, a)
		if len(a) == 2 && strings.ContainsRune(with, rune(a[1])) && i+1 < len(args) {
			i++
			options = append(options, args[i])
		}
	}
	return resolved{}, false, options
}

var perlUse = regexp.MustCompile(`(?m)^(?:\s*(?:use|no)|require)\s+(?:base\s+|parent\s+)?(?:-norequire\s*,?\s*)?(?:qw[(/]\s*|['"])?([A-Za-z_]\w*(?:::\w+)*)`)

// perl plans the modules that a perl script uses.
func (p *bootPlanner) perl(f resolved, args []string) {
	var dirs []string
	for _, d := range strings.SplitN(p.env["PERL5LIB"], ":", maxDirs) {
		if path.IsAbs(d) {
			dirs = append(dirs, d)
		}
	}
	dirs = append(dirs, p.dirs("/etc/perl", "/usr/local/lib/*/perl/5*", "/usr/local/share/perl/5*", "/usr/lib/*/perl5/5*", "/usr/share/perl5",
		"/usr/lib/*/perl-base", "/usr/lib/*/perl/5*", "/usr/share/perl/5*", // Debian's
		"/usr/local/lib/perl5/site_perl/*", "/usr/local/lib/perl5/site_perl/*/*", "/usr/local/lib/perl5/5*", "/usr/local/lib/perl5/5*/*-linux-*",
		"/usr/lib*/perl5/*_perl", "/usr/share/perl5/*_perl", "/usr/lib*/perl5")...)
	m := modules{p: p, pattern: perlUse, why: why{RuleModule, f.path}}
	m.find = func(name string, _ resolved) []resolved {
		rel := strings.ReplaceAll(name, "::", "/")
		for _, d := range dirs {
			module, ok := p.file(path.Join(d, rel+".pm"))
			if !ok {
				continue
			}
			found := []resolved{module}
			for _, d := range dirs {
				if lib, ok := p.file(path.Join(d, "auto", rel, path.Base(rel)+".so")); ok {
					return append(found, lib)
				}
			}
			return found
		}
		return nil
	}
	script, ok, options := p.scriptOf(args, "eEI")
	for i, o := range options {
		if use, ok := strings.CutPrefix(o, "-M"); ok {
			use, _, _ = strings.Cut(use, "=")
			m.name(use, f)
		}
		if (o == "-e" || o == "-E") && i+1 < len(options) {
			for _, match := range perlUse.FindAllStringSubmatch(options[i+1], 100) {
				m.name(match[1], f)
			}
		}
	}
	if ok {
		m.follow(script)
	}
}

// dirs returns the directories that match the patterns, maxDirs at most.
func (p *bootPlanner) dirs(patterns ...string) []string {
	var dirs []string
	for _, pattern := range patterns {
		for _, d := range p.match(pattern, layer.TypeDir) {
			if len(dirs) < maxDirs && !slices.Contains(dirs, d.path) {
				dirs = append(dirs, d.path)
			}
		}
	}
	return dirs
}

var (
	rubyRequire = regexp.MustCompile(`(?m)^(?:  )?(?:(require_relative\s*\(?\s*["'][^"'#]+)["']|require\s*\(?\s*["']([^"'#]+)["'])`)
	rubyQuoted  = regexp.MustCompile(`["'](.+)`)
)

// ruby plans what ruby loads by itself, and what the script requires.
func (p *bootPlanner) ruby(f resolved, args []string) {
	dirs := p.dirs("/usr/local/lib/ruby/site_ruby/*", "/usr/lib/ruby/vendor_ruby", "/usr/lib/*/ruby/vendor_ruby/*", "/usr/local/lib/ruby/3*", "/usr/local/lib/ruby/3*/*-linux*",
		"/usr/lib/ruby/3*", "/usr/lib/*/ruby/3*", "/usr/lib/ruby/3*/*-linux*")
	dirs = append(dirs, p.dirs("/usr/local/bundle/gems/*/lib", "/var/lib/gems/*/gems/*/lib", "/usr/local/lib/ruby/gems/*/gems/*/lib",
		"/usr/share/rubygems-integration/*/gems/*/lib", "/usr/lib/ruby/gems/*/gems/*/lib")...)
	m := modules{p: p, pattern: rubyRequire, why: why{RuleModule, f.path}}
	m.find = func(name string, from resolved) []resolved {
		if quoted, ok := strings.CutPrefix(name, "require_relative"); ok {
			if match := rubyQuoted.FindStringSubmatch(quoted); match != nil {
				at := path.Join(path.Dir(from.path), match[1])
				return p.firstOf(at+".rb", at, at+".so")
			}
			return nil
		}
		for _, d := range dirs {
			if found := p.firstOf(path.Join(d, name+".rb"), path.Join(d, name+".so"), path.Join(d, name)); found != nil {
				return found
			}
		}
		return nil
	}
	for _, name := range []string{"enc/encdb.so", "enc/trans/transdb.so", "rubygems", "monitor", "error_highlight", "did_you_mean", "syntax_suggest/core_ext"} {
		m.name(name, f)
	}
	script, ok, options := p.scriptOf(args, "rIe")
	for i, o := range options {
		if o == "-r" && i+1 < len(options) {
			m.name(options[i+1], f)
		}
	}
	if ok {
		m.follow(script)
	}
}

var (
	phpInclude   = regexp.MustCompile(`\b(?:require|include)(?:_once)?\s*\(?\s*(?:(?:__DIR__|dirname\s*\(\s*__FILE__\s*\))\s*\.\s*)?["']([^"']+\.\w+)["']`)
	phpExtension = regexp.MustCompile(`(?m)^\s*(?:zend_)?extension\s*=\s*"?([^"\s;]+)`)
)

// php plans php's configuration, the extensions that it names, and what the
// script includes.
func (p *bootPlanner) php(f resolved, args []string) {
	w := why{RuleConfig, f.path}
	version := strings.TrimLeft(path.Base(f.path), "-abcdefghijklmnopqrstuvwxyz") // of Debian's php8.2
	api := "cli"
	if strings.Contains(path.Base(f.path), "fpm") {
		api = "fpm"
	}
	dirs := []string{"/usr/local/etc/php", "/usr/local/etc/php/conf.d", "/etc/php.d", "/etc"}
	if version != "" && !strings.Contains(version, "/") {
		etc := path.Join("/etc/php", version, api)
		dirs = append([]string{etc, path.Join(etc, "conf.d"), "/etc/php" + version, "/etc/php" + version + "/conf.d"}, dirs...)
	}
	p.locale("C.UTF-8", f) // its LC_CTYPE if the environment names none
	modules := modules{p: p, pattern: phpInclude, why: why{RuleModule, f.path}}
	for _, d := range dirs {
		for _, ini := range p.list(d, ".ini") {
			if d == "/etc" && path.Base(ini.path) != "php.ini" || ini.Size > maxSmall {
				continue
			}
			p.packAll(ini, w)
			for _, match := range phpExtension.FindAllStringSubmatch(p.text(ini.Node), 100) {
				p.phpExtension(match[1], ini)
			}
		}
	}
	if api == "fpm" {
		for _, d := range dirs {
			for _, conf := range append(p.list(path.Dir(path.Clean(d+"/x")), ".conf"), p.list(path.Join(d, "pool.d"), ".conf")...) {
				p.small(conf.path, w)
			}
		}
	}
	modules.find = func(name string, from resolved) []resolved {
		if path.IsAbs(name) {
			return p.firstOf(path.Join(path.Dir(from.path), name), name)
		}
		return p.firstOf(path.Join(path.Dir(from.path), name), p.absolute(name))
	}
	if script, ok, _ := p.scriptOf(args, "cdfStz"); ok {
		modules.follow(script)
	}
}

// phpExtension plans an extension that an ini file names.
func (p *bootPlanner) phpExtension(name string, ini resolved) {
	if !strings.HasSuffix(name, ".so") {
		name += ".so"
	}
	found := p.firstOf(name)
	if !path.IsAbs(name) {
		found = nil
		for _, dir := range []string{"/usr/lib/php/*", "/usr/local/lib/php/extensions/*", "/usr/lib/php*/modules"} {
			if found = p.glob(path.Join(dir, path.Base(name))); len(found) > 0 {
				break
			}
		}
	}
	for _, lib := range found[:min(len(found), 1)] {
		p.program(lib, why{RuleLibrary, ini.path})
	}
}
