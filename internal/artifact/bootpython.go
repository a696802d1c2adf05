package artifact

import (
	"path"
	"regexp"
	"strings"

	"sluice/internal/layer"
)

var (
	applicationArgument = regexp.MustCompile(`^([A-Za-z_]\w*(?:\.\w+)*):[A-Za-z_]\w*(?:\(\))?$`)

	// importLine finds imports that run when a module is loaded: not indented,
	// or a little, as in try and if. Those in functions have been left out
	// before (atLoading).
	importLine = regexp.MustCompile(`(?m)^(?:    )?(?:from[ \t]+(\.*[\w.]*)[ \t]+import[ \t]+\(?([\w, \t]*)|import[ \t]+([\w., \t]+))`)
)

// maxModules bounds how many python modules are followed.
const maxModules = 2000

// python packs what a python interpreter reads before it runs what its
// arguments say, and the modules that this imports.
func (p *bootPlanner) python(interpreter resolved, args []string) {
	version := strings.TrimPrefix(path.Base(interpreter.path), "python") // "3.11"
	prefix := path.Dir(path.Dir(interpreter.path))
	lib := path.Join(prefix, "lib", "python"+version)
	if !strings.Contains(version, ".") {
		return
	}
	m := pythonModules{p: p, tag: "cpython-" + strings.ReplaceAll(version, ".", ""), why: why{RuleModule, interpreter.path}, known: make(map[string]bool)}
	m.dirs = []string{lib, path.Join(lib, "lib-dynload"), path.Join(lib, "site-packages"),
		path.Join("/usr/local/lib", "python"+version, "dist-packages"), path.Join(prefix, "lib/python3/dist-packages")}
	if p.env["LC_ALL"]+p.env["LC_CTYPE"]+p.env["LANG"] == "" {
		p.locale("C.UTF-8", interpreter) // PEP 538
	}
	for _, dir := range strings.SplitN(p.env["PYTHONPATH"], ":", maxDirs) {
		if dir != "" {
			m.dirs = append([]string{p.absolute(dir)}, m.dirs...)
		}
	}
	venv := path.Dir(path.Dir(p.called)) // a virtual environment's bin/python is a symbolic link (PEP 405)
	if p.small(path.Join(venv, "pyvenv.cfg"), why{RuleRuntime, interpreter.path}) {
		m.dirs = append(m.dirs, path.Join(venv, "lib", "python"+version, "site-packages"))
	}
	// Py_Initialize and site.py; most of these are frozen into newer
	// interpreters.
	for _, name := range []string{"encodings", "encodings.aliases", "encodings.utf_8"} {
		m.load(name, "")
	}
	if version < "3.11" && len(version) <= 4 || version[:2] == "2." {
		for _, name := range []string{"codecs", "io", "abc", "site", "os", "stat", "posixpath", "genericpath", "_collections_abc", "_sitebuiltins"} {
			m.load(name, "")
		}
	}
	m.load("sitecustomize", "")
	for _, d := range m.dirs {
		if dir, ok := p.lookup(d); ok && dir.IsDir() {
			for _, n := range p.names(dir) {
				if strings.HasSuffix(n, ".pth") {
					p.small(path.Join(dir.path, n), why{RuleRuntime, interpreter.path})
				}
			}
		}
	}
	for i, arg := range args {
		switch {
		case arg == "-c" && i+1 < len(args):
			m.imports(args[i+1], "")
			return
		case arg == "-m" && i+1 < len(args):
			m.load("runpy", "")
			m.load(args[i+1], "")
			m.load(args[i+1]+".__main__", "")
			m.applications(args[i+2:])
			return
		case strings.HasPrefix(arg, "-"):
			continue
		}
		if !path.IsAbs(arg) {
			arg = path.Join("/", p.config.Config.WorkingDir, arg)
		}
		if f, ok := p.file(arg); ok {
			p.packAll(f, why{RuleScript, interpreter.path})
			m.dirs = append([]string{path.Dir(f.path)}, m.dirs...)
			m.imports(p.text(f.Node), "")
			m.entryPoint(path.Base(arg))
			m.applications(args[i+1:])
		}
		return
	}
}

