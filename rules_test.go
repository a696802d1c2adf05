// Package sluice_test holds the rules of the house: what may import what, what
// must be documented, how large a room may grow. Each rule says why in its
// failure text.
package sluice_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// levels orders the packages: one may import only those with a lower number.
// A child that isn't listed has its parent's level and may import the parent.
var levels = map[string]int{
	"oci":                         0,
	"internal/durable":            0,
	"internal/background":         0,
	"internal/human":              0,
	"internal/journal":            0,
	"internal/node/endpoint":      0,
	"internal/erofs":              1,
	"internal/layer":              1,
	"internal/blob":               1,
	"internal/storage":            1,
	"internal/index":              1,
	"internal/transfer":           1,
	"internal/config":             1,
	"internal/vhd":                1,
	"internal/artifact":           2,
	"internal/auth":               2,
	"internal/stored":             2,
	"internal/notify":             2,
	"internal/remote":             3,
	"internal/registry":           3,
	"internal/convert":            3,
	"internal/node/cache":         3,
	"internal/node/plane":         3,
	"internal/node/smb":           3,
	"internal/node/timeline":      3,
	"internal/node/happening":     3,
	"internal/operation":          3,
	"internal/teleport":           4,
	"internal/streaming":          4,
	"internal/webhook":            4,
	"internal/node/mount":         4,
	"internal/node/hosts":         4,
	"internal/node/credentials":   4,
	"internal/node/cri":           4,
	"internal/node/pulled":        4,
	"internal/acr":                5,
	"internal/node/attribution":   5,
	"internal/node/mount/control": 5,
	"internal/node/snapshot":      5,
	"internal/node/disks":         5,
	"internal/node/run":           5,
	"internal/node/report":        5,
	"internal/kube":               5,
	"internal/node/install":       5,
	"cmd":                         7,

	"internal/teleport/mountserver": 5,
	"internal/node/report/teleport": 6,
	"internal/node/serve":           6,
}

// homes pins heavy or delicate libraries to the packages that may import them.
var homes = map[string][]string{
	"github.com/containerd/containerd":       {"internal/node/snapshot", "internal/node/hosts"}, // hosts: its parser is what hosts.toml means
	"github.com/containerd/errdefs":          {"internal/node/snapshot", "internal/node/hosts"},
	"google.golang.org/grpc":                 {"internal/node/snapshot", "internal/node/cri"},
	"k8s.io/cri-api":                         {"internal/node/cri"},
	"k8s.io/client-go":                       {"internal/kube/apiserver"}, // the node daemon stays small without them
	"k8s.io/api":                             {"internal/kube/apiserver"},
	"k8s.io/apimachinery":                    {"internal/kube/apiserver"},
	"go.etcd.io/bbolt":                       {"internal/node/snapshot"},
	"oras.land/oras-go":                      {"internal/remote"},
	"github.com/coreos/go-systemd":           {"internal/journal"},
	"github.com/Azure/azure-sdk-for-go":      {"internal/storage/azureblob"},
	"github.com/minio/minio-go":              {"internal/storage/s3"},
	"modernc.org/sqlite":                     {"internal/index"},
	"github.com/jackc/pgx":                   {"internal/index"},
	"github.com/go-jose/go-jose":             {"internal/auth"},
	"github.com/coreos/go-oidc":              {"internal/auth"},
	"golang.org/x/crypto/bcrypt":             {"internal/auth"},
	"golang.org/x/crypto/md4":                {"internal/teleport/samba"}, // Windows' passwords
	"github.com/prometheus/client_golang":    {"internal/registry", "internal/node/report"},
	"go.opentelemetry.io/otel/exporters":     {"cmd"},
	"github.com/BurntSushi/toml":             {"internal/config"},
	"github.com/pelletier/go-toml":           {"internal/node/hosts", "internal/node/install"}, // containerd's: what it reads, we read alike
	"github.com/cloudsoda/go-smb2":           {"internal/node/smb"},
	"github.com/sirupsen/logrus":             {"internal/node/hosts"},       // what containerd's parser complains to
	"go.yaml.in/yaml":                        {"internal/node/credentials"}, // kubelet's configuration
	"github.com/johannesboyne/gofakes3":      nil,                           // tests only: S3 in this process
	"github.com/opencontainers/runtime-spec": {"internal/node/run"},
	"github.com/spf13/cobra":                 {"cmd"},
	"github.com/vbauerster/mpb":              {"cmd"},
	"github.com/opencontainers/go-digest":    {"oci"},
	"github.com/opencontainers/image-spec":   {"oci"},
	"github.com/distribution/reference":      {"oci"},
	"github.com/klauspost/compress/zstd":     {"internal/layer", "internal/artifact"},
	"github.com/klauspost/compress/gzip":     {"internal/layer"},
	"github.com/moby/sys/mountinfo":          {"internal/node"},
	"net/http/pprof":                         nil,
	"github.com/google/go-cmp":               nil, // tests only
	"pgregory.net/rapid":                     nil, // tests only
	"github.com/erofs/go-erofs":              nil, // tests only: an independent reader
}

