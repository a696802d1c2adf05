package artifact

import (
	"context"
	"path"
	"slices"
	"strings"

	"sluice/internal/layer"
	"sluice/oci"
)

// bootPlanner decides what of an image goes into its boot pack, by what is
// known without running it. Everything it finds is a guess: what it misses is
// fetched when it's read, what it has too much costs a little bandwidth.
type bootPlanner struct {
	*bootFiles
	config oci.ImageConfig
	env    map[string]string
	loader loaderPaths
	seen   map[*layer.Node]bool // programs, scripts and modules that have been looked at
	once   map[string]bool      // rules that need no second time, by name
	depth  int                  // of commands that run commands
	called string               // the path of the program whose command line is looked at, with symbolic links
}

const (
	maxDirs     = 64   // of a search path
	maxFiles    = 4096 // programs, libraries and modules that are followed
	maxCommands = 16   // that run each other
	maxWords    = 64   // of a command line
	maxListed   = 128  // files that are taken of one directory
)

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// selectBoot gathers the chunks that starting the image reads.
func selectBoot(files *bootFiles, config oci.ImageConfig) {
	p := newBootPlanner(files, config)
	w := why{rule: RuleAccount} // runc looks the user up before anything else
	p.small("/etc/passwd", w)
	p.small("/etc/group", w)
	if argv := slices.Concat(config.Config.Entrypoint, config.Config.Cmd); len(argv) > 0 {
		p.command(argv, why{rule: RuleProgram})
	}
}

func newBootPlanner(files *bootFiles, config oci.ImageConfig) *bootPlanner {
	p := &bootPlanner{
		bootFiles: files, config: config,
		env: make(map[string]string), seen: make(map[*layer.Node]bool), once: make(map[string]bool),
	}
	for _, kv := range config.Config.Env {
		k, v, _ := strings.Cut(kv, "=")
		p.env[k] = v
	}
	if p.env["PATH"] == "" {
		p.env["PATH"] = defaultPath
	}
	p.readLoaderPaths()
	return p
}

// first reports whether a rule hasn't been asked for this yet.
func (p *bootPlanner) first(rule string) bool {
	if p.once[rule] {
		return false
	}
	p.once[rule] = true
	return true
}

// maxSmall is up to what size files are planned whole that are read because of
// their name or place alone, and not because something runs them.
const maxSmall = 1 << 20

// small plans a file that isn't large, if it exists.
func (p *bootPlanner) small(name string, w why) bool {
	f, ok := p.file(name)
	if ok = ok && f.Size <= maxSmall; ok {
		p.packAll(f, w)
	}
	return ok
}

// list returns the regular files in a directory whose names have one of the
// suffixes, by name, maxListed at most.
func (p *bootPlanner) list(dir string, suffixes ...string) []resolved {
	d, ok := p.lookup(dir)
	if !ok || !d.IsDir() {
		return nil
	}
	var all []resolved
	for _, n := range p.names(d) {
		if len(all) == maxListed {
			break
		}
		if !slices.ContainsFunc(suffixes, func(s string) bool { return strings.HasSuffix(n, s) }) {
			continue
		}
		if f, ok := p.file(path.Join(d.path, n)); ok {
			all = append(all, f)
		}
	}
	return all
}

// glob returns the regular files whose paths match a pattern, in which only
// elements may have wildcards (path.Match), maxListed at most. It's
// bounded like all that is looked up.
func (p *bootPlanner) glob(pattern string) []resolved { return p.match(pattern, layer.TypeRegular) }

// match is glob for files of a type.
func (p *bootPlanner) match(pattern string, kind uint32) []resolved {
	dirs := []string{"/"}
	elements := strings.Split(strings.Trim(path.Clean(pattern), "/"), "/")
	for i, e := range elements {
		var next []string
		for _, dir := range dirs {
			if !strings.ContainsAny(e, "*?[") {
				next = append(next, path.Join(dir, e))
				continue
			}
			d, ok := p.lookup(dir)
			if !ok || !d.IsDir() {
				continue
			}
			for _, n := range p.names(d) {
				if ok, err := path.Match(e, n); ok && err == nil && (i < len(elements)-1 || len(next) < maxListed) {
					next = append(next, path.Join(dir, n))
				}
			}
		}
		dirs = next[:min(len(next), maxListed)]
	}
	var all []resolved
	for _, name := range dirs {
		if f, ok := p.lookup(name); ok && f.Type() == kind {
			all = append(all, f)
		}
	}
	return all
}

// absolute returns a path as the container's process sees it.
func (p *bootPlanner) absolute(name string) string {
	if path.IsAbs(name) {
		return name
	}
	return path.Join("/", p.config.Config.WorkingDir, name)
}

// executable finds the program that a name stands for, as execvp(3) does.
func (p *bootPlanner) executable(name string) (resolved, bool) {
	f, _, ok := p.which(name)
	return f, ok
}

// which is executable, and says under which path the program was found, with
// the symbolic links in that.
func (p *bootPlanner) which(name string) (f resolved, at string, ok bool) {
	if strings.Contains(name, "/") {
		at = p.absolute(name)
		f, ok = p.file(at)
		return f, at, ok
	}
	for _, dir := range strings.SplitN(p.env["PATH"], ":", maxDirs) {
		at = path.Join(p.absolute(dir), name)
		if f, ok := p.file(at); ok && f.Mode&0o111 != 0 && name != "" {
			return f, at, true
		}
	}
	return resolved{}, "", false
}

