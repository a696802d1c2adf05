package install

import (
	"bytes"
	"errors"
	"fmt"
	"path"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// errImports is a list that isn't edited.
var errImports = errors.New("its imports stand where they can't be edited: write them as one list, imports = [...], before all tables")

// mainConfig is what matters here of a file of containerd's configuration.
type mainConfig struct {
	Version int      `toml:"version"`
	Imports []string `toml:"imports"`
}

func parseMain(text []byte) (mainConfig, error) {
	var c mainConfig
	if err := toml.Unmarshal(text, &c); err != nil {
		return c, tomlError(err)
	}
	return c, nil
}

// tomlError adds where it is.
func tomlError(err error) error {
	var d *toml.DecodeError
	if errors.As(err, &d) {
		row, column := d.Position()
		return fmt.Errorf("line %d, column %d: %w", row, column, err)
	}
	return err
}

// imported returns the patterns of files that the configuration file name
// imports: absolute, as containerd understands them.
func imported(name string, imports []string) []string {
	var all []string
	for _, i := range imports {
		if !path.IsAbs(i) {
			i = path.Join(path.Dir(name), i)
		}
		all = append(all, path.Clean(i))
	}
	return all
}

var (
	importsKey = regexp.MustCompile(`^[ \t]*(?:imports|"imports"|'imports')[ \t]*=[ \t]*\[`)
	versionKey = regexp.MustCompile(`^[ \t]*version[ \t]*=`)
	tableLine  = regexp.MustCompile(`^[ \t]*\[`)
)

// span is the place of the array of imports in a configuration, from its
// bracket to behind the closing one; found only before the first table.
func importsSpan(text []byte) (begin, end int, found bool) {
	at := 0
	for line := range bytes.Lines(text) {
		if m := importsKey.FindIndex(line); m != nil {
			begin = at + m[1] - 1
			end, found = arrayEnd(text, begin)
			return begin, end, found
		}
		if tableLine.Match(line) {
			break
		}
		at += len(line)
	}
	return 0, 0, false
}

// arrayEnd returns where the array that begins at text[begin] ends.
func arrayEnd(text []byte, begin int) (int, bool) {
	depth := 0
	for i := begin; i < len(text); i++ {
		switch c := text[i]; c {
		case '[':
			depth++
		case ']':
			if depth--; depth == 0 {
				return i + 1, true
			}
		case '#':
			n := bytes.IndexByte(text[i:], '\n')
			if n < 0 {
				return 0, false
			}
			i += n
		case '"', '\'':
			for i++; i < len(text) && text[i] != c; i++ {
				if c == '"' && text[i] == '\\' {
					i++
				}
			}
		}
	}
	return 0, false
}

// newline is how the text ends its lines.
func newline(text []byte) string {
	if bytes.Contains(text, []byte("\r\n")) {
		return "\r\n"
	}
	return "\n"
}

// addImport returns a configuration that imports one pattern more, as its last,
// and is otherwise what it was: comments, order, and spaces stay.
func addImport(text []byte, pattern string) ([]byte, error) {
	old, err := parseMain(text)
	if err != nil {
		return nil, err
	}
	var edited []byte
	begin, end, found := importsSpan(text)
	switch {
	case found && len(old.Imports) == 0:
		edited = slices.Concat(text[:end-1], []byte(strconv.Quote(pattern)), text[end-1:])
	case found:
		// A comma may be there behind the last one. What is between it and the
		// bracket is spaces and comments.
		last := lastElement(text[begin:end])
		edited = slices.Concat(text[:begin+last], []byte(", "+strconv.Quote(pattern)), text[begin+last:])
	default:
		at := insertAt(text)
		line := "imports = [" + strconv.Quote(pattern) + "]" + newline(text)
		edited = slices.Concat(text[:at], []byte(line), text[at:])
	}
	return edited, sameBut(text, edited, append(slices.Clone(old.Imports), pattern))
}

// setImports returns a configuration whose imports are these.
func setImports(text []byte, imports []string) ([]byte, error) {
	var quoted []string
	for _, i := range imports {
		quoted = append(quoted, strconv.Quote(i))
	}
	list := "[" + strings.Join(quoted, ", ") + "]"
	begin, end, found := importsSpan(text)
	var edited []byte
	if found {
		edited = slices.Concat(text[:begin], []byte(list), text[end:])
	} else {
		at := insertAt(text)
		edited = slices.Concat(text[:at], []byte("imports = "+list+newline(text)), text[at:])
	}
	return edited, sameBut(text, edited, imports)
}

// dropImport returns a configuration without the pattern that addImport added,
// and what it was if it isn't there.
func dropImport(text []byte, pattern string) ([]byte, error) {
	old, err := parseMain(text)
	if err != nil {
		return nil, err
	}
	if !slices.Contains(old.Imports, pattern) {
		return text, nil
	}
	rest := slices.DeleteFunc(slices.Clone(old.Imports), func(i string) bool { return i == pattern })
	begin, end, found := importsSpan(text)
	if !found {
		return nil, errImports
	}
	quoted := regexp.QuoteMeta(strconv.Quote(pattern)) + "|'" + regexp.QuoteMeta(pattern) + "'"
	array := regexp.MustCompile(`[ \t]*,[ \t]*(?:`+quoted+`)`).ReplaceAll(text[begin:end], nil)
	array = regexp.MustCompile(`(?:`+quoted+`)[ \t]*,?[ \t]*`).ReplaceAll(array, nil)
	edited := slices.Concat(text[:begin], array, text[end:])
	if len(rest) == 0 && string(array) == "[]" {
		// The whole line was ours.
		from := bytes.LastIndexByte(text[:begin], '\n') + 1
		if n := bytes.IndexByte(text[end:], '\n'); n >= 0 && len(bytes.TrimSpace(text[end:end+n])) == 0 {
			edited = slices.Concat(text[:from], text[end+n+1:])
		}
	}
	return edited, sameBut(text, edited, rest)
}

// lastElement returns where the last string of an array that has some ends.
func lastElement(array []byte) int {
	last := 0
	for i := 0; i < len(array); i++ {
		switch c := array[i]; c {
		case '#':
			i += max(0, bytes.IndexByte(array[i:], '\n'))
		case '"', '\'':
			for i++; i < len(array) && array[i] != c; i++ {
				if c == '"' && array[i] == '\\' {
					i++
				}
			}
			last = i + 1
		}
	}
	return last
}

// insertAt returns where a new line of the top level belongs: behind the
// version, or at the beginning.
func insertAt(text []byte) int {
	at := 0
	for line := range bytes.Lines(text) {
		if tableLine.Match(line) {
			break
		}
		at += len(line)
		if versionKey.Match(line) && bytes.HasSuffix(line, []byte("\n")) {
			return at
		}
	}
	return 0
}

// sameBut checks an edit: the new text says what the old one says, except for
// its imports.
func sameBut(old, edited []byte, imports []string) error {
	var before, after map[string]any
	if err := toml.Unmarshal(old, &before); err != nil {
		return tomlError(err)
	}
	if err := toml.Unmarshal(edited, &after); err != nil {
		return errImports
	}
	c, err := parseMain(edited)
	delete(before, "imports")
	delete(after, "imports")
	if err != nil || !slices.Equal(c.Imports, imports) || !reflect.DeepEqual(before, after) {
		return errImports
	}
	return nil
}