const (
	maxFileLines     = 500
	maxFunctionLines = 80
)

// source is one parsed Go file of the main module.
type source struct {
	name  string // slash-separated, relative to the root
	pkg   string // its directory
	test  bool
	file  *ast.File
	fset  *token.FileSet
	lines int
}

func sources(t *testing.T) []source {
	t.Helper()
	var all []source
	err := filepath.WalkDir(".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (name == "test" || name == "bin" || strings.HasPrefix(d.Name(), ".") && name != "." || d.Name() == "testdata") {
			return filepath.SkipDir // test holds nested modules with rules of their own
		}
		if filepath.Ext(name) != ".go" {
			return nil
		}
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, name, nil, parser.ParseComments)
		if err != nil {
			return err
		}
		name = filepath.ToSlash(name)
		all = append(all, source{
			name: name, pkg: path.Dir(name), test: strings.HasSuffix(name, "_test.go"),
			file: f, fset: fset, lines: fset.File(f.Pos()).LineCount(),
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// levelOf returns the level of a package and the listed room it belongs to.
func levelOf(pkg string) (level int, room string) {
	for dir := pkg; dir != "."; dir = path.Dir(dir) {
		if l, ok := levels[dir]; ok {
			return l, dir
		}
	}
	return -1, ""
}

func imports(s source) []string {
	var all []string
	for _, i := range s.file.Imports {
		p, _ := strconv.Unquote(i.Path.Value)
		all = append(all, p)
	}
	return all
}

func TestImportsPointDownwards(t *testing.T) {
	for _, s := range sources(t) {
		if s.test || s.pkg == "." {
			continue
		}
		level, room := levelOf(s.pkg)
		if level < 0 {
			t.Errorf("%s: package %s has no level; give it one in rules_test.go, so that the next reader knows what it may depend on", s.name, s.pkg)
			continue
		}
		for _, p := range imports(s) {
			pkg, ours := strings.CutPrefix(p, "sluice/")
			if !ours {
				continue
			}
			l, r := levelOf(pkg)
			if l < level || r == room && (strings.HasPrefix(s.pkg, pkg+"/") || isSupport(pkg, room)) {
				continue
			}
			t.Errorf("%s (level %d) imports %s (level %d): packages import only lower levels, and children their parents, so that every part can be read and tested without what is built on it", s.name, level, pkg, l)
		}
	}
}

// isSupport reports whether pkg is a package of format constants that only
// its room uses (Go's own "internal" convention).
func isSupport(pkg, room string) bool { return strings.HasPrefix(pkg, room+"/internal/") }

func TestLibrariesHaveOneHome(t *testing.T) {
	for _, s := range sources(t) {
		if s.test || strings.HasSuffix(s.pkg, "test") {
			continue
		}
		for _, p := range imports(s) {
			for lib, rooms := range homes {
				if p != lib && !strings.HasPrefix(p, lib+"/") {
					continue
				}
				if !slices.ContainsFunc(rooms, func(r string) bool { return s.pkg == r || strings.HasPrefix(s.pkg, r+"/") }) {
					t.Errorf("%s imports %s, whose home is %v: a library that lives in one place can be replaced in one place", s.name, p, rooms)
				}
			}
		}
	}
}

// TestSluiceLinksNoSMB holds what README.md says of licences.
func TestSluiceLinksNoSMB(t *testing.T) {
	uses := map[string][]string{} // packages of this module
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		for _, p := range imports(s) {
			if pkg, ours := strings.CutPrefix(p, "sluice/"); ours {
				uses[s.pkg] = append(uses[s.pkg], pkg)
			}
		}
	}
	for _, program := range []string{"cmd/sluice", "cmd/sluice-reporter"} {
		reached := map[string]bool{}
		for next := []string{program}; len(next) > 0; next = next[1:] {
			if !reached[next[0]] {
				reached[next[0]] = true
				next = append(next, uses[next[0]]...)
			}
		}
		if reached["internal/node/smb"] {
			t.Errorf("%s reaches internal/node/smb: its library is under the LGPL, and only teleportd links it", program)
		}
	}
}

func TestPackagesAreDocumented(t *testing.T) {
	documented := map[string]bool{}
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		documented[s.pkg] = documented[s.pkg] || s.file.Doc != nil && len(s.file.Doc.Text()) > 60
	}
	for pkg, ok := range documented {
		if !ok {
			t.Errorf("package %s has no doc comment from which a newcomer could start", pkg)
		}
	}
}

