package config

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/BurntSushi/toml"
)

const (
	// EnvPrefix begins the names of environment variables.
	EnvPrefix = "SLUICE_REGISTRY_"

	// EnvFile is the variable for the configuration file's name. It is no
	// key, and whoever calls Load looks at it.
	EnvFile = EnvPrefix + "CONFIG"

	maxFile   = 1 << 20  // bytes of a configuration file
	maxSecret = 64 << 10 // bytes of a file with a secret
	maxList   = 100      // entries of a list of tables
)

// Load reads a configuration: flags (by key, as in "storage.kind") over
// environment (as os.Environ returns it) over the file at path over Default. An
// empty path means no file. Secrets are read from their files. The error is
// Problems, all that there are, unless the file can't be read at all.
func Load(path string, env []string, flags map[string]string) (*Registry, error) {
	l := &loader{registry: Default()}
	l.registry.origins = map[string]string{}
	if path != "" {
		if err := l.file(path); err != nil {
			return nil, err
		}
	}
	l.environment(env)
	for _, key := range slices.Sorted(maps.Keys(flags)) {
		l.text(key, flags[key], "flag")
	}
	l.secrets()
	wrong := map[string]bool{} // has been said already
	for _, p := range l.problems {
		wrong[p.Key] = true
	}
	var more Problems
	if errors.As(l.registry.Check(), &more) {
		for _, p := range more {
			if !wrong[p.Key] {
				l.problems = append(l.problems, p)
			}
		}
	}
	if len(l.problems) > 0 {
		return nil, l.problems
	}
	return l.registry, nil
}

// loader is one Load.
type loader struct {
	registry *Registry
	problems Problems
}

func (l *loader) problem(key, value, origin, allowed string) {
	l.problems = append(l.problems, Problem{key, value, origin, allowed})
}

// file reads the configuration file.
func (l *loader) file(path string) error {
	text, err := readBounded(path, maxFile)
	if err != nil {
		return fmt.Errorf("configuration file: %w", err)
	}
	var doc map[string]any
	if _, err := toml.Decode(text, &doc); err != nil {
		var syntax toml.ParseError
		if errors.As(err, &syntax) {
			return Problems{{Origin: fmt.Sprintf("%s:%d", path, syntax.Position.Line), Allowed: syntax.Message}}
		}
		return Problems{{Origin: path, Allowed: err.Error()}}
	}
	lines := linesOf(text)
	l.table(reflect.ValueOf(l.registry).Elem(), "", doc, func(key string) string {
		if line := lines[key]; line > 0 {
			return fmt.Sprintf("%s:%d", path, line)
		}
		return path
	})
	return nil
}

// table sets the fields of a struct from a table of the file.
func (l *loader) table(v reflect.Value, prefix string, doc map[string]any, origin func(key string) string) {
	for _, name := range slices.Sorted(maps.Keys(doc)) {
		key := join(prefix, name)
		field, ok := fieldOf(v, name)
		if !ok {
			l.problem(key, "", origin(key), "there is no such key"+suggest(key))
			continue
		}
		switch value := doc[name].(type) {
		case map[string]any:
			if field.Kind() == reflect.Struct {
				l.table(field, key, value, origin)
				continue
			}
		case []map[string]any:
			if isTables(field) {
				n := min(len(value), maxList)
				if n < len(value) {
					l.problem(key, "", origin(key), fmt.Sprintf("at most %d entries", maxList))
				}
				field.Set(reflect.MakeSlice(field.Type(), n, n))
				for i := range n {
					l.table(field.Index(i), join(key, strconv.Itoa(i)), value[i], origin)
				}
				continue
			}
		}
		if _, secret := field.Interface().(Secret); secret && key != "database.url" {
			l.problem(key, hidden, origin(key), "a secret is not written here: put it into a file and name that as "+key+"_file, or set "+EnvName(key))
			continue
		}
		if err := setTOML(field, doc[name]); err != nil {
			l.problem(key, clip(fmt.Sprint(doc[name])), origin(key), err.Error())
			continue
		}
		l.registry.origins[key] = origin(key)
	}
}

