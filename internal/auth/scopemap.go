package auth

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"sluice/oci"
)

// ScopeMap is a named set of rights, which tokens and federated callers have.
type ScopeMap struct {
	Name        string `json:"name"`
	Description string `json:"description,omitempty"`

	// Actions are rights in the form repositories/NAME/RIGHT, with the
	// rights content/read, content/write, content/delete, metadata/read,
	// metadata/write. NAME is a repository, "*" for all, or "team/*" for all
	// below team. They add up: none takes away what another gives.
	Actions []string `json:"actions"`

	Created time.Time `json:"created,omitzero"`

	// Builtin is true of those that every registry has and nobody changes.
	Builtin bool `json:"builtin,omitempty"`
}

// The scope maps that every registry has, as Azure's.
const (
	MapAdmin             = "_repositories_admin"
	MapPull              = "_repositories_pull"
	MapPullMetadataRead  = "_repositories_pull_metadata_read"
	MapPush              = "_repositories_push"
	MapPushMetadataWrite = "_repositories_push_metadata_write"
)

// builtinMaps returns them by name, in order.
func builtinMaps() []*mapRecord {
	all := []*mapRecord{
		builtin(MapAdmin, "everything in all repositories", "content/delete", "content/read", "content/write", "metadata/read", "metadata/write"),
		builtin(MapPull, "pull from all repositories", "content/read"),
		builtin(MapPullMetadataRead, "pull from all repositories and read their metadata", "content/read", "metadata/read"),
		builtin(MapPush, "push to and pull from all repositories", "content/read", "content/write"),
		builtin(MapPushMetadataWrite, "push to and pull from all repositories, read and write their metadata", "content/read", "content/write", "metadata/read", "metadata/write"),
	}
	return all
}

func builtin(name, description string, rights ...string) *mapRecord {
	m := &mapRecord{ScopeMap: ScopeMap{Name: name, Description: description, Builtin: true}}
	for _, right := range rights {
		m.Actions = append(m.Actions, "repositories/*/"+right)
		m.grants.add("", true, rightBit(right))
	}
	return m
}

func rightBit(right string) actionSet {
	switch right {
	case "content/read":
		return canPull
	case "content/write":
		return canPush
	case "content/delete":
		return canDelete
	case "metadata/read":
		return canMetadataRead
	case "metadata/write":
		return canMetadataWrite
	}
	return canNothing
}

const (
	maxMapActions  = 1000
	maxDescription = 500
)