// command plans what a command line starts: its program, and what that does
// with the arguments. Entrypoints are often programs or scripts that run their
// arguments.
func (p *bootPlanner) command(argv []string, w why) {
	if len(argv) == 0 || p.depth >= maxCommands || p.full() {
		return
	}
	p.depth++
	defer func() { p.depth-- }()
	argv = argv[:min(len(argv), maxWords)]
	f, at, ok := p.which(argv[0])
	if !ok {
		return
	}
	if !p.program(f, w) {
		p.script(f, argv, why{RuleScript, w.by})
		p.wrapped(argv[1:], f)
		return
	}
	p.common(f)
	defer func(called string) { p.called = called }(p.called)
	p.called = at
	p.interpret(f, path.Base(at), argv[1:])
}

// interpret plans what an ELF program does with its arguments, by its names: its
// file's and the one that it's called by.
func (p *bootPlanner) interpret(f resolved, called string, args []string) {
	for _, name := range []string{path.Base(f.path), called} {
		if runtime := runtimeOf(name); runtime != nil {
			runtime(p, f, args)
			if !strings.HasSuffix(strings.TrimRight(name, "0123456789."), "sh") {
				p.small("/etc/host.conf", why{RuleLibc, f.path}) // servers resolve names
			}
			return
		}
	}
	p.configuration(f, called)
	for _, a := range args {
		p.argument(a, f)
	}
	if p.depth == 1 || strings.Contains(wrappers, " "+called+" ") {
		p.wrapped(args, f)
	}
}

// wrappers are programs that run a command in their arguments. What an image's
// config names is taken for one in any case.
const wrappers = " tini dumb-init catatonit gosu su-exec setpriv runuser env nice nohup timeout stdbuf xargs find chroot sudo su "

// wrapped plans the command in the arguments of a program that runs another,
// such as tini, gosu, nice, env, or an entrypoint script.
func (p *bootPlanner) wrapped(args []string, f resolved) {
	for i, a := range args {
		if a == "" || strings.HasPrefix(a, "-") || strings.Contains(a, "=") {
			continue
		}
		if e, ok := p.executable(a); ok && e.Mode&0o111 != 0 {
			p.command(args[i:], why{RuleProgram, f.path})
			return
		}
	}
}

// argument plans the file that an argument names.
func (p *bootPlanner) argument(arg string, f resolved) {
	_, value, ok := strings.Cut(arg, "=") // --config=FILE
	if !ok || !strings.HasPrefix(arg, "-") {
		value = arg
	}
	if strings.HasPrefix(value, "-") || !strings.ContainsAny(value, "/.") {
		return
	}
	if named, ok := p.file(p.absolute(value)); ok && named.Size <= maxSmall {
		p.packAll(named, why{RuleArgument, f.path})
	}
}

// configuration plans the files in /etc that have a program's name.
func (p *bootPlanner) configuration(f resolved, called string) {
	w := why{RuleConfig, f.path}
	for _, name := range []string{called, strings.TrimSuffix(called, "-server"), strings.TrimSuffix(called, "d")} {
		if name == "" || !p.first("configuration of "+name) {
			continue
		}
		p.small("/etc/"+name+".conf", w)
		for _, c := range p.list("/etc/"+name, ".conf", ".cnf", ".cfg", ".ini", ".toml", ".yml", ".yaml") {
			p.small(c.path, w)
		}
	}
}

// runtimeOf returns the rule of an interpreter or another program that reads
// many files by itself, or nil.
func runtimeOf(name string) func(p *bootPlanner, f resolved, args []string) {
	name, _, _ = strings.Cut(name, "-") // perl5.36-x86_64-linux-gnu
	switch strings.TrimRight(name, "0123456789.") {
	case "sh", "bash", "dash", "ash", "ksh", "zsh", "busybox":
		return (*bootPlanner).shell
	case "python", "pypy":
		return (*bootPlanner).python
	case "node", "nodejs":
		return (*bootPlanner).node
	case "java":
		return (*bootPlanner).java
	case "perl":
		return (*bootPlanner).perl
	case "php":
		return (*bootPlanner).php
	case "ruby":
		return (*bootPlanner).ruby
	case "nginx":
		return (*bootPlanner).nginx
	case "apache", "httpd":
		return (*bootPlanner).apache
	case "postgres", "initdb":
		return (*bootPlanner).postgres
	}
	return nil
}

// buildBootPack makes the boot pack, or nil if there's nothing to put into it.
func buildBootPack(ctx context.Context, files *bootFiles, config oci.ImageConfig, sink Sink) (*oci.Descriptor, error) {
	if _, err := planBoot(files, config); err != nil {
		return nil, err
	}
	if len(files.order) == 0 {
		return nil, nil
	}
	if err := files.prefetch(); err != nil {
		return nil, err
	}
	parts := [][]byte{encodeBootPackHeader(files.order)}
	for _, ref := range files.order {
		parts = append(parts, files.frames[ref])
	}
	desc, err := store(ctx, sink, MediaTypeBootPack, parts...)
	return &desc, err
}
