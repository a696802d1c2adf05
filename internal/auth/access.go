package auth

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"sluice/oci"
)

// What can be done to a repository.
const (
	ActionPull          = "pull"
	ActionPush          = "push"
	ActionDelete        = "delete"
	ActionMetadataRead  = "metadata_read"
	ActionMetadataWrite = "metadata_write"
	ActionAll           = "*"

	// What Azure's command line asks for with what was deleted softly: to
	// list it and to restore it.
	actionDeletedRead    = "deleted_read"
	actionDeletedRestore = "deleted_restore"
)

// Types of things that access is to.
const (
	TypeRepository = "repository"
	TypeRegistry   = "registry"
)

// Access is the right to do something, or the wish: a scope of Docker's token
// protocol, and an element of the claim "access".
type Access struct {
	Type    string   `json:"type"`
	Name    string   `json:"name"`
	Actions []string `json:"actions"`
}

// ToRepository is the access of these actions to a repository.
func ToRepository(name string, actions ...string) Access {
	return Access{Type: TypeRepository, Name: name, Actions: actions}
}

// Catalog is the access that listing all repositories needs.
func Catalog() Access {
	return Access{Type: TypeRegistry, Name: "catalog", Actions: []string{ActionAll}}
}

// String returns the scope: "repository:a/b:pull,push".
func (a Access) String() string {
	return a.Type + ":" + a.Name + ":" + strings.Join(a.Actions, ",")
}

// FormatScopes joins scopes as a challenge and a form do.
func FormatScopes(access []Access) string {
	scopes := make([]string, len(access))
	for i, a := range access {
		scopes[i] = a.String()
	}
	return strings.Join(scopes, " ")
}

const (
	maxScope   = 512 // bytes of one scope; a repository name has at most 255
	maxScopes  = 64  // so that a token fits into maxToken
	maxActions = 16
)

var (
	errScope      = errors.New("not a scope")
	scopePattern  = regexp.MustCompile(`^([a-z0-9]+)(?:\([a-z0-9]+\))?:(.+):([^:]*)$`)
	actionPattern = regexp.MustCompile(`^([a-z_]{1,32}|\*)$`)
	objectPattern = regexp.MustCompile(`^[a-z0-9_.-]{1,64}$`) // what a registry has besides repositories
)

// ParseScope parses a scope: type, name and actions, "repository:a/b:pull,push"
// (https://distribution.github.io/distribution/spec/auth/scope/). A class in
// brackets after the type is dropped. Types and actions that nobody has are
// accepted: they are merely never granted.
func ParseScope(s string) (Access, error) {
	if len(s) > maxScope {
		return Access{}, fmt.Errorf("scope of %d bytes: %w: at most %d are allowed", len(s), errScope, maxScope)
	}
	m := scopePattern.FindStringSubmatch(s)
	if m == nil {
		return Access{}, fmt.Errorf("%q is %w: write type:name:actions, such as repository:team/app:pull", s, errScope)
	}
	a := Access{Type: m[1], Name: m[2]}
	if a.Type == TypeRepository {
		if err := oci.CheckRepository(a.Name); err != nil {
			return Access{}, fmt.Errorf("%q is %w: %v", s, errScope, err) //nolint:errorlint // of the scope, not of a request for a repository
		}
	} else if !objectPattern.MatchString(a.Name) {
		return Access{}, fmt.Errorf("%q is %w: %q names nothing of a registry", s, errScope, a.Name)
	}
	actions := strings.SplitN(m[3], ",", maxActions+1)
	if len(actions) > maxActions {
		return Access{}, fmt.Errorf("%q is %w: more than %d actions", s, errScope, maxActions)
	}
	for _, action := range actions {
		if !actionPattern.MatchString(action) {
			return Access{}, fmt.Errorf("%q is %w: %q is not an action", s, errScope, action)
		}
		if !slices.Contains(a.Actions, action) {
			a.Actions = append(a.Actions, action)
		}
	}
	return a, nil
}

// parseScopes parses the values of the parameter scope, each of which may hold
// several separated by spaces, and joins those of the same thing.
func parseScopes(values []string) ([]Access, error) {
	var all []Access
	for _, value := range values {
		for s := range strings.FieldsSeq(value) {
			a, err := ParseScope(s)
			if err != nil {
				return nil, err
			}
			i := slices.IndexFunc(all, func(b Access) bool { return a.Type == b.Type && a.Name == b.Name })
			if i < 0 {
				if len(all) == maxScopes {
					return nil, fmt.Errorf("%w: more than %d scopes at once", errScope, maxScopes)
				}
				all = append(all, a)
				continue
			}
			for _, action := range a.Actions {
				if !slices.Contains(all[i].Actions, action) {
					all[i].Actions = append(all[i].Actions, action)
				}
			}
		}
	}
	return all, nil
}

// actionSet is a set of what can be done to a repository, a bit each.
type actionSet uint8

const (
	canPull actionSet = 1 << iota
	canPush
	canDelete
	canMetadataRead
	canMetadataWrite

	canNothing actionSet = 0
	canAll     actionSet = 1<<5 - 1

	// publicActions is what is open in a repository that is open to all.
	publicActions = canPull | canMetadataRead
)

// bitOf returns the set of one action; of one that nobody has, the empty set.
func bitOf(action string) actionSet {
	switch action {
	case ActionPull:
		return canPull
	case ActionPush, actionDeletedRestore:
		return canPush
	case ActionDelete:
		return canDelete
	case ActionMetadataRead, actionDeletedRead:
		return canMetadataRead
	case ActionMetadataWrite:
		return canMetadataWrite
	case ActionAll:
		return canAll
	}
	return canNothing
}

// setOf returns the set of several; ok is false if one of them isn't known.
func setOf(actions []string) (set actionSet, ok bool) {
	ok = true
	for _, action := range actions {
		bit := bitOf(action)
		set |= bit
		ok = ok && bit != canNothing
	}
	return set, ok
}

// grant returns those of the requested actions that are in s, as a token
// spells them: "*" only for one who asked for it and may do everything.
func (s actionSet) grant(requested []string) []string {
	granted := []string{}
	if slices.Contains(requested, ActionAll) {
		if s == canAll {
			return append(granted, ActionAll)
		}
		requested = []string{ActionPull, ActionPush, ActionDelete, ActionMetadataRead, ActionMetadataWrite}
	}
	for _, action := range requested {
		if bit := bitOf(action); bit != canNothing && bit&s == bit {
			granted = append(granted, action)
		}
	}
	return granted
}