var (
	namePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,49}$`)
	mapPattern  = regexp.MustCompile(`^repositories/(.+)/((?:content|metadata)/[a-z]+)$`)
)

// checkName says whether an account or a scope map can have the name. They are
// 1 to 50 characters (Azure: 5 to 50), so that one can be a user name of HTTP's
// Basic authentication and a key of the storage.
func checkName(what, name string) error {
	if !namePattern.MatchString(name) {
		return fmt.Errorf("%w: %q as the name of a %s: use 1 to 50 letters, digits, - and _, beginning with a letter or digit", ErrInvalid, clip(name), what)
	}
	return nil
}

// mapRecord is a scope map as it is stored, and what it comes to.
type mapRecord struct {
	ScopeMap
	grants grants
}

// check validates what was read or is to be written, and works out the grants.
func (m *mapRecord) check(name string) error {
	if err := checkName("scope map", m.Name); err != nil {
		return err
	}
	if m.Name != name {
		return fmt.Errorf("%w: scope map %q under the name %q", ErrInvalid, clip(m.Name), name)
	}
	if len(m.Description) > maxDescription {
		return fmt.Errorf("%w: a description of %d bytes: %d are allowed", ErrInvalid, len(m.Description), maxDescription)
	}
	if len(m.Actions) == 0 || len(m.Actions) > maxMapActions {
		return fmt.Errorf("%w: a scope map of %d actions: it can have 1 to %d", ErrInvalid, len(m.Actions), maxMapActions)
	}
	m.Builtin, m.grants = false, grants{}
	for _, action := range m.Actions {
		if err := m.grants.parse(action); err != nil {
			return err
		}
	}
	return nil
}

// grants is what a scope map comes to.
type grants struct {
	exact map[string]actionSet // repository → rights
	below map[string]actionSet // "team/" → rights to all below; "" → to all
}

func (g *grants) parse(action string) error {
	m := mapPattern.FindStringSubmatch(action)
	if len(action) > maxScope || m == nil || rightBit(m[2]) == canNothing {
		return fmt.Errorf("%w: %q as an action: write repositories/NAME/RIGHT with one of content/read, content/write, content/delete, metadata/read, metadata/write", ErrInvalid, clip(action))
	}
	name, wildcard := strings.CutSuffix(m[1], "*")
	repo := name
	if wildcard && name != "" {
		var ok bool
		if repo, ok = strings.CutSuffix(name, "/"); !ok {
			return fmt.Errorf("%w: %q as an action: * stands for whole components, as in repositories/team/*/content/read", ErrInvalid, clip(action))
		}
	}
	if repo != "" || !wildcard {
		if err := oci.CheckRepository(repo); err != nil {
			return fmt.Errorf("%w: %q as an action: %w; * can only be the last component", ErrInvalid, clip(action), err)
		}
	}
	g.add(name, wildcard, rightBit(m[2]))
	return nil
}

func (g *grants) add(name string, wildcard bool, rights actionSet) {
	if g.exact == nil {
		g.exact, g.below = map[string]actionSet{}, map[string]actionSet{}
	}
	if wildcard {
		g.below[name] |= rights
	} else {
		g.exact[name] |= rights
	}
}

// of returns the rights to a repository. A nil grants gives none.
func (g *grants) of(repo string) actionSet {
	if g == nil {
		return canNothing
	}
	set := g.exact[repo] | g.below[""]
	for i := range len(repo) {
		if repo[i] == '/' {
			set |= g.below[repo[:i+1]]
		}
	}
	return set
}

// CreateScopeMap stores a new scope map. Errors: ErrInvalid, ErrExists.
func (a *Authority) CreateScopeMap(ctx context.Context, m ScopeMap) (ScopeMap, error) {
	if err := checkName("scope map", m.Name); err != nil { // which those of the system don't pass
		return ScopeMap{}, err
	}
	m.Created = a.now().UTC()
	r, err := a.maps.change(ctx, m.Name, func(old *mapRecord) (*mapRecord, error) {
		if old != nil {
			return nil, fmt.Errorf("scope map %s: %w", m.Name, ErrExists)
		}
		return &mapRecord{ScopeMap: m}, nil
	})
	if err != nil {
		return ScopeMap{}, err
	}
	return r.public(), nil
}

// ScopeMap returns a scope map. Errors: ErrNotFound.
func (a *Authority) ScopeMap(ctx context.Context, name string) (ScopeMap, error) {
	r, err := a.scopeMap(ctx, name)
	if err != nil {
		return ScopeMap{}, err
	}
	return r.public(), nil
}

// scopeMap is ScopeMap; the result is shared and must not be changed.
func (a *Authority) scopeMap(ctx context.Context, name string) (*mapRecord, error) {
	if i := slices.IndexFunc(a.builtin, func(m *mapRecord) bool { return m.Name == name }); i >= 0 {
		return a.builtin[i], nil
	}
	if !namePattern.MatchString(name) {
		return nil, fmt.Errorf("scope map %q: %w", clip(name), ErrNotFound)
	}
	return a.maps.get(ctx, name)
}

// ScopeMaps lists those of the system if last is empty, and then at most n
// others whose names sort after last.
func (a *Authority) ScopeMaps(ctx context.Context, last string, n int) ([]ScopeMap, error) {
	var all []ScopeMap
	if last == "" {
		for _, m := range a.builtin {
			all = append(all, m.public())
		}
	}
	records, err := a.maps.list(ctx, last, n)
	for _, r := range records {
		all = append(all, r.public())
	}
	return all, err
}

// UpdateScopeMap changes description and actions. Errors: ErrNotFound,
// ErrInvalid, and what change returns.
func (a *Authority) UpdateScopeMap(ctx context.Context, name string, change func(*ScopeMap) error) (ScopeMap, error) {
	if err := checkName("scope map that can be changed", name); err != nil {
		return ScopeMap{}, err
	}
	r, err := a.maps.change(ctx, name, func(old *mapRecord) (*mapRecord, error) {
		if old == nil {
			return nil, fmt.Errorf("scope map %s: %w", name, ErrNotFound)
		}
		m := old.public()
		if err := change(&m); err != nil {
			return nil, err
		}
		m.Name, m.Created = name, old.Created
		return &mapRecord{ScopeMap: m}, nil
	})
	if err != nil {
		return ScopeMap{}, err
	}
	return r.public(), nil
}

// DeleteScopeMap removes a scope map that no token has. Errors: ErrNotFound,
// ErrInUse. A token that gets the map at this moment is left without rights.
func (a *Authority) DeleteScopeMap(ctx context.Context, name string) error {
	if err := checkName("scope map that can be deleted", name); err != nil {
		return err
	}
	for last := ""; ; {
		tokens, err := a.tokens.list(ctx, last, 100)
		if err != nil {
			return err
		}
		for _, t := range tokens {
			if t.ScopeMap == name {
				return fmt.Errorf("scope map %s: %w: token %s has it", name, ErrInUse, t.Name)
			}
			last = t.Name
		}
		if len(tokens) < 100 {
			break
		}
	}
	_, err := a.maps.change(ctx, name, func(old *mapRecord) (*mapRecord, error) {
		if old == nil {
			return nil, fmt.Errorf("scope map %s: %w", name, ErrNotFound)
		}
		return nil, nil
	})
	return err
}

func (m *mapRecord) public() ScopeMap {
	s := m.ScopeMap
	s.Actions = slices.Clone(m.Actions)
	return s
}

// grantsOf returns what a scope map gives; one that doesn't exist, nothing.
func (a *Authority) grantsOf(ctx context.Context, name string) (*grants, error) {
	m, err := a.scopeMap(ctx, name)
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return &m.grants, nil
}
