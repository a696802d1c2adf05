package auth

import (
	"context"
	"errors"
	"slices"

	"sluice/oci"
)

// Kind is what sort of account a caller has.
type Kind string

// The kinds of callers.
const (
	KindAnonymous Kind = "anonymous"
	KindToken     Kind = "token"
	KindFederated Kind = "federated"
	KindAdmin     Kind = "admin"
)

// Caller is who makes a request. The zero Caller may do nothing.
type Caller struct {
	// Name is that of the account: a token's, the admin user's, the subject
	// of a federated caller. Empty when anonymous.
	Name string
	Kind Kind

	// Presented is true if the request came with credentials, be it an
	// access token that was given to nobody in particular. A registry
	// answers GET /v2/ with a challenge where it is false, since that is how
	// clients find out whether, and check that, they can sign in.
	Presented bool

	principal principal
	grants    *grants
	limit     *[]Access // what the access token is for; nil: no limit
	public    func(ctx context.Context, repo string) bool
}

// Allows reports whether the caller may do all that need names. Everybody may
// read what is open to all.
func (c Caller) Allows(ctx context.Context, need Access) bool {
	if len(need.Actions) == 0 {
		return false
	}
	if need.Type != TypeRepository {
		return c.may(need) && (c.limit == nil || slices.ContainsFunc(*c.limit, func(a Access) bool {
			return a.Type == need.Type && a.Name == need.Name && covers(a.Actions, need.Actions)
		}))
	}
	want, ok := setOf(need.Actions)
	if !ok {
		return false
	}
	has := c.rights(need.Name)
	if c.limit != nil {
		has &= limitOf(*c.limit, need.Name)
	}
	missing := want &^ has
	return missing == canNothing || missing&^publicActions == canNothing && c.isPublic(ctx, need.Name)
}

// rights returns what the account has, whatever its token is for.
func (c Caller) rights(repo string) actionSet {
	if c.Kind == KindAdmin {
		return canAll
	}
	return c.grants.of(repo)
}

// may is rights to what is not a repository: for the admin user everything;
// for a federated caller who may do everything to all repositories, their list.
// Tokens have none, as in Azure.
func (c Caller) may(need Access) bool {
	return c.Kind == KindAdmin ||
		c.Kind == KindFederated && c.principal.ScopeMap == MapAdmin && need.Type == TypeRegistry && need.Name == "catalog"
}

func (c Caller) isPublic(ctx context.Context, repo string) bool {
	return c.public != nil && c.public(ctx, repo)
}

// granted returns what of the requested access the caller gets.
func (c Caller) granted(ctx context.Context, requested []Access) []Access {
	granted := []Access{}
	for _, r := range requested {
		var actions []string
		switch {
		case r.Type != TypeRepository:
			if c.may(r) {
				actions = r.Actions
			}
		default:
			set := c.rights(r.Name)
			if want, _ := setOf(r.Actions); want&^set&publicActions != 0 && c.isPublic(ctx, r.Name) {
				set |= publicActions
			}
			actions = set.grant(r.Actions)
		}
		if len(actions) > 0 {
			granted = append(granted, Access{Type: r.Type, Name: r.Name, Actions: actions})
		}
	}
	return granted
}

func limitOf(limit []Access, repo string) actionSet {
	var set actionSet
	for _, a := range limit {
		if a.Type == TypeRepository && a.Name == repo {
			s, _ := setOf(a.Actions)
			set |= s
		}
	}
	return set
}

func covers(has, need []string) bool {
	return slices.Contains(has, ActionAll) || !slices.ContainsFunc(need, func(action string) bool { return !slices.Contains(has, action) })
}

// errSignIn is all that is told of credentials that aren't good.
var errSignIn = oci.ErrUnauthorized.Withf("authentication required: the user name or the password is wrong, has expired or is disabled")

// callerOf looks the account of a principal up as it is now. One that is gone,
// disabled or another by now is errToken.
func (a *Authority) callerOf(ctx context.Context, name string, p principal) (Caller, error) {
	c := Caller{Name: name, Kind: p.Kind, Presented: true, principal: p, public: a.opts.AnonymousPull}
	mapName := p.ScopeMap
	switch p.Kind {
	case KindAnonymous:
		return c, nil
	case KindAdmin:
		if !a.opts.Admin.Enabled || name != a.opts.Admin.Name {
			return Caller{}, errToken
		}
		return c, nil
	case KindToken:
		t, err := a.tokens.get(ctx, name)
		if errors.Is(err, ErrNotFound) || err == nil && (t.Status != Enabled || t.Created.UnixNano() != p.Created) {
			return Caller{}, errToken
		}
		if err != nil {
			return Caller{}, err
		}
		mapName = t.ScopeMap
	case KindFederated:
		if !a.federates(p.Issuer, p.ScopeMap) {
			return Caller{}, errToken
		}
	default:
		return Caller{}, errToken
	}
	var err error
	c.grants, err = a.grantsOf(ctx, mapName)
	return c, err
}
