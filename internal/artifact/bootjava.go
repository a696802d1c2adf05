package artifact

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"path"
	"slices"
	"strings"
)

// Bounds of what is planned of Java's large files.
const (
	maxArchiveCDS = 24 << 20 // the class data archive, which is mapped and checked whole
	maxJar        = 8 << 20  // of a jar on the class path; of larger ones it's the directory
	jarTail       = 512 << 10
	maxClassPath  = 64 // jars
)

// java plans what a Java virtual machine reads before it runs a class, and the
// class path.
func (p *bootPlanner) java(f resolved, args []string) {
	home := path.Dir(path.Dir(f.path))
	w := why{RuleRuntime, f.path}
	if path.Base(home) == "jre" { // java 8's programs lie in both
		home = path.Dir(home)
	}
	for _, lib := range []string{path.Join(home, "lib"), path.Join(home, "jre/lib"), path.Join(home, "jre/lib/amd64")} {
		p.javaLibraries(lib, w)
	}
	for _, dir := range []string{"conf", "lib"} {
		for _, name := range []string{"security/java.security", "security/java.policy", "security/default.policy", "net.properties", "logging.properties", "currency.data", "tzdb.dat"} {
			p.small(path.Join(home, dir, name), w)
		}
	}
	p.small("/etc/timezone", w)
	p.javaClasses(f, args)
}

// javaLibraries plans what lies in a directory of a Java runtime.
func (p *bootPlanner) javaLibraries(lib string, w why) {
	if _, ok := p.file(path.Join(lib, "jvm.cfg")); !ok {
		return
	}
	p.small(path.Join(lib, "jvm.cfg"), w)
	for _, name := range []string{"server/libjvm.so", "libjava.so", "libverify.so", "libjimage.so", "libzip.so", "libnio.so", "libnet.so", "libextnet.so", "libmanagement.so", "libmanagement_ext.so", "libinstrument.so"} {
		if l, ok := p.file(path.Join(lib, name)); ok {
			p.program(l, why{RuleLibrary, w.by})
		}
	}
	cds, archived := p.file(path.Join(lib, "server/classes.jsa"))
	if archived {
		p.pack(cds, w, 0, min(cds.Size, maxArchiveCDS))
	}
	if image, ok := p.file(path.Join(lib, "modules")); ok {
		p.javaModules(image, w, archived)
	}
	if rt, ok := p.file(path.Join(lib, "rt.jar")); ok { // before Java 9
		p.packEnds(rt, w, maxJar, 1, 2<<20)
	}
}

// javaClasses plans the class path and the jars that the arguments and the
// environment name.
func (p *bootPlanner) javaClasses(f resolved, args []string) {
	w := why{RuleArgument, f.path}
	classes := strings.SplitN(p.env["CLASSPATH"], ":", maxClassPath)
	for i, a := range args {
		switch {
		case (a == "-cp" || a == "-classpath" || a == "--class-path" || a == "-p" || a == "--module-path") && i+1 < len(args):
			classes = append(classes, strings.SplitN(args[i+1], ":", maxClassPath)...)
		case a == "-jar" && i+1 < len(args):
			classes = append(classes, args[i+1])
		case strings.HasPrefix(a, "-javaagent:"):
			agent, _, _ := strings.Cut(strings.TrimPrefix(a, "-javaagent:"), "=")
			classes = append(classes, agent)
		case strings.HasPrefix(a, "@"):
			p.small(p.absolute(a[1:]), w)
		}
	}
	for _, c := range classes[:min(len(classes), 2*maxClassPath)] {
		if c == "" {
			continue
		}
		jars := p.firstOf(p.absolute(c))
		if strings.HasSuffix(c, "/*") {
			jars = p.list(path.Dir(p.absolute(c)), ".jar")
		}
		for _, jar := range jars {
			p.packEnds(jar, w, maxJar, 1, jarTail)
		}
	}
}

// The form of lib/modules, a jimage (JDK, src/java.base/share/native/libjimage/
// imageFile.hpp), in the byte order of the machine: seven numbers of 32 bits
// (magic, version, flags, resources, table length, bytes of locations and of
// strings), two tables of as many numbers, the locations, the strings, the
// resources. A location is a list of attributes: a byte with the kind and how many
// bytes less one follow, and those, big endian.
const (
	jimageMagic   = 0xcafedada
	jimageHead    = 7 * 4
	maxJimage     = 8 << 20 // bytes of the index
	maxResources  = 1 << 17
	jimageModule  = 1
	jimageParent  = 2
	jimageOffset  = 5
	jimagePacked  = 6
	jimageContent = 7
)

