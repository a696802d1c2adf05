package artifact

import (
	"path"
	"regexp"
	"strings"
)

// nginxFile finds the directives of nginx's configuration that name files that
// it reads before it serves.
var nginxFile = regexp.MustCompile(`(?m)(?:^|[;{\s])(include|load_module|ssl_certificate|ssl_certificate_key|ssl_dhparam|ssl_trusted_certificate|auth_basic_user_file|js_import|perl_modules)\s+["']?([^"';\s]+)`)

// nginx plans nginx's configuration, what that includes, and the modules that it
// loads.
func (p *bootPlanner) nginx(f resolved, args []string) {
	conf, prefix := "/etc/nginx/nginx.conf", "/usr/share/nginx"
	for i, a := range args[:max(len(args)-1, 0)] {
		switch a {
		case "-c":
			conf = p.absolute(args[i+1])
		case "-p":
			prefix = p.absolute(args[i+1])
		}
	}
	for _, name := range []string{conf, path.Join(prefix, "conf/nginx.conf"), path.Join(path.Dir(path.Dir(f.path)), "conf/nginx.conf"), "/usr/local/openresty/nginx/conf/nginx.conf"} {
		if c, ok := p.file(name); ok {
			p.nginxConfig(c, path.Dir(c.path), prefix, 0)
			return
		}
	}
}

func (p *bootPlanner) nginxConfig(c resolved, dir, prefix string, depth int) {
	w := why{RuleConfig, c.path}
	if depth > 8 || c.Size > maxInspected || !p.first("nginx configuration "+c.path) || p.full() {
		return
	}
	p.packAll(c, w)
	for _, match := range nginxFile.FindAllStringSubmatch(p.text(c.Node), 500) {
		name := match[2]
		if match[1] == "load_module" {
			for _, base := range []string{"/", prefix, "/usr/lib/nginx", "/etc/nginx"} {
				if lib, ok := p.file(path.Join(base, name)); ok {
					p.program(lib, why{RuleLibrary, c.path})
					break
				}
			}
			continue
		}
		if !path.IsAbs(name) {
			name = path.Join(dir, name)
		}
		for _, included := range p.glob(name) {
			if match[1] == "include" {
				p.nginxConfig(included, dir, prefix, depth+1)
			} else {
				p.small(included.path, w)
			}
		}
	}
}

// apacheFile finds the directives of Apache's configuration that name files that
// it reads before it serves.
var apacheFile = regexp.MustCompile(`(?mi)^\s*(Include|IncludeOptional|LoadModule|LoadFile|TypesConfig|MimeMagicFile|SSLCertificateFile|SSLCertificateKeyFile)\s+(?:\w+_module\s+)?"?([^"\s]+)`)

// apache plans Apache's configuration, what that includes, and its modules.
func (p *bootPlanner) apache(f resolved, args []string) {
	roots := []string{"/etc/apache2", "/usr/local/apache2", "/etc/httpd"}
	confs := []string{"/etc/apache2/apache2.conf", "/usr/local/apache2/conf/httpd.conf", "/etc/httpd/conf/httpd.conf", "/etc/apache2/httpd.conf"}
	for i, a := range args[:max(len(args)-1, 0)] {
		if a == "-f" {
			confs = []string{p.absolute(args[i+1])}
		}
	}
	for _, c := range p.firstOf(confs...) {
		p.apacheConfig(c, roots, 0)
	}
	p.small("/etc/mime.types", why{RuleConfig, f.path})
}

func (p *bootPlanner) apacheConfig(c resolved, roots []string, depth int) {
	if depth > 8 || c.Size > maxInspected || !p.first("apache configuration "+c.path) || p.full() {
		return
	}
	p.packAll(c, why{RuleConfig, c.path})
	for _, match := range apacheFile.FindAllStringSubmatch(p.text(c.Node), 500) {
		names := []string{match[2]}
		if !path.IsAbs(match[2]) {
			names = nil
			for _, root := range roots {
				names = append(names, path.Join(root, match[2]))
			}
		}
		for _, name := range names {
			for _, found := range p.glob(name) {
				switch directive := strings.ToLower(match[1]); {
				case strings.HasPrefix(directive, "include"):
					p.apacheConfig(found, roots, depth+1)
				case strings.HasPrefix(directive, "load"):
					p.program(found, why{RuleLibrary, c.path})
				default:
					p.small(found.path, why{RuleConfig, c.path})
				}
			}
		}
	}
}

// postgres plans what a PostgreSQL server reads at its start, and what initdb
// makes a database from.
func (p *bootPlanner) postgres(f resolved, _ []string) {
	bin := path.Dir(f.path)
	version := path.Base(path.Dir(bin)) // of Debian's /usr/lib/postgresql/15/bin
	w := why{RuleRuntime, f.path}
	if strings.HasPrefix(path.Base(f.path), "initdb") {
		if server, ok := p.file(path.Join(bin, "postgres")); ok {
			p.program(server, why{RuleProgram, f.path})
		}
		p.locale("C.UTF-8", f)
		for _, name := range []string{"sh", "locale"} { // it asks which locales there are
			if program, ok := p.executable(name); ok {
				p.program(program, why{RuleProgram, f.path})
			}
		}
	}
	p.small("/usr/share/postgresql-common/pg_wrapper", w)
	for _, share := range []string{path.Join("/usr/share/postgresql", version), path.Join(bin, "../share/postgresql"), path.Join(bin, "../share"), "/usr/share/postgresql"} {
		if _, ok := p.file(path.Join(share, "postgres.bki")); !ok {
			continue
		}
		p.small(path.Join(share, "timezonesets/Default"), w)
		if strings.HasPrefix(path.Base(f.path), "initdb") {
			for _, source := range p.list(share, ".bki", ".sql", ".sample", ".txt") {
				p.small(source.path, w)
			}
			for _, source := range p.glob(path.Join(share, "extension/plpgsql*")) {
				p.small(source.path, w)
			}
		}
		break
	}
	for _, lib := range []string{path.Join(bin, "../lib"), path.Join(bin, "../lib/postgresql")} {
		for _, name := range []string{"dict_snowball.so", "plpgsql.so"} {
			if l, ok := p.file(path.Join(lib, name)); ok && strings.HasPrefix(path.Base(f.path), "initdb") {
				p.program(l, why{RuleLibrary, f.path})
			}
		}
	}
}
