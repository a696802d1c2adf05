package artifact

import (
	"bytes"
	"encoding/binary"
	"path"
	"strings"

	"sluice/internal/layer"
)

// Bounds of an ELF file. Package debug/elf isn't used because it isn't made
// for hostile input.
const (
	maxProgramHeaders = 256
	maxDynamicSize    = 64 << 10
	maxStringTable    = 64 << 20
	maxNeeded         = 256 // libraries
	maxRunpath        = 32  // directories

	// How much of one segment is planned. Programs and libraries run nearly all
	// over their code when they start, because constructors are everywhere and
	// the kernel reads around each page that it needs; of the largest it's the
	// front part, where compilers put what runs first.
	maxCode   = 16 << 20
	maxTables = 16 << 20 // before the code: symbols, relocations
	maxData   = 16 << 20 // that is written to: relocations go there
	maxConst  = 6 << 20  // behind the code: constants

	// constRatio is how many times larger than its code the constants of a
	// library are which is a store of data. Those are looked up, not read.
	constRatio = 2
)

// elfFile is what starting a program depends on.
type elfFile struct {
	interp   string   // the loader
	needed   []string // libraries, by name
	rpath    []string // where it wants them looked for first,
	runpath  []string // or after LD_LIBRARY_PATH
	class    byte     // 32 or 64 bits
	machine  uint16
	segments []elfSegment
	entry    int64 // offset of the first instruction, or -1
}

// elfSegment is a part of the file that is mapped.
type elfSegment struct {
	offset, size, vaddr int64
	write, exec         bool
}

// elfFields is where the fields of the two classes of ELF are (elf(5)).
type elfFields struct {
	order                            binary.ByteOrder
	word                             int // 4 or 8
	entry, phoff, phentsize, phnum   int
	flags, offset, vaddr, size, phdr int // of a program header
}

// fieldsOf returns how an ELF header is to be read.
func fieldsOf(ident []byte) (elfFields, bool) {
	if !bytes.HasPrefix(ident, []byte("\x7fELF")) {
		return elfFields{}, false
	}
	f := elfFields{order: binary.LittleEndian, word: 8, entry: 24, phoff: 32, phentsize: 54, phnum: 56, flags: 4, offset: 8, vaddr: 16, size: 32, phdr: 56}
	if ident[4] == 1 {
		f = elfFields{order: binary.LittleEndian, word: 4, entry: 24, phoff: 28, phentsize: 42, phnum: 44, flags: 24, offset: 4, vaddr: 8, size: 16, phdr: 32}
	}
	if ident[5] == 2 {
		f.order = binary.BigEndian
	}
	return f, true
}

// number reads a field of the class's word size; what is beyond 2^62 is
// nonsense and becomes -1.
func (f elfFields) number(b []byte) int64 {
	var n uint64
	if f.word == 8 {
		n = f.order.Uint64(b)
	} else {
		n = uint64(f.order.Uint32(b))
	}
	if n > 1<<62 {
		return -1
	}
	return int64(n)
}

// elf parses a file, if it's ELF.
func (b *bootFiles) elf(f *layer.Node) (*elfFile, bool) {
	header := make([]byte, 64)
	if n, _ := b.readAt(f, header, 0); n < 52 {
		return nil, false
	}
	fields, ok := fieldsOf(header)
	if !ok {
		return nil, false
	}
	count := int(fields.order.Uint16(header[fields.phnum:]))
	if count > maxProgramHeaders || int(fields.order.Uint16(header[fields.phentsize:])) != fields.phdr {
		return nil, false
	}
	headers := make([]byte, count*fields.phdr)
	if n, _ := b.readAt(f, headers, fields.number(header[fields.phoff:])); n < len(headers) {
		return nil, false
	}
	e := &elfFile{entry: -1, class: header[4], machine: fields.order.Uint16(header[18:])}
	var dynamic elfSegment
	for ; len(headers) > 0; headers = headers[fields.phdr:] {
		flags := fields.order.Uint32(headers[fields.flags:])
		s := elfSegment{
			offset: fields.number(headers[fields.offset:]), size: fields.number(headers[fields.size:]), vaddr: fields.number(headers[fields.vaddr:]),
			exec: flags&1 != 0, write: flags&2 != 0,
		}
		if s.offset < 0 || s.size < 0 || s.vaddr < 0 {
			return nil, false
		}
		switch fields.order.Uint32(headers) {
		case 1: // PT_LOAD
			e.segments = append(e.segments, s)
		case 2: // PT_DYNAMIC
			dynamic = s
		case 3: // PT_INTERP
			e.interp = b.elfString(f, s.offset, min(s.size, 4096))
		}
	}
	e.entry = e.fileOffset(fields.number(header[fields.entry:]))
	b.elfDynamic(f, e, fields, dynamic)
	return e, true
}

