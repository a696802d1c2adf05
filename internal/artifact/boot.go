package artifact

import (
	"context"
	"path"
	"slices"
	"strings"

	"sluice/internal/layer"
	"sluice/oci"
)

// bootPlan decides what of an image goes into its boot pack, by what is known
// without running it. Everything it finds is a guess: what it misses is fetched
// when it's read, what it has too much costs a little bandwidth.
type bootPlan struct {
	*bootFiles
	config      oci.ImageConfig
	env         map[string]string
	libraryPath []string
	seen        map[*layer.Node]bool // programs and scripts that have been looked at
	modules     map[string]bool      // python's
}

// commonFiles are what the C library reads in many processes. The locale is
// what python and others set if the environment names none.
var commonFiles = []string{"/etc/nsswitch.conf", "/etc/localtime", "/etc/host.conf", "/etc/ssl/openssl.cnf", "/usr/lib/locale/C.utf8/LC_CTYPE"}

// localeFiles are what it reads if the environment names one.
var localeFiles = []string{"/usr/lib/locale/locale-archive", "/usr/lib/locale/C.utf8/LC_COLLATE", "/usr/lib/locale/C.utf8/LC_ADDRESS"}

const (
	maxDirs  = 64   // of a search path
	maxFiles = 4096 // programs, libraries and modules that are followed
)

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// selectBoot gathers the chunks that starting the image reads.
func selectBoot(files *bootFiles, config oci.ImageConfig) {
	p := &bootPlan{bootFiles: files, config: config, env: make(map[string]string), seen: make(map[*layer.Node]bool), modules: make(map[string]bool)}
	for _, kv := range config.Config.Env {
		k, v, _ := strings.Cut(kv, "=")
		p.env[k] = v
	}
	if p.env["PATH"] == "" {
		p.env["PATH"] = defaultPath
	}
	if l := p.env["LD_LIBRARY_PATH"]; l != "" {
		p.libraryPath = strings.SplitN(l, ":", maxDirs)
	}
	p.loaderConfig("/etc/ld.so.conf", 0)
	p.packFile("/etc/passwd") // runc looks the user up before anything else
	p.packFile("/etc/group")
	if argv := slices.Concat(config.Config.Entrypoint, config.Config.Cmd); len(argv) > 0 {
		p.command(argv)
	}
}

// common packs the files that have nothing to do with the program.
func (p *bootPlan) common() {
	for _, name := range commonFiles {
		p.packFile(name)
	}
	for _, dir := range p.libraryPath {
		p.packFile(path.Join(dir, "gconv/gconv-modules.cache")) // iconv's, in UTF-8 programs such as python
	}
	if p.env["LANG"] != "" || p.env["LC_ALL"] != "" || p.env["LC_CTYPE"] != "" {
		for _, name := range localeFiles {
			p.packFile(name)
		}
	}
}

// maxCommonFile is up to what size such a file is worth it.
const maxCommonFile = 1 << 20

// packFile packs a small file, if it exists.
func (p *bootPlan) packFile(name string) {
	if f, ok := p.file(name); ok && f.Size <= maxCommonFile {
		p.packAll(f.Node)
	}
}

// loaderConfig adds the directories of an ld.so.conf to the library path.
func (p *bootPlan) loaderConfig(name string, depth int) {
	f, ok := p.file(name)
	if !ok || depth > 2 {
		return
	}
	for line := range strings.Lines(p.text(f.Node)) {
		line, _, _ = strings.Cut(strings.TrimSpace(line), "#")
		if pattern, ok := strings.CutPrefix(line, "include "); ok {
			dir, ok := p.lookup(path.Dir(path.Join("/etc", strings.TrimPrefix(strings.TrimSpace(pattern), "/etc"))))
			if !ok {
				continue
			}
			for _, n := range dir.Names() {
				if strings.HasSuffix(n, ".conf") {
					p.loaderConfig(path.Join(dir.path, n), depth+1)
				}
			}
		} else if strings.HasPrefix(line, "/") && len(p.libraryPath) < maxDirs {
			p.libraryPath = append(p.libraryPath, line)
		}
	}
}

// command packs what a command line starts: its program, and what its arguments
// name. Entrypoints are often programs or scripts that run their arguments.
func (p *bootPlan) command(argv []string) {
	f, ok := p.executable(argv[0])
	if ok {
		p.program(f, wholeProgram)
	}
	p.common()
	if ok {
		if isPython(path.Base(f.path)) {
			p.python(f, argv[1:])
		}
	}
	for _, arg := range argv[1:min(len(argv), 32)] {
		if words := strings.Fields(arg); len(words) > 1 { // such as sh -c "exec app --flag"
			for _, w := range words[:min(len(words), 32)] {
				p.argument(strings.Trim(w, `"';&|()`))
			}
		} else {
			p.argument(arg)
		}
	}
}

// argument packs the file or the program that an argument names.
func (p *bootPlan) argument(arg string) {
	if arg == "" || strings.HasPrefix(arg, "-") || p.full() {
		return
	}
	if strings.Contains(arg, "/") || strings.Contains(arg, ".") {
		if f, ok := p.file(path.Join("/", p.config.Config.WorkingDir, arg)); ok && !path.IsAbs(arg) {
			p.program(f, wholeProgram)
			return
		}
	}
	if f, ok := p.executable(arg); ok {
		p.program(f, wholeProgram)
		if isPython(path.Base(f.path)) {
			p.python(f, nil)
		}
	}
}

// executable finds the program that a name stands for, as execvp(3) does.
func (p *bootPlan) executable(name string) (resolved, bool) {
	if strings.Contains(name, "/") {
		if !path.IsAbs(name) {
			name = path.Join("/", p.config.Config.WorkingDir, name)
		}
		return p.file(name)
	}
	for _, dir := range strings.SplitN(p.env["PATH"], ":", maxDirs) {
		if f, ok := p.file(path.Join("/", dir, name)); ok && f.Mode&0o111 != 0 {
			return f, true
		}
	}
	return resolved{}, false
}

// script packs a file that isn't ELF and, if it names one, its interpreter.
func (p *bootPlan) script(f resolved) {
	if f.Size > maxInspected {
		p.pack(f.Node, 0, 1)
		return
	}
	p.packAll(f.Node)
	line, _, _ := strings.Cut(p.text(f.Node), "\n")
	line, ok := strings.CutPrefix(line, "#!")
	words := strings.Fields(line)
	if !ok || len(words) == 0 {
		return
	}
	if path.Base(words[0]) == "env" {
		if env, ok := p.executable(words[0]); ok {
			p.program(env, wholeProgram)
		}
		for words = words[1:]; len(words) > 0 && (strings.HasPrefix(words[0], "-") || strings.Contains(words[0], "=")); {
			words = words[1:]
		}
		if len(words) == 0 {
			return
		}
	}
	interpreter, ok := p.executable(words[0])
	if !ok {
		return
	}
	p.program(interpreter, wholeProgram)
	if isPython(path.Base(interpreter.path)) {
		p.python(interpreter, []string{f.path})
	}
}

// buildBootPack makes the boot pack, or nil if there's nothing to put into it.
func buildBootPack(ctx context.Context, files *bootFiles, config oci.ImageConfig, sink Sink) (*oci.Descriptor, error) {
	selectBoot(files, config)
	if files.err != nil {
		return nil, files.err
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