// environment sets what the environment has.
func (l *loader) environment(env []string) {
	// Kubernetes sets such variables for a service that is named
	// sluice-registry.
	foreign := regexp.MustCompile(`^(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_[0-9]+_(TCP|UDP|SCTP).*)?)$`)
	for _, pair := range slices.Sorted(slices.Values(env)) {
		name, text, _ := strings.Cut(pair, "=")
		rest, ours := strings.CutPrefix(name, EnvPrefix)
		if !ours || name == EnvFile || foreign.MatchString(rest) {
			continue
		}
		key, ok := keyOfEnv(reflect.TypeFor[Registry](), rest)
		if !ok {
			l.problem(name, "", "environment", "there is no such key"+suggestEnv(name))
			continue
		}
		l.text(key, text, "environment "+name)
	}
}

// text sets a key from text.
func (l *loader) text(key, text, origin string) {
	v, ok := lookup(reflect.ValueOf(l.registry).Elem(), key, true)
	if !ok {
		l.problem(key, "", origin, "there is no such key"+suggest(key))
		return
	}
	if err := setText(v, text); err != nil {
		l.problem(key, shown(v, text), origin, err.Error())
		return
	}
	l.registry.origins[key] = origin
}

// shown returns text that can't be a key's value as messages have it.
func shown(v reflect.Value, text string) string {
	if _, secret := v.Interface().(Secret); secret {
		return hidden
	}
	return strconv.Quote(clip(text))
}

func clip(s string) string { return s[:min(len(s), 100)] }

// secrets reads the files that hold them. One that was set where its file was
// not outweighs the file.
func (l *loader) secrets() {
	walk(reflect.ValueOf(l.registry).Elem(), "", func(key string, v reflect.Value) {
		if _, ok := v.Interface().(Secret); !ok {
			return
		}
		file, ok := lookup(reflect.ValueOf(l.registry).Elem(), key+"_file", false)
		if !ok || file.String() == "" {
			return
		}
		origin := l.registry.origins[key+"_file"]
		if v.String() != "" {
			l.problem(key+"_file", file.String(), origin, key+" is set too ("+l.registry.origins[key]+"): remove one of them")
			return
		}
		text, err := readBounded(file.String(), maxSecret)
		if text = strings.TrimRight(text, "\r\n"); err == nil && text == "" {
			err = errors.New("the file is empty")
		}
		if err != nil {
			l.problem(key+"_file", file.String(), origin, "a file with the secret: "+err.Error())
			return
		}
		v.SetString(text)
		l.registry.origins[key] = "file " + file.String()
	})
}

func readBounded(path string, limit int64) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(content)) > limit {
		err = fmt.Errorf("%s: larger than %v", path, Size(limit))
	}
	return string(content), err
}

// linesOf finds the lines of keys, to point at. It understands what people
// write: one key or header in a line.
func linesOf(text string) map[string]int {
	lines, prefix, counts, number := map[string]int{}, "", map[string]int{}, 0
	for line := range strings.Lines(text) {
		number++
		line = strings.TrimSpace(line)
		if list, ok := strings.CutPrefix(line, "[["); ok {
			name, _, _ := strings.Cut(list, "]]")
			name = indexed(unspaced(name), counts, true)
			prefix = join(name, strconv.Itoa(counts[name]))
			counts[name]++
		} else if table, ok := strings.CutPrefix(line, "["); ok {
			name, _, _ := strings.Cut(table, "]")
			prefix = indexed(unspaced(name), counts, false)
		} else if name, _, ok := strings.Cut(line, "="); ok && !strings.HasPrefix(line, "#") {
			key := join(prefix, unspaced(name))
			lines[key] = cmp.Or(lines[key], number)
			continue
		} else {
			continue
		}
		lines[prefix] = cmp.Or(lines[prefix], number)
	}
	return lines
}

// indexed adds to a header's name the indexes of the lists in it: those of the
// entries that were begun last.
func indexed(name string, counts map[string]int, list bool) string {
	path, parts := "", strings.Split(name, ".")
	for i, part := range parts {
		path = join(path, part)
		if n := counts[path]; n > 0 && (i < len(parts)-1 || !list) {
			path = join(path, strconv.Itoa(n-1))
		}
	}
	return path
}

func unspaced(name string) string {
	return strings.NewReplacer(" ", "", "\t", "", `"`, "", "'", "").Replace(name)
}
