package config

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Secret is a value that no log, message or dump shows. Its text comes from a
// file or the environment, not from the configuration file, which people copy.
type Secret string

const hidden = "(hidden)"

// Value returns the secret itself.
func (s Secret) Value() string { return string(s) }

// String hides the secret.
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return hidden
}

// GoString hides the secret from %#v.
func (s Secret) GoString() string { return strconv.Quote(s.String()) }

// MarshalText hides the secret from encoders.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// LogValue hides the secret from slog.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// Size is a number of bytes, written as a number or as "4MiB", "10 GB".
type Size int64

// units of sizes, larger ones first.
func units() []struct {
	name  string
	bytes int64
} {
	return []struct {
		name  string
		bytes int64
	}{
		{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10},
		{"TB", 1e12}, {"GB", 1e9}, {"MB", 1e6}, {"kB", 1e3}, {"KB", 1e3}, {"B", 1},
	}
}

// String returns the size with the largest unit that divides it.
func (s Size) String() string {
	for _, u := range units() {
		if s != 0 && int64(s)%u.bytes == 0 && u.bytes > 1 {
			return strconv.FormatInt(int64(s)/u.bytes, 10) + u.name
		}
	}
	return strconv.FormatInt(int64(s), 10)
}

// ParseSize parses a size: a whole number and a unit, or bytes without one.
func ParseSize(s string) (Size, error) {
	number, factor := strings.TrimSpace(s), int64(1)
	for _, u := range units() {
		if rest, ok := strings.CutSuffix(number, u.name); ok {
			number, factor = strings.TrimSpace(rest), u.bytes
			break
		}
	}
	n, err := strconv.ParseUint(number, 10, 63)
	if err != nil || int64(n) > math.MaxInt64/factor {
		return 0, errors.New(`a number of bytes such as 4194304, "4MiB" or "10GB"`)
	}
	return Size(int64(n) * factor), nil
}

// setText sets a value from text, as the environment and flags have it. Errors
// say what is allowed.
func setText(v reflect.Value, text string) error {
	switch v.Interface().(type) {
	case time.Duration:
		d, err := time.ParseDuration(text)
		if err != nil {
			return errors.New(`a duration such as "90s", "75m" or "24h"`)
		}
		v.SetInt(int64(d))
		return nil
	case Size:
		s, err := ParseSize(text)
		v.SetInt(int64(s))
		return err
	case []string:
		list := []string{}
		for part := range strings.SplitSeq(text, ",") {
			if part = strings.TrimSpace(part); part != "" {
				list = append(list, part)
			}
		}
		v.Set(reflect.ValueOf(list))
		return nil
	case map[string]string:
		pairs := map[string]string{}
		for part := range strings.SplitSeq(text, ",") {
			k, val, ok := strings.Cut(part, "=")
			if !ok && strings.TrimSpace(part) != "" {
				return errors.New("pairs like NAME=VALUE,NAME=VALUE")
			}
			if ok {
				pairs[strings.TrimSpace(k)] = strings.TrimSpace(val)
			}
		}
		v.Set(reflect.ValueOf(pairs))
		return nil
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(text)
	case reflect.Bool:
		b, err := strconv.ParseBool(text)
		if err != nil {
			return errors.New("true or false")
		}
		v.SetBool(b)
	case reflect.Int:
		n, err := strconv.ParseInt(text, 10, 32)
		if err != nil {
			return errors.New("a whole number")
		}
		v.SetInt(n)
	default:
		return errors.New("keys of its own: it is a table")
	}
	return nil
}

// setTOML sets a leaf from what the file has for it.
func setTOML(v reflect.Value, value any) error {
	switch value := value.(type) {
	case string:
		if v.Kind() == reflect.String || v.Kind() == reflect.Int64 { // a Duration or a Size
			return setText(v, value)
		}
	case bool:
		if v.Kind() == reflect.Bool {
			v.SetBool(value)
			return nil
		}
	case int64:
		if v.Kind() == reflect.Int && value == int64(int32(value)) || v.Type() == reflect.TypeFor[Size]() && value >= 0 {
			v.SetInt(value)
			return nil
		}
	case []any:
		if v.Type() == reflect.TypeFor[[]string]() {
			list := []string{}
			for _, e := range value {
				s, ok := e.(string)
				if !ok {
					return allowed(v)
				}
				list = append(list, s)
			}
			v.Set(reflect.ValueOf(list))
			return nil
		}
	case map[string]any:
		if v.Type() == reflect.TypeFor[map[string]string]() {
			pairs := map[string]string{}
			for k, e := range value {
				s, ok := e.(string)
				if !ok {
					return allowed(v)
				}
				pairs[k] = s
			}
			v.Set(reflect.ValueOf(pairs))
			return nil
		}
	}
	return allowed(v)
}

// allowed says what a key of v's type may be in the file.
func allowed(v reflect.Value) error {
	switch v.Interface().(type) {
	case time.Duration:
		return errors.New(`a duration such as "90s", "75m" or "24h"`)
	case Size:
		return errors.New(`a number of bytes such as 4194304, "4MiB" or "10GB"`)
	case []string:
		return errors.New(`a list such as ["push", "delete"]`)
	case map[string]string:
		return errors.New(`a table of strings such as { name = "value" }`)
	}
	switch v.Kind() {
	case reflect.Bool:
		return errors.New("true or false")
	case reflect.Int:
		return errors.New("a whole number")
	case reflect.Slice:
		return errors.New("a list of tables, [[…]]")
	case reflect.Struct:
		return errors.New("a table, […]")
	}
	return errors.New(`a string, "…"`)
}

// show returns a leaf as it stands in a file, without what is secret.
func show(v reflect.Value) string {
	switch value := v.Interface().(type) {
	case time.Duration:
		return strconv.Quote(value.String())
	case Size:
		if s := value.String(); strings.Trim(s, "0123456789") != "" {
			return strconv.Quote(s)
		}
		return strconv.FormatInt(int64(value), 10)
	case []string:
		quoted := make([]string, len(value))
		for i, s := range value {
			quoted[i] = strconv.Quote(s)
		}
		return "[" + strings.Join(quoted, ", ") + "]"
	case map[string]string: // of headers and claims; there are tokens in headers
		pairs := []string{}
		for k := range value {
			pairs = append(pairs, fmt.Sprintf("%q = %q", k, hidden))
		}
		slices.Sort(pairs)
		return "{ " + strings.Join(pairs, ", ") + " }"
	case Secret:
		return strconv.Quote(value.String())
	case string:
		return strconv.Quote(withoutPassword(value))
	}
	return fmt.Sprint(v.Interface())
}
