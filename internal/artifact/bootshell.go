package artifact

import (
	"path"
	"regexp"
	"strings"
)

// builtins are commands that shells have themselves, though they may exist as
// programs, too.
const builtins = " [ : alias bg break cd continue echo exit export false fg getopts hash jobs kill let local printf pwd read readonly return set shift test times trap true type ulimit umask unalias unset wait "

const (
	maxScriptCommands = 256 // commands that are looked for in one script
	maxScripts        = 64  // that a script runs because they are in a directory
	maxPrograms       = 64  // that a script names by their paths
)

// script plans a file that isn't ELF and, if it names one, its interpreter.
// argv is the command line that it's run with.
func (p *bootPlanner) script(f resolved, argv []string, w why) {
	if f.Size > maxInspected {
		p.pack(f, w, 0, 1)
		return
	}
	p.packAll(f, w)
	if !p.first("script " + f.path) {
		return
	}
	line, _, _ := strings.Cut(p.head(f, 512), "\n")
	line, ok := strings.CutPrefix(line, "#!")
	words := strings.Fields(line)
	if !ok || len(words) == 0 {
		words = []string{"/bin/sh"} // as execvp(3) and shells do
		if strings.Contains(p.head(f, 512), "\x00") {
			return
		}
	}
	by := why{RuleProgram, f.path}
	if path.Base(words[0]) == "env" {
		if env, ok := p.executable(words[0]); ok {
			p.program(env, by)
		}
		for words = words[1:]; len(words) > 0 && (strings.HasPrefix(words[0], "-") || strings.Contains(words[0], "=")); {
			words = words[1:]
		}
		if len(words) == 0 {
			return
		}
	}
	p.command(append(words, append([]string{f.path}, argv[1:]...)...), by)
}

// head returns up to n bytes of a file's beginning.
func (p *bootPlanner) head(f resolved, n int) string {
	b := make([]byte, n)
	got, _ := p.readAt(f.Node, b, 0)
	return string(b[:got])
}

// shell plans what a shell runs: the script or the text that its arguments name.
func (p *bootPlanner) shell(f resolved, args []string) {
	if path.Base(f.path) == "busybox" && len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		if applet := runtimeOf(args[0]); applet != nil {
			args = args[1:]
		}
	}
	for i, a := range args {
		switch {
		case strings.HasPrefix(a, "-") && strings.HasSuffix(a, "c") && i+1 < len(args):
			p.shellText(args[i+1], f)
			return
		case strings.HasPrefix(a, "-") || strings.HasPrefix(a, "+"):
			continue
		}
		if s, ok := p.file(p.absolute(a)); ok && s.Size <= maxInspected {
			p.packAll(s, why{RuleScript, f.path})
			if p.first("shell script " + s.path) {
				p.shellText(p.text(s.Node), s)
			}
		}
		return
	}
}

// shellText plans the programs that a shell script runs, as far as they can be
// told from its words: each first word of a command that names a program, what
// follows exec and its like, scripts that are read with a dot, and scripts in
// directories that it names, which are run in a loop.
func (p *bootPlanner) shellText(text string, f resolved) {
	commands := shellCommands(text)
	for _, words := range commands[:min(len(commands), maxScriptCommands)] {
		if p.full() {
			return
		}
		switch words[0] {
		case ".", "source":
			if len(words) > 1 {
				if s, ok := p.file(p.absolute(words[1])); ok && s.Size <= maxInspected && p.first("shell script "+s.path) {
					p.packAll(s, why{RuleScript, f.path})
					p.shellText(p.text(s.Node), s)
				}
			}
		default:
			if !strings.Contains(builtins, " "+words[0]+" ") {
				p.command(words, why{RuleProgram, f.path})
			}
		}
		for _, w := range words {
			p.scriptsIn(w, f)
		}
	}
	for _, program := range programPath.FindAllString(text, maxPrograms) { // such as HTTPD=${HTTPD:-/usr/sbin/httpd}
		if e, ok := p.file(program); ok && e.Mode&0o111 != 0 && p.first("program in a script "+e.path) {
			p.command([]string{program}, why{RuleProgram, f.path})
		}
	}
}

// programPath finds the paths of programs.
var programPath = regexp.MustCompile(`(?:/usr|/usr/local|/opt/[\w.+-]+)?/s?bin/[\w.+-]+`)

// scriptsIn plans the scripts in a directory such as /docker-entrypoint.d.
func (p *bootPlanner) scriptsIn(dir string, f resolved) {
	dir = strings.TrimRight(strings.TrimSuffix(dir, "*"), "/")
	if !path.IsAbs(dir) || !strings.HasSuffix(dir, ".d") {
		return
	}
	scripts := p.list(dir, ".sh", ".envsh")
	for _, s := range scripts[:min(len(scripts), maxScripts)] {
		if s.Mode&0o111 != 0 {
			p.command([]string{s.path}, why{RuleScript, f.path})
		}
	}
}

// shellCommands splits a shell script into simple commands, as lists of words,
// roughly: quotes don't nest, nothing is expanded, and what keywords, assignments
// and wrappers such as exec stand before is a command of its own.
func shellCommands(text string) [][]string {
	var commands [][]string
	var words []string
	end := func() {
		if words = command(words); len(words) > 0 {
			commands = append(commands, words)
		}
		words = nil
	}
	for line := range strings.Lines(strings.ReplaceAll(text, "\\\n", " ")) {
		rest := strings.TrimSpace(line)
		for rest != "" && len(commands) <= maxScriptCommands {
			switch c := rest[0]; {
			case c == '#':
				rest = ""
			case strings.IndexByte(" \t", c) >= 0:
				rest = rest[1:]
			case strings.IndexByte(";|&()`{}", c) >= 0:
				end()
				rest = rest[1:]
			case strings.HasPrefix(rest, "$("):
				end()
				rest = rest[2:]
			default:
				var word string
				word, rest = shellWord(rest)
				if word != "" && len(words) < maxWords {
					words = append(words, word)
				}
			}
		}
		end()
	}
	return commands
}

// shellWord takes a word off a line that isn't empty.
func shellWord(line string) (word, rest string) {
	var b strings.Builder
	for i := 0; i < len(line); i++ {
		switch c := line[i]; {
		case c == '\'' || c == '"':
			quoted, _, ok := strings.Cut(line[i+1:], string(c))
			if !ok || strings.Contains(quoted, "$(") { // what is run in it is looked at
				return b.String(), line[i+1:]
			}
			b.WriteString(quoted)
			i += len(quoted) + 1
		case strings.IndexByte(" \t;|&()`", c) >= 0 && i > 0, c == '$' && strings.HasPrefix(line[i:], "$(") && i > 0:
			return b.String(), line[i:]
		default:
			b.WriteByte(c)
		}
	}
	return b.String(), ""
}

// command strips what may stand before a command's name.
func command(words []string) []string {
	for len(words) > 0 {
		w := words[0]
		name, _, assignment := strings.Cut(w, "=")
		switch {
		case w == "", w == "!", w == "[[" || w == "[", assignment && name != "" && !strings.ContainsAny(name, "/-$"):
		case strings.Contains(" if then else elif while until do time exec command builtin env nohup eval ", " "+w+" "):
		case strings.HasPrefix(w, "-") || strings.HasPrefix(w, "<") || strings.HasPrefix(w, ">"):
		default:
			return words
		}
		words = words[1:]
	}
	return nil
}
