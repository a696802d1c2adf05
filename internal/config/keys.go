package config

import (
	"reflect"
	"strconv"
	"strings"
)

// A key is the path of a leaf of Registry: names of the file joined by dots,
// with the index of an entry where there is a list of tables, as in
// "webhooks.0.url".

func join(prefix, name string) string {
	if prefix == "" {
		return name
	}
	return prefix + "." + name
}

// isTables reports whether v is a list of tables.
func isTables(v reflect.Value) bool {
	return v.Kind() == reflect.Slice && v.Type().Elem().Kind() == reflect.Struct
}

// fieldOf returns the field of a struct by its name in the file.
func fieldOf(v reflect.Value, name string) (reflect.Value, bool) {
	for i := range v.NumField() {
		if tag := v.Type().Field(i).Tag.Get("toml"); tag != "" && tag == name {
			return v.Field(i), true
		}
	}
	return reflect.Value{}, false
}

// walk calls f for each leaf below v, in the order of the fields.
func walk(v reflect.Value, prefix string, f func(key string, v reflect.Value)) {
	for i := range v.NumField() {
		tag := v.Type().Field(i).Tag.Get("toml")
		if tag == "" {
			continue
		}
		switch field, key := v.Field(i), join(prefix, tag); {
		case field.Kind() == reflect.Struct:
			walk(field, key, f)
		case isTables(field):
			for j := range field.Len() {
				walk(field.Index(j), join(key, strconv.Itoa(j)), f)
			}
		default:
			f(key, field)
		}
	}
}

// lookup returns the leaf of a key. With grow, lists become long enough.
func lookup(v reflect.Value, key string, grow bool) (reflect.Value, bool) {
	for name := range strings.SplitSeq(key, ".") {
		ok := false
		switch {
		case v.Kind() == reflect.Struct:
			v, ok = fieldOf(v, name)
		case isTables(v):
			i, err := strconv.ParseUint(name, 10, 16)
			for err == nil && grow && v.Len() <= int(i) && i < maxList {
				v.Set(reflect.Append(v, reflect.Zero(v.Type().Elem())))
			}
			if ok = err == nil && int(i) < v.Len(); ok {
				v = v.Index(int(i))
			}
		}
		if !ok {
			return reflect.Value{}, false
		}
	}
	return v, v.Kind() != reflect.Struct && !isTables(v)
}

// Keys returns all keys, in the order of the file; with 0 for the index of a
// list's entries.
func Keys() []string {
	var keys []string
	var visit func(t reflect.Type, prefix string)
	visit = func(t reflect.Type, prefix string) {
		for i := range t.NumField() {
			tag, field := t.Field(i).Tag.Get("toml"), t.Field(i).Type
			switch key := join(prefix, tag); {
			case tag == "":
			case field.Kind() == reflect.Struct:
				visit(field, key)
			case field.Kind() == reflect.Slice && field.Elem().Kind() == reflect.Struct:
				visit(field.Elem(), join(key, "0"))
			default:
				keys = append(keys, key)
			}
		}
	}
	visit(reflect.TypeFor[Registry](), "")
	return keys
}

// EnvName returns the environment variable of a key.
func EnvName(key string) string {
	return EnvPrefix + strings.ToUpper(strings.ReplaceAll(key, ".", "_"))
}

// keyOfEnv returns the key of an environment variable, whose name is given
// without EnvPrefix.
func keyOfEnv(t reflect.Type, name string) (string, bool) {
	for i := range t.NumField() {
		tag, field := t.Field(i).Tag.Get("toml"), t.Field(i).Type
		if tag == "" {
			continue
		}
		tables := field.Kind() == reflect.Slice && field.Elem().Kind() == reflect.Struct
		rest, below := strings.CutPrefix(name, strings.ToUpper(tag)+"_")
		prefix := tag
		switch {
		case name == strings.ToUpper(tag) && field.Kind() != reflect.Struct && !tables:
			return tag, true
		case below && tables:
			var index string
			index, rest, below = strings.Cut(rest, "_")
			if n, err := strconv.ParseUint(index, 10, 16); err != nil || n >= maxList {
				continue
			}
			prefix, field = join(tag, index), field.Elem()
		case below && field.Kind() == reflect.Struct:
		default:
			continue
		}
		if key, ok := keyOfEnv(field, rest); below && ok {
			return join(prefix, key), true
		}
	}
	return "", false
}

// suggest returns "; did you mean …?" with the key that looks most like one
// that doesn't exist, or "".
func suggest(key string) string { return closest(key, Keys()) }

func suggestEnv(name string) string {
	var names []string
	for _, key := range Keys() {
		names = append(names, EnvName(key))
	}
	return closest(name, names)
}

func closest(wrong string, known []string) string {
	if len(wrong) > 100 {
		return "" // and would take long
	}
	best, least := "", 3+len(wrong)/8 // more differences than that are no slip
	for _, k := range known {
		d := distance(wrong, k)
		// The right name in the wrong table.
		if last := k[strings.LastIndexByte(k, '.')+1:]; last == wrong[strings.LastIndexByte(wrong, '.')+1:] {
			d = min(d, 2)
		}
		if d < least {
			best, least = k, d
		}
	}
	if best == "" {
		return ""
	}
	return "; did you mean " + best + "?"
}

// distance is the Levenshtein distance.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(row[j]+1, row[j+1]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}
