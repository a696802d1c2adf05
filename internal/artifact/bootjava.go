package artifact

import (
	"path"
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
	if cds, ok := p.file(path.Join(lib, "server/classes.jsa")); ok {
		p.pack(cds, w, 0, min(cds.Size, maxArchiveCDS))
	}
	if image, ok := p.file(path.Join(lib, "modules")); ok {
		p.javaModules(image, w)
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

// javaModules plans the head of lib/modules, which is a jimage: its index and
// names (JDK, src/java.base/share/native/libjimage/imageFile.hpp).
func (p *bootPlanner) javaModules(f resolved, w why) {
	p.pack(f, w, 0, min(f.Size, 2<<20))
}
