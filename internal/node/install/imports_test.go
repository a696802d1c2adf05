package install

import (
	"strings"
	"testing"
)

const pattern = "/etc/containerd/conf.d/sluice*.toml"

// TestAddImport: an import is added in every shape that a configuration has,
// nothing else changes, and taking it out again gives the old text.
func TestAddImport(t *testing.T) {
	for name, c := range map[string]struct{ old, want string }{
		"empty":    {"", "imports = [\"P\"]\n"},
		"version":  {"# mine\nversion = 2\n\nroot = \"/x\"\n", "# mine\nversion = 2\nimports = [\"P\"]\n\nroot = \"/x\"\n"},
		"table":    {"[plugins]\n# imports = [\n", "imports = [\"P\"]\n[plugins]\n# imports = [\n"},
		"none yet": {"version = 3\nimports = []\n[grpc]\n", "version = 3\nimports = [\"P\"]\n[grpc]\n"},
		"one":      {"imports = ['a.toml'] # why\n", "imports = ['a.toml', \"P\"] # why\n"},
		"lines": {
			"version = 3\nimports = [\n  \"a\\\"].toml\", # ] \"\n  'b',\n  # the end\n]\n[debug]\n",
			"version = 3\nimports = [\n  \"a\\\"].toml\", # ] \"\n  'b', \"P\",\n  # the end\n]\n[debug]\n",
		},
		"windows": {"version = 3\r\n[debug]\r\n", "version = 3\r\nimports = [\"P\"]\r\n[debug]\r\n"},
		"no end":  {"version = 3", "imports = [\"P\"]\nversion = 3"},
	} {
		t.Run(name, func(t *testing.T) {
			want := strings.ReplaceAll(c.want, "P", pattern)
			got, err := addImport([]byte(c.old), pattern)
			if err != nil || string(got) != want {
				t.Fatalf("%q, %v; want %q", got, err, want)
			}
			back, err := dropImport(got, pattern)
			if err != nil {
				t.Fatal(err)
			}
			old := c.old
			if name == "none yet" {
				old = "version = 3\n[grpc]\n" // the line is one of ours as far as can be seen
			}
			if string(back) != old {
				t.Errorf("taken out again: %q, want %q", back, old)
			}
		})
	}
}

// TestImportsThatCannotBeEdited: what isn't understood isn't touched.
func TestImportsThatCannotBeEdited(t *testing.T) {
	for _, text := range []string{"version = ", "imports = [", "imports = 3\n", "imports = [[\n", "\"im\\u0070orts\" = ['a']\n"} {
		if got, err := addImport([]byte(text), pattern); err == nil {
			t.Errorf("%q became %q", text, got)
		}
	}
}

func FuzzImports(f *testing.F) {
	f.Add("version = 3\nimports = ['a', \"b\"]\n[x]\n")
	f.Add("imports = [ # ]\n]")
	f.Fuzz(func(t *testing.T, text string) {
		edited, err := addImport([]byte(text), pattern)
		if err != nil {
			return
		}
		if err := sameBut([]byte(text), edited, mustImports(t, edited)); err != nil {
			t.Error(err)
		}
		if back, err := dropImport(edited, pattern); err == nil {
			if err := sameBut([]byte(text), back, mustImports(t, back)); err != nil {
				t.Error(err)
			}
		}
	})
}

func mustImports(t *testing.T, text []byte) []string {
	t.Helper()
	c, err := parseMain(text)
	if err != nil {
		t.Fatal(err)
	}
	return c.Imports
}
