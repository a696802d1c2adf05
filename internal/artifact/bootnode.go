package artifact

import (
	"encoding/json"
	"path"
	"regexp"
	"strings"
)

// requireCall finds what a JavaScript module loads: require("x"), import "x",
// import … from "x", import("x"), export … from "x".
var requireCall = regexp.MustCompile(`(?:\brequire\s*\(\s*|\bfrom\s*|\bimport\s*\(?\s*)["']([^"'\s]{1,200})["']`)

// node plans what node reads before it runs the module that its arguments say,
// and the modules that this loads.
func (p *bootPlanner) node(f resolved, args []string) {
	m := nodeModules{p: p, why: why{RuleModule, f.path}}
	prefix := path.Dir(path.Dir(f.path))
	m.global = strings.SplitN(p.env["NODE_PATH"], ":", maxDirs)
	m.global = append(m.global, path.Join(prefix, "lib/node"), path.Join(prefix, "share/nodejs"), path.Join(prefix, "lib/nodejs"))
	// Debian keeps what node is built with beside it.
	for _, builtin := range []string{"undici/undici-fetch.js", "cjs-module-lexer/lexer.js", "cjs-module-lexer/dist/lexer.js", "acorn/dist/acorn.js", "acorn-walk/dist/walk.js"} {
		p.small(path.Join(prefix, "share/nodejs", builtin), why{RuleRuntime, f.path})
	}
	for i, a := range args {
		switch {
		case (a == "-r" || a == "--require" || a == "--import") && i+1 < len(args):
			m.load(args[i+1], p.absolute("."))
			continue
		case strings.HasPrefix(a, "-") || i > 0 && (args[i-1] == "-r" || args[i-1] == "--require" || args[i-1] == "--import"):
			continue
		}
		m.load(p.absolute(a), "/")
		return
	}
}

// nodeModules follows what JavaScript modules load, as node resolves it
// (https://nodejs.org/api/modules.html, "All together").
type nodeModules struct {
	p      *bootPlanner
	global []string
	why    why
}

// load plans the module of a name that a module in dir loads.
func (m *nodeModules) load(name, dir string) {
	if len(m.p.seen) > maxModules || m.p.full() {
		return
	}
	if strings.HasPrefix(name, "/") || strings.HasPrefix(name, "./") || strings.HasPrefix(name, "../") || name == "." || name == ".." {
		if !path.IsAbs(name) {
			name = path.Join(dir, name)
		}
		_ = m.file(name) || m.directory(name, "")
		return
	}
	parts := strings.SplitN(name, "/", 3)
	pkg, sub := parts[0], strings.Join(parts[1:], "/")
	if strings.HasPrefix(name, "@") && len(parts) > 1 {
		pkg, sub = parts[0]+"/"+parts[1], strings.Join(parts[2:], "/")
	}
	for range 64 {
		if path.Base(dir) != "node_modules" && m.in(path.Join(dir, "node_modules"), pkg, sub) || dir == "/" {
			break
		}
		dir = path.Dir(dir)
	}
	if dir != "/" {
		return
	}
	for _, g := range m.global {
		if path.IsAbs(g) && m.in(g, pkg, sub) {
			return
		}
	}
}

// in plans a module of a package in a directory of packages.
func (m *nodeModules) in(dir, pkg, sub string) bool {
	at, ok := m.p.lookup(path.Join(dir, pkg))
	if !ok {
		return m.file(path.Join(dir, pkg, sub))
	}
	if !at.IsDir() {
		return false
	}
	if sub == "" {
		return m.directory(at.path, ".")
	}
	return m.directory(at.path, "./"+sub) || m.file(path.Join(at.path, sub)) || m.directory(path.Join(at.path, sub), "")
}

// packageJSON is what of a package.json decides what is loaded.
type packageJSON struct {
	Main    string          `json:"main"`
	Exports json.RawMessage `json:"exports"`
}

// directory plans a package's module: the one that an export is, or the main one.
func (m *nodeModules) directory(dir, export string) bool {
	var info packageJSON
	if f, ok := m.p.file(path.Join(dir, "package.json")); ok && f.Size <= maxInspected {
		m.p.packAll(f, m.why)
		if json.Unmarshal([]byte(m.p.text(f.Node)), &info) != nil {
			info = packageJSON{}
		}
	}
	if export != "" {
		if target := exported(info.Exports, export, 0); target != "" && m.file(path.Join(dir, target)) {
			return true
		}
		if export != "." {
			return false
		}
	}
	if main := path.Join(dir, info.Main); info.Main != "" && (m.file(main) || m.file(path.Join(main, "index"))) {
		return true
	}
	return m.file(path.Join(dir, "index"))
}

// exported resolves an entry of a package.json's exports.
func exported(raw json.RawMessage, name string, depth int) string {
	var target string
	if depth > 8 || len(raw) == 0 {
		return ""
	}
	if json.Unmarshal(raw, &target) == nil {
		if depth > 0 || name == "." {
			return target
		}
		return ""
	}
	var list []json.RawMessage
	if json.Unmarshal(raw, &list) == nil && len(list) > 0 {
		return exported(list[0], name, depth+1)
	}
	var conditions map[string]json.RawMessage
	if json.Unmarshal(raw, &conditions) != nil {
		return ""
	}
	if entry, ok := conditions[name]; ok {
		return exported(entry, name, depth+1)
	}
	for _, c := range []string{"node", "require", "import", "default"} {
		if entry, ok := conditions[c]; ok && (depth > 0 || name == ".") {
			return exported(entry, name, depth+1)
		}
	}
	return ""
}

// file plans the module of a path, which may lack its suffix.
func (m *nodeModules) file(name string) bool {
	for _, suffix := range []string{"", ".js", ".json", ".node", ".mjs", ".cjs"} {
		f, ok := m.p.file(name + suffix)
		if !ok {
			continue
		}
		if m.p.seen[f.Node] {
			return true
		}
		if strings.HasSuffix(f.path, ".node") {
			m.p.program(f, m.why)
			return true
		}
		m.p.seen[f.Node] = true
		if f.Size > 4*maxInspected {
			m.p.pack(f, m.why, 0, 1)
			return true
		}
		m.p.packAll(f, m.why)
		// node looks for the package of each module that isn't .mjs or .cjs.
		for dir, n := path.Dir(f.path), 0; n < 16; dir, n = path.Dir(dir), n+1 {
			if m.p.small(path.Join(dir, "package.json"), m.why) || dir == "/" || path.Base(dir) == "node_modules" {
				break
			}
		}
		if !strings.HasSuffix(f.path, ".json") {
			for _, match := range requireCall.FindAllStringSubmatch(m.p.text(f.Node), 500) {
				m.load(strings.TrimPrefix(match[1], "node:"), path.Dir(f.path))
			}
		}
		return true
	}
	return false
}