// javaPackages are those of java.base of which a server uses so much that was
// never loaded when the class data archive was made.
var javaPackages = strings.Fields(`java/io java/lang java/lang/constant java/lang/invoke java/lang/ref java/lang/reflect java/math java/net
	java/nio java/nio/channels java/nio/charset java/security java/security/cert java/text java/time java/time/zone java/util
	java/util/concurrent java/util/concurrent/atomic java/util/concurrent/locks java/util/function java/util/jar java/util/regex
	java/util/zip jdk/internal/loader jdk/internal/misc jdk/internal/logger sun/net sun/net/util sun/net/www/protocol/jar sun/nio/ch sun/nio/fs
	sun/reflect/annotation sun/security/jca sun/security/provider sun/security/util sun/util/locale/provider sun/util/resources`)

// resource is a class or another resource in a jimage.
type resource struct {
	module, parent string
	offset, size   int64 // in the file
}

// javaModules plans the index of lib/modules and packages that start-up reads.
// A jimage begins with the classes that the class data archive has, so that what
// is read, if there is an archive, comes behind those.
func (p *bootPlanner) javaModules(f resolved, w why, archived bool) {
	index, resources := p.jimage(f)
	if index == 0 {
		p.pack(f, w, 0, 1)
		return
	}
	p.pack(f, w, 0, index)
	again := !archived
	last := ""
	for _, r := range resources {
		if r.parent < last {
			again = true // the second run through all packages begins
		}
		last = r.parent
		if again && r.module == "java.base" && slices.Contains(javaPackages, r.parent) {
			p.pack(f, w, r.offset, r.size)
		}
	}
}

// jimage returns the size of a jimage's index, or 0 if it isn't one, and the
// resources in their order.
func (p *bootPlanner) jimage(f resolved) (int64, []resource) {
	head := make([]byte, jimageHead)
	if n, _ := p.readAt(f.Node, head, 0); n < len(head) {
		return 0, nil
	}
	le := binary.LittleEndian
	table, locations, texts := int64(le.Uint32(head[16:])), int64(le.Uint32(head[20:])), int64(le.Uint32(head[24:]))
	size := jimageHead + 8*table + locations + texts
	if le.Uint32(head) != jimageMagic || size > min(maxJimage, f.Size) {
		return 0, nil
	}
	index := make([]byte, size)
	if n, _ := p.readAt(f.Node, index, 0); int64(n) < size {
		return 0, nil
	}
	offsets := index[jimageHead+4*table : jimageHead+8*table]
	attributes := index[jimageHead+8*table:][:locations]
	strs := index[size-texts:]
	var all []resource
	for ; len(offsets) >= 4 && len(all) < maxResources; offsets = offsets[4:] {
		if at := int64(le.Uint32(offsets)); at < locations {
			if r := parseLocation(attributes[at:], strs); r.size > 0 && r.offset >= 0 && r.offset < f.Size {
				r.offset += size
				all = append(all, r)
			}
		}
	}
	slices.SortStableFunc(all, func(a, b resource) int { return cmp.Compare(a.offset, b.offset) })
	return size, all
}

// parseLocation parses the attributes of a resource.
func parseLocation(b, strs []byte) resource {
	var values [8]int64
	for len(b) > 0 {
		kind, n := int(b[0]>>3), int(b[0]&7)+1
		if kind == 0 || kind >= len(values) || len(b) < 1+n {
			break
		}
		var v uint64
		for _, c := range b[1 : 1+n] {
			v = v<<8 | uint64(c)
		}
		values[kind] = int64(v & (1<<62 - 1))
		b = b[1+n:]
	}
	text := func(at int64) string {
		if at >= int64(len(strs)) {
			return ""
		}
		s := strs[at:min(at+256, int64(len(strs)))]
		s, _, _ = bytes.Cut(s, []byte{0})
		return string(s)
	}
	size := values[jimagePacked]
	if size == 0 {
		size = values[jimageContent]
	}
	return resource{module: text(values[jimageModule]), parent: text(values[jimageParent]), offset: values[jimageOffset], size: size}
}