// entryPoint loads what a script of a package's own runs, which its metadata
// says (https://packaging.python.org/specifications/entry-points/).
func (m *pythonModules) entryPoint(script string) {
	if strings.ContainsAny(script, "*?[\\") {
		return
	}
	for _, dir := range m.dirs {
		for _, f := range m.p.glob(path.Join(dir, script+"-*", "entry_points.txt")) {
			m.p.small(f.path, m.why)
			for line := range strings.Lines(m.p.text(f.Node)) {
				name, target, ok := strings.Cut(line, "=")
				if module, _, _ := strings.Cut(target, ":"); ok && strings.TrimSpace(name) == script {
					m.load(strings.TrimSpace(module), "")
				}
			}
		}
	}
}

// applications loads the modules of arguments such as wsgi:app, by which servers
// are told what to run.
func (m *pythonModules) applications(args []string) {
	m.dirs = append([]string{m.p.absolute(".")}, m.dirs...)
	for _, a := range args {
		if match := applicationArgument.FindStringSubmatch(a); match != nil {
			m.load(match[1], "")
		}
	}
}

// pythonModules follows imports.
type pythonModules struct {
	p     *bootPlanner
	tag   string   // "cpython-311", of compiled files
	dirs  []string // sys.path
	known map[string]bool
	why   why
}

// load packs a module, by its dotted name, and what it imports. within is the
// directory of the package that it's in, if that is known.
func (m *pythonModules) load(name, within string) {
	if m.known[within+" "+name] || len(m.known) > maxModules || m.p.full() {
		return
	}
	m.known[within+" "+name] = true
	dirs := m.dirs
	if within != "" {
		dirs = []string{within}
	}
	parts := strings.Split(name, ".")
	for _, dir := range dirs {
		found := false
		for _, part := range parts {
			if part == "" {
				return
			}
			sub := path.Join(dir, part)
			if d, ok := m.p.lookup(sub); ok && d.IsDir() && m.source(path.Join(sub, "__init__"), sub) {
				dir, found = sub, true
				continue
			}
			found = m.source(sub, dir)
			break
		}
		if found {
			return
		}
	}
}

// source packs the file of a module, given without its suffix: the compiled
// form if there is one, else the source, else the library. dir is the package
// for its relative imports.
func (m *pythonModules) source(name, dir string) bool {
	f, ok := m.p.file(name + ".py")
	if !ok {
		return m.extension(name)
	}
	if m.p.seen[f.Node] {
		return true
	}
	m.p.seen[f.Node] = true
	compiled, ok := m.p.file(path.Join(path.Dir(name), "__pycache__", path.Base(name)+"."+m.tag+".pyc"))
	if ok {
		m.p.packAll(compiled, m.why)
	} else {
		m.p.packAll(f, m.why)
	}
	m.imports(m.p.text(f.Node), dir)
	return true
}

// extension packs a module that is a library.
func (m *pythonModules) extension(name string) bool {
	dir, ok := m.p.lookup(path.Dir(name))
	if !ok || !dir.IsDir() {
		return false
	}
	base := path.Base(name) + "."
	for _, n := range m.p.names(dir) {
		if child := dir.Children[n]; strings.HasPrefix(n, base) && strings.HasSuffix(n, ".so") && child.Type() == layer.TypeRegular {
			m.p.program(resolved{child, path.Join(dir.path, n)}, m.why)
			return true
		}
	}
	return false
}

// atLoading returns the lines of a source that aren't in a function or a class.
func atLoading(text string) string {
	var b strings.Builder
	inside := false
	for line := range strings.Lines(text) {
		if indented := strings.IndexByte(" \t\r\n#)", line[0]) >= 0; !indented {
			word, _, _ := strings.Cut(line, " ")
			inside = word == "def" || word == "class" || word == "async"
		}
		if !inside {
			b.WriteString(line)
		}
	}
	return b.String()
}

// imports follows the imports of a module's source.
func (m *pythonModules) imports(text, dir string) {
	for _, match := range importLine.FindAllStringSubmatch(atLoading(text), 500) {
		from, names, plain := match[1], match[2], match[3]
		if plain != "" {
			for name := range strings.SplitSeq(plain, ",") {
				if words := strings.Fields(name); len(words) > 0 {
					m.load(words[0], "")
				}
			}
			continue
		}
		within := ""
		if dots := len(from) - len(strings.TrimLeft(from, ".")); dots > 0 {
			within, from = dir, from[dots:]
			for range dots - 1 {
				within = path.Dir(within)
			}
		}
		if from != "" {
			m.load(from, within)
		}
		for name := range strings.SplitSeq(names, ",") { // names may be modules, too
			words := strings.Fields(name)
			if len(words) == 0 {
				continue
			}
			if from == "" {
				m.load(words[0], within)
			} else {
				m.load(from+"."+words[0], within)
			}
		}
	}
}
