package artifact

import (
	"bytes"
	"encoding/binary"
	"path"
	"strings"
)

// common plans what the C library reads in programs that use more of it than
// memory and files. It's planned once.
func (p *bootPlanner) common(f resolved) {
	if !p.first("common") {
		return
	}
	w := why{RuleLibc, f.path}
	for _, name := range []string{"/etc/nsswitch.conf", "/etc/localtime"} {
		p.small(name, w)
	}
	if tz := strings.TrimPrefix(p.env["TZ"], ":"); tz != "" && !strings.Contains(tz, "..") {
		p.small(path.Join("/usr/share/zoneinfo", tz), w)
	}
	p.nameServices(f)
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if v := p.env[name]; v != "" {
			p.locale(v, f)
			break
		}
	}
}

// nameServices plans the libraries that nsswitch.conf (5) names.
func (p *bootPlanner) nameServices(f resolved) {
	conf, ok := p.file("/etc/nsswitch.conf")
	if !ok {
		return
	}
	for line := range strings.Lines(p.text(conf.Node)) {
		database, services, _ := strings.Cut(line, ":")
		if database != "passwd" && database != "group" {
			continue
		}
		for _, s := range strings.Fields(services) {
			if s == "files" { // in the C library itself, since glibc 2.34
				continue
			}
			if lib, ok := p.findLibrary("libnss_"+s+".so.2", nil); ok && len(s) < 64 {
				p.program(lib, why{RuleLibrary, conf.path})
			}
		}
	}
}

// locale plans a locale's files, which lie in a directory of its name or in
// glibc's locale-archive.
func (p *bootPlanner) locale(name string, f resolved) {
	if name == "C" || name == "POSIX" || strings.Contains(name, "/") || len(name) > 64 {
		return
	}
	w := why{RuleLocale, f.path}
	name = normalLocale(name)
	if archive, ok := p.file("/usr/lib/locale/locale-archive"); ok {
		p.localeArchive(archive, name, w)
	}
	for _, l := range p.list("/usr/lib/locale/"+name, "") {
		p.small(l.path, w)
	}
	p.small("/usr/lib/locale/"+name+"/LC_MESSAGES/SYS_LC_MESSAGES", w)
	p.small("/usr/share/locale/locale.alias", w)
	for _, dir := range p.loader.all() {
		p.small(path.Join(dir, "gconv/gconv-modules.cache"), w)
	}
}

// normalLocale spells a locale's codeset as its directory has it: "utf8".
func normalLocale(name string) string {
	language, codeset, ok := strings.Cut(name, ".")
	if !ok {
		return name
	}
	return language + "." + strings.ToLower(strings.ReplaceAll(codeset, "-", ""))
}

// The head of a locale-archive, all of 32 bits in the byte order of the machine
// (glibc, locale/locarchive.h): magic, serial, then of each of its tables where
// it is, how many entries are used, and how many there are.
const (
	archiveMagic  = 0xde020109
	archiveHead   = 14 * 4
	archiveName   = 3 * 4    // an entry of the table of names: hash, where the name is, where the record is
	archiveRecord = 4 + 13*8 // how many refer to it, then where each category is
	maxArchive    = 64 << 10 // names
	maxCategory   = 4 << 20  // bytes of a category
)

// localeArchive plans the tables of a locale-archive and the categories of a
// locale in it.
func (p *bootPlanner) localeArchive(f resolved, name string, w why) {
	head := make([]byte, archiveHead)
	if n, _ := p.readAt(f.Node, head, 0); n < len(head) {
		return
	}
	le := binary.LittleEndian
	if le.Uint32(head) != archiveMagic {
		return
	}
	field := func(i int) int64 { return int64(le.Uint32(head[4*i:])) }
	names, size, end := field(2), min(field(4), maxArchive), field(11)+field(13)*8
	p.pack(f, w, 0, min(end, maxCategory))
	table := make([]byte, size*archiveName)
	n, _ := p.readAt(f.Node, table, names)
	for table = table[:n]; len(table) >= archiveName; table = table[archiveName:] {
		at, record := int64(le.Uint32(table[4:])), int64(le.Uint32(table[8:]))
		if at == 0 || record == 0 || p.full() {
			continue
		}
		have := make([]byte, len(name)+1)
		if n, _ := p.readAt(f.Node, have, at); n < len(have) || !bytes.Equal(have, append([]byte(name), 0)) {
			continue
		}
		b := make([]byte, archiveRecord)
		if n, _ := p.readAt(f.Node, b, record); n < len(b) {
			return
		}
		for b = b[4:]; len(b) >= 8; b = b[8:] {
			if off, n := int64(le.Uint32(b)), int64(le.Uint32(b[4:])); n > 0 && n <= maxCategory {
				p.pack(f, w, off, n)
			}
		}
		return
	}
}