// fileOffset returns where a virtual address is in the file, or -1.
func (e *elfFile) fileOffset(vaddr int64) int64 {
	for _, s := range e.segments {
		if vaddr >= s.vaddr && vaddr-s.vaddr < s.size {
			return s.offset + vaddr - s.vaddr
		}
	}
	return -1
}

// elfDynamic reads what the dynamic section says of libraries.
func (b *bootFiles) elfDynamic(f *layer.Node, e *elfFile, fields elfFields, s elfSegment) {
	entries := make([]byte, min(s.size, maxDynamicSize))
	n, _ := b.readAt(f, entries, s.offset)
	var needed []int64
	var table, size, rpath, runpath int64
	for entries = entries[:n]; len(entries) >= 2*fields.word; entries = entries[2*fields.word:] {
		tag, value := fields.number(entries), fields.number(entries[fields.word:])
		if tag == 0 { // DT_NULL
			break
		}
		switch tag {
		case 1: // DT_NEEDED
			needed = append(needed, value)
		case 5: // DT_STRTAB
			table = e.fileOffset(value)
		case 10: // DT_STRSZ
			size = value
		case 15: // DT_RPATH
			rpath = value
		case 29: // DT_RUNPATH
			runpath = value
		}
	}
	if table <= 0 || size <= 0 || size > maxStringTable {
		return
	}
	at := func(off int64) string {
		if off < 0 || off >= size {
			return ""
		}
		return b.elfString(f, table+off, min(size-off, 4096))
	}
	for _, off := range needed[:min(len(needed), maxNeeded)] {
		if name := at(off); name != "" {
			e.needed = append(e.needed, name)
		}
	}
	dirs := func(off int64) []string {
		if off == 0 { // the empty string
			return nil
		}
		return strings.SplitN(at(off), ":", maxRunpath)
	}
	if e.runpath = dirs(runpath); e.runpath == nil {
		e.rpath = dirs(rpath) // void if the other is there
	}
}

// elfString reads a string that ends with a zero byte, of less than limit bytes.
func (b *bootFiles) elfString(f *layer.Node, off, limit int64) string {
	p := make([]byte, limit)
	n, _ := b.readAt(f, p, off)
	s, _, ok := bytes.Cut(p[:n], []byte{0})
	if !ok {
		return ""
	}
	return string(s)
}

// loaded is a program or library that the loader loads.
type loaded struct {
	resolved
	*elfFile
	rpath []string // its own and, behind them, those of what needs it
	why   why
}

// program plans an ELF program or library and all that the loader loads with
// it, in about the order in which it does. It reports whether the file is ELF.
func (p *bootPlanner) program(f resolved, w why) bool {
	e, ok := p.elf(f.Node)
	if !ok {
		return false
	}
	if p.seen[f.Node] {
		return true
	}
	p.seen[f.Node] = true
	p.pack(f, w, 0, 1) // the kernel looks at the headers first
	var beside []string
	if e.interp != "" {
		beside = p.startLoader(f, e)
	}
	queue := []loaded{{f, e, origin(e.rpath, f), w}}
	for len(queue) > 0 && !p.full() {
		at := queue[0]
		queue = queue[1:]
		p.segments(at)
		for _, name := range at.needed {
			lib, ok := p.library(name, at, beside)
			if !ok || p.seen[lib.Node] || len(p.seen) > maxFiles {
				continue
			}
			p.seen[lib.Node] = true
			if e, ok := p.elf(lib.Node); ok {
				p.encryption(lib)
				queue = append(queue, loaded{lib, e, append(origin(e.rpath, lib), at.rpath...)[:min(maxDirs, len(e.rpath)+len(at.rpath))], why{RuleLibrary, at.path}})
			}
		}
	}
	return true
}

