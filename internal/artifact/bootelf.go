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
	maxStringTable    = 4 << 20
	maxNeeded         = 256 // libraries
	maxRunpath        = 32  // directories

	// Up to what size all of a program, or of a library, is packed. Of larger
	// ones it's what the loader reads.
	wholeProgram = 8 << 20
	wholeLibrary = 4 << 20

	// maxLoaded bounds what the loader reads of one segment.
	maxLoaded = 4 << 20
)

// elfFile is what starting a program depends on.
type elfFile struct {
	interp   string   // the loader
	needed   []string // libraries, by name
	runpath  []string // where it wants them looked for first
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
	e := &elfFile{entry: -1}
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
	var needed, paths []int64
	var table, size int64
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
		case 15, 29: // DT_RPATH, DT_RUNPATH
			paths = append(paths, value)
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
	if len(paths) > 0 { // DT_RUNPATH, if there, makes DT_RPATH void; linkers write one of them
		dirs := strings.Split(at(paths[len(paths)-1]), ":")
		e.runpath = dirs[:min(len(dirs), maxRunpath)]
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

// program packs a program or library and all that the loader loads with it, in
// about the order in which it's read. Of a file of more than whole bytes only
// parts are packed.
func (p *bootPlan) program(f resolved, whole int64) {
	if p.seen[f.Node] || len(p.seen) > maxFiles || p.full() {
		return
	}
	p.seen[f.Node] = true
	e, ok := p.elf(f.Node)
	if !ok {
		p.script(f)
		return
	}
	p.pack(f.Node, 0, 1) // the kernel looks at the headers first
	var dirs []string
	if e.interp != "" {
		if loader, ok := p.file(e.interp); ok {
			p.packAll(loader.Node)
			dirs = append(dirs, path.Dir(loader.path))
		}
		p.packFile("/etc/ld.so.preload")
		p.packFile("/etc/ld.so.cache")
	}
	p.loaded(f, e)
	for _, name := range e.needed {
		if lib, ok := p.library(name, f, e, dirs); ok {
			p.program(lib, wholeLibrary)
		}
	}
	if f.Size <= whole {
		p.packAll(f.Node)
	} else if e.entry >= 0 {
		p.pack(f.Node, e.entry, 1)
	}
}

// loaded packs the parts of an ELF file that the loader reads: all that is
// written to (relocations go there) and, up to the code, symbols and relocations.
func (p *bootPlan) loaded(f resolved, e *elfFile) {
	for _, s := range e.segments {
		if s.write || !s.exec && s.offset == 0 {
			p.pack(f.Node, s.offset, min(s.size, maxLoaded))
		}
	}
}

// library finds a library as the loader does (ld.so(8)), roughly: its cache
// is made of the same directories.
func (p *bootPlan) library(name string, f resolved, e *elfFile, dirs []string) (resolved, bool) {
	if strings.Contains(name, "/") {
		return p.file(name)
	}
	var all []string
	for _, d := range e.runpath {
		all = append(all, strings.NewReplacer("$ORIGIN", path.Dir(f.path), "${ORIGIN}", path.Dir(f.path)).Replace(d))
	}
	all = append(append(all, p.libraryPath...), dirs...)
	// Libraries lie next to each other, and their own headers name no loader.
	all = append(all, path.Dir(f.path), "/lib", "/usr/lib", "/lib64", "/usr/lib64", "/usr/local/lib")
	for _, d := range all {
		if lib, ok := p.file(path.Join("/", d, name)); ok {
			return lib, true
		}
	}
	return resolved{}, false
}