// loaderPaths is where the loader looks for libraries.
type loaderPaths struct {
	env    []string            // LD_LIBRARY_PATH
	config []string            // ld.so.conf, musl's path file
	cache  map[string][]string // ld.so.cache: by name
}

// all returns the directories.
func (l *loaderPaths) all() []string {
	return append(append([]string{}, l.env...), l.config...)
}

// readLoaderPaths reads what says where libraries are.
func (p *bootPlanner) readLoaderPaths() {
	if l := p.env["LD_LIBRARY_PATH"]; l != "" {
		p.loader.env = strings.SplitN(l, ":", maxDirs)
	}
	p.loaderConfig("/etc/ld.so.conf", 0)
	if f, ok := p.file("/etc/ld.so.cache"); ok {
		p.loader.cache = parseLoaderCache([]byte(p.text(f.Node)))
	}
	for _, f := range p.glob("/etc/ld-musl-*.path") {
		for dir := range strings.FieldsFuncSeq(p.text(f.Node), func(r rune) bool { return r == ':' || r == '\n' }) {
			p.addLoaderDir(dir)
		}
	}
}

func (p *bootPlanner) addLoaderDir(dir string) {
	if dir = strings.TrimSpace(dir); strings.HasPrefix(dir, "/") && len(p.loader.config) < maxDirs {
		p.loader.config = append(p.loader.config, dir)
	}
}

// loaderConfig adds the directories of an ld.so.conf to the library path.
func (p *bootPlanner) loaderConfig(name string, depth int) {
	f, ok := p.file(name)
	if !ok || depth > 2 || !p.first("loader configuration "+f.path) {
		return
	}
	for line := range strings.Lines(p.text(f.Node)) {
		line, _, _ = strings.Cut(strings.TrimSpace(line), "#")
		if pattern, ok := strings.CutPrefix(line, "include"); ok {
			pattern = strings.TrimSpace(pattern)
			if !path.IsAbs(pattern) {
				pattern = path.Join(path.Dir(f.path), pattern)
			}
			for _, included := range p.glob(pattern) {
				p.loaderConfig(included.path, depth+1)
			}
		} else {
			p.addLoaderDir(line)
		}
	}
}

// The form of ld.so.cache (glibc, sysdeps/generic/dl-cache.h).
const (
	cacheMagicOld   = "ld.so-1.7.0\x00"
	cacheMagic      = "glibc-ld.so.cache1.1"
	cacheHead       = 48
	cacheEntry      = 24
	maxCacheEntries = 1 << 15
)

// parseLoaderCache returns the paths of each library in an ld.so.cache, in the
// cache's order. Those for processors of special abilities are left out.
func parseLoaderCache(b []byte) map[string][]string {
	if bytes.HasPrefix(b, []byte(cacheMagicOld)) && len(b) >= 16 { // older entries, then the newer form
		skip := 16 + 12*int64(binary.LittleEndian.Uint32(b[12:]))
		if skip = (skip + 7) &^ 7; skip > int64(len(b)) {
			return nil
		}
		b = b[skip:]
	}
	if !bytes.HasPrefix(b, []byte(cacheMagic)) || len(b) < cacheHead {
		return nil
	}
	order := binary.ByteOrder(binary.LittleEndian)
	if b[28]&3 == 3 { // the flags say big endian
		order = binary.BigEndian
	}
	text := func(off uint32) string {
		if int64(off) >= int64(len(b)) {
			return ""
		}
		s := b[off:min(int64(off)+4096, int64(len(b)))]
		s, _, ok := bytes.Cut(s, []byte{0})
		if !ok {
			return ""
		}
		return string(s)
	}
	cache := make(map[string][]string)
	entries := b[cacheHead:]
	for range min(order.Uint32(b[20:]), maxCacheEntries) {
		if len(entries) < cacheEntry {
			break
		}
		name, file := text(order.Uint32(entries[4:])), text(order.Uint32(entries[8:]))
		if hwcap := order.Uint64(entries[16:]); hwcap == 0 && name != "" && path.IsAbs(file) && len(cache[name]) < 8 {
			cache[name] = append(cache[name], file)
		}
		entries = entries[cacheEntry:]
	}
	return cache
}