// startLoader plans the loader of a program and what that reads first. It
// returns the directory that the loader is in.
func (p *bootPlanner) startLoader(f resolved, e *elfFile) []string {
	w := why{RuleLoader, f.path}
	loader, ok := p.file(e.interp)
	if !ok {
		return nil
	}
	p.packAll(loader, w)
	p.seen[loader.Node] = true // musl's is the C library, too
	if strings.Contains(path.Base(e.interp), "musl") {
		for _, conf := range p.glob("/etc/ld-musl-*.path") {
			p.small(conf.path, w)
		}
	} else {
		p.small("/etc/ld.so.preload", w)
		p.small("/etc/ld.so.cache", w)
	}
	return []string{path.Dir(loader.path)}
}

// encryption plans what OpenSSL reads when it's loaded.
func (p *bootPlanner) encryption(lib resolved) {
	if strings.HasPrefix(path.Base(lib.path), "libcrypto.so") && p.first("libcrypto") {
		for _, name := range []string{"/etc/ssl/openssl.cnf", "/usr/lib/ssl/openssl.cnf", "/etc/pki/tls/openssl.cnf"} {
			p.small(name, why{RuleConfig, lib.path})
		}
	}
}

// segments plans what of an ELF file is mapped and read.
func (p *bootPlanner) segments(f loaded) {
	var code int64
	for _, s := range f.elfFile.segments {
		if s.exec {
			code += s.size
		}
	}
	for _, s := range f.elfFile.segments {
		limit := int64(maxConst)
		switch {
		case s.exec:
			limit = maxCode
		case s.write:
			limit = maxData
		case s.offset == 0:
			limit = maxTables
		case s.size > max(constRatio*code, MaxChunkLength):
			limit = 1
		}
		p.pack(f.resolved, f.why, s.offset, min(s.size, limit))
	}
	if f.entry >= 0 {
		p.pack(f.resolved, f.why, f.entry, 1)
	}
}

// origin puts an object's directory into its search path (ld.so(8), "Dynamic
// string tokens").
func origin(dirs []string, f resolved) []string {
	var all []string
	for _, d := range dirs {
		if strings.Count(d, "$") > 8 {
			continue
		}
		dir := path.Dir(f.path)
		all = append(all, strings.NewReplacer("$ORIGIN", dir, "${ORIGIN}", dir, "$LIB", "lib", "${LIB}", "lib").Replace(d))
	}
	return all
}

// library finds a library as the loaders do: ld.so(8), and musl's.
func (p *bootPlanner) library(name string, f loaded, beside []string) (resolved, bool) {
	if strings.Contains(name, "/") {
		return p.file(p.absolute(name))
	}
	for _, dirs := range [][]string{f.rpath, p.loader.env, origin(f.runpath, f.resolved)} {
		if lib, ok := p.libraryIn(dirs, name, f.elfFile); ok {
			return lib, true
		}
	}
	for _, file := range p.loader.cache[name] {
		if lib, ok := p.libraryIn([]string{path.Dir(file)}, path.Base(file), f.elfFile); ok {
			return lib, true
		}
	}
	// Libraries lie next to each other, and their own headers name no loader.
	if lib, ok := p.libraryIn(p.loader.config, name, f.elfFile); ok {
		return lib, true
	}
	return p.libraryIn(append(beside, "/lib", "/usr/lib", "/lib64", "/usr/lib64", "/usr/local/lib", path.Dir(f.path)), name, f.elfFile)
}

// findLibrary is library for one that a program loads by itself; like is what
// it's for, if known.
func (p *bootPlanner) findLibrary(name string, like *elfFile) (resolved, bool) {
	for _, file := range p.loader.cache[name] {
		if lib, ok := p.libraryIn([]string{path.Dir(file)}, path.Base(file), like); ok {
			return lib, true
		}
	}
	return p.libraryIn(append(p.loader.all(), "/lib", "/usr/lib", "/lib64", "/usr/lib64"), name, like)
}

// libraryIn finds a library for the same machine.
func (p *bootPlanner) libraryIn(dirs []string, name string, like *elfFile) (resolved, bool) {
	for _, d := range dirs {
		lib, ok := p.file(path.Join("/", d, name))
		if !ok {
			continue
		}
		if p.seen[lib.Node] || like == nil {
			return lib, true
		}
		if e, ok := p.elf(lib.Node); ok && e.class == like.class && e.machine == like.machine {
			return lib, true
		}
	}
	return resolved{}, false
}
