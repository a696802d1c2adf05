package storage

import (
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// A key that is accepted is a path inside the store's directory, outside of its
// own, and the only key of that path.
func FuzzCheckKey(f *testing.F) {
	for _, key := range []string{"", "/", "a", "a/b", "../a", "a/../b", "a//b", ".sluice/lock", "a/.b", "_x/sha256:00", "a\x00", "a\n", strings.Repeat("a", 256)} {
		f.Add(key)
	}
	pattern := regexp.MustCompile(`^[!-\-0-~][!-.0-~]{0,254}(/[!-\-0-~][!-.0-~]{0,254})*$`)
	f.Fuzz(func(t *testing.T, key string) {
		if want := len(key) <= maxKey && pattern.MatchString(key); (CheckKey(key) == nil) != want {
			t.Fatalf("key %q: %v, want it accepted: %v", key, CheckKey(key), want)
		}
		if CheckKey(key) != nil {
			return
		}
		path := filepath.Join("/data", key)
		if path != "/data/"+key || strings.HasPrefix(path, "/data/"+internalDir) || strings.Contains(path, "/.") {
			t.Fatalf("key %q is the path %q", key, path)
		}
		for part := range strings.SplitSeq(key, "/") {
			if len(part) == 0 || len(part) > 255 {
				t.Fatalf("key %q has a component of %d bytes", key, len(part))
			}
		}
	})
}