func TestNamesSayWhatIsInside(t *testing.T) {
	for _, s := range sources(t) {
		switch path.Base(s.pkg) {
		case "util", "utils", "common", "helper", "helpers", "types", "base", "core", "misc":
			t.Errorf("%s: a package named %s collects whatever has no room; name it after what it promises", s.name, path.Base(s.pkg))
		}
	}
}

func TestFilesAndFunctionsAreSmall(t *testing.T) {
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		if s.lines > maxFileLines {
			t.Errorf("%s has %d lines, more than %d: a file that long holds more than one thought", s.name, s.lines, maxFileLines)
		}
		if strings.HasSuffix(s.pkg, "test") {
			continue // conformance suites read like tests
		}
		for _, d := range s.file.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			if n := s.fset.Position(f.End()).Line - s.fset.Position(f.Pos()).Line; n > maxFunctionLines {
				t.Errorf("%s: %s has %d lines, more than %d: it does more than one thing", s.name, f.Name.Name, n, maxFunctionLines)
			}
		}
	}
}

func TestNoHiddenState(t *testing.T) {
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		for _, d := range s.file.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && f.Recv == nil && f.Name.Name == "init" {
				t.Errorf("%s: init runs before anyone can say no; do it where it is needed", s.name)
			}
		}
		ast.Inspect(s.file, func(n ast.Node) bool {
			if st, ok := n.(*ast.StructType); ok {
				for _, f := range st.Fields.List {
					if sel, ok := f.Type.(*ast.SelectorExpr); ok && sel.Sel.Name == "Context" && isIdent(sel.X, "context") && f.Comment == nil && f.Doc == nil {
						t.Errorf("%s: a context in a struct may outlive the call it belongs to; pass it as the first argument or, in an adapter to an interface without contexts, say at the field whose it is", s.fset.Position(f.Pos()))
					}
				}
			}
			if c, ok := n.(*ast.CallExpr); ok && !strings.HasPrefix(s.pkg, "cmd") {
				if sel, ok := c.Fun.(*ast.SelectorExpr); ok && isIdent(sel.X, "context") && sel.Sel.Name == "TODO" {
					t.Errorf("%s: context.TODO: take a context from the caller", s.fset.Position(c.Pos()))
				}
			}
			return true
		})
	}
}

func isIdent(e ast.Expr, name string) bool {
	id, ok := e.(*ast.Ident)
	return ok && id.Name == name
}

// TestComplaintsAreTested holds that docs/complaints.md names tests that exist.
func TestComplaintsAreTested(t *testing.T) {
	doc, err := os.ReadFile("docs/complaints.md")
	if err != nil {
		t.Fatal(err)
	}
	exist := map[string]bool{}
	err = filepath.WalkDir(".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(name, "_test.go") {
			return err
		}
		content, err := os.ReadFile(name)
		for _, m := range regexp.MustCompile(`(?m)^func (Test\w+)\(`).FindAllSubmatch(content, -1) {
			exist[string(m[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile("`(Test\\w+)`").FindAllSubmatch(doc, -1)
	for _, m := range named {
		if !exist[string(m[1])] {
			t.Errorf("docs/complaints.md names the test %s, which doesn't exist: a complaint without a test comes back", m[1])
		}
	}
	if len(named) < 50 {
		t.Errorf("docs/complaints.md names %d tests", len(named))
	}
}
