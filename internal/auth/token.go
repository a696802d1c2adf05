package auth

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Token is an account with the rights of one scope map.
type Token struct {
	Name      string      `json:"name"`
	ScopeMap  string      `json:"scopeMap"`
	Status    Status      `json:"status"`
	Created   time.Time   `json:"created,omitzero"`
	Passwords [2]Password `json:"passwords"`
}

// Password is what can be told of a password.
type Password struct {
	// Created is zero if there is no password.
	Created time.Time `json:"created,omitzero"`

	// Expiry is when it stops working; zero: never.
	Expiry time.Time `json:"expiry,omitzero"`

	hash []byte // bcrypt's; kept out of every form but accountRecord's
}

// Status says whether an account works.
type Status string

// The two.
const (
	Enabled  Status = "enabled"
	Disabled Status = "disabled"
)

// accountRecord is an account as it is stored: a token, or the admin user.
type accountRecord struct {
	Token
	Hashes [2][]byte `json:"hashes"`
}

func (r *accountRecord) check(name string) error {
	if err := checkName("token", r.Name); err != nil {
		return err
	}
	if r.Name != name {
		return fmt.Errorf("%w: token %q under the name %q", ErrInvalid, clip(r.Name), name)
	}
	if r.Status != Enabled && r.Status != Disabled {
		return fmt.Errorf("%w: status %q: it is %s or %s", ErrInvalid, clip(string(r.Status)), Enabled, Disabled)
	}
	for i := range r.Passwords {
		if len(r.Hashes[i]) == 0 {
			r.Passwords[i], r.Hashes[i] = Password{}, nil
		}
		r.Passwords[i].hash = r.Hashes[i]
	}
	return nil
}

func (r *accountRecord) public() Token { return r.Token }

// recordOf is the opposite of public.
func recordOf(t Token) *accountRecord {
	return &accountRecord{Token: t, Hashes: [2][]byte{t.Passwords[0].hash, t.Passwords[1].hash}}
}

// CreateToken stores a new account, which is enabled unless its status says
// otherwise, and has no password yet. Errors: ErrInvalid, ErrExists.
func (a *Authority) CreateToken(ctx context.Context, t Token) (Token, error) {
	if t.Name == a.opts.Admin.Name || t.Name == nullGUID {
		return Token{}, fmt.Errorf("token %s: %w: it is the name of the admin user, or of nobody", t.Name, ErrExists)
	}
	if err := checkName("token", t.Name); err != nil {
		return Token{}, err
	}
	if err := a.checkHasMap(ctx, t); err != nil {
		return Token{}, err
	}
	t.Created, t.Passwords = a.now().UTC(), [2]Password{}
	if t.Status == "" {
		t.Status = Enabled
	}
	return a.changeToken(ctx, t.Name, func(old *accountRecord) (*accountRecord, error) {
		if old != nil {
			return nil, fmt.Errorf("token %s: %w", t.Name, ErrExists)
		}
		return recordOf(t), nil
	})
}

// Token returns an account. Errors: ErrNotFound.
func (a *Authority) Token(ctx context.Context, name string) (Token, error) {
	if !namePattern.MatchString(name) {
		return Token{}, fmt.Errorf("token %q: %w", clip(name), ErrNotFound)
	}
	r, err := a.tokens.get(ctx, name)
	if err != nil {
		return Token{}, err
	}
	return r.public(), nil
}

// Tokens lists at most n accounts whose names sort after last.
func (a *Authority) Tokens(ctx context.Context, last string, n int) ([]Token, error) {
	records, err := a.tokens.list(ctx, last, n)
	var all []Token
	for _, r := range records {
		all = append(all, r.public())
	}
	return all, err
}

// UpdateToken changes scope map, status and the expiry of passwords; a password
// that becomes the zero Password is deleted. Errors: ErrNotFound, ErrInvalid,
// and what change returns.
func (a *Authority) UpdateToken(ctx context.Context, name string, change func(*Token) error) (Token, error) {
	return a.updateToken(ctx, name, func(t *Token) error {
		had := t.ScopeMap
		if err := change(t); err != nil {
			return err
		}
		for i, p := range t.Passwords {
			if p.Created.IsZero() {
				t.Passwords[i] = Password{}
			}
		}
		if t.ScopeMap != had {
			return a.checkHasMap(ctx, *t)
		}
		return nil
	})
}

func (a *Authority) updateToken(ctx context.Context, name string, change func(*Token) error) (Token, error) {
	if err := checkName("token", name); err != nil {
		return Token{}, err
	}
	return a.changeToken(ctx, name, func(old *accountRecord) (*accountRecord, error) {
		if old == nil {
			return nil, fmt.Errorf("token %s: %w", name, ErrNotFound)
		}
		t := old.public()
		if err := change(&t); err != nil {
			return nil, err
		}
		t.Name, t.Created = name, old.Created
		return recordOf(t), nil
	})
}

// DeleteToken removes an account. Errors: ErrNotFound.
func (a *Authority) DeleteToken(ctx context.Context, name string) error {
	if err := checkName("token", name); err != nil {
		return err
	}
	_, err := a.tokens.change(ctx, name, func(old *accountRecord) (*accountRecord, error) {
		if old == nil {
			return nil, fmt.Errorf("token %s: %w", name, ErrNotFound)
		}
		return nil, nil
	})
	return err
}

// GeneratePassword replaces password 1 or 2 of an account by a new one, which
// is returned this once: only its hash is stored. A zero expiry means that it
// works until it is replaced. Errors: ErrNotFound, ErrInvalid.
func (a *Authority) GeneratePassword(ctx context.Context, name string, number int, expiry time.Time) (string, error) {
	secret, p, err := a.newPassword(number, expiry)
	if err != nil {
		return "", err
	}
	_, err = a.updateToken(ctx, name, func(t *Token) error {
		t.Passwords[number-1] = p
		return nil
	})
	if err != nil {
		return "", err
	}
	return secret, nil
}

func (a *Authority) newPassword(number int, expiry time.Time) (string, Password, error) {
	now := a.now().UTC()
	if number != 1 && number != 2 {
		return "", Password{}, fmt.Errorf("%w: password %d: there are 1 and 2", ErrInvalid, number)
	}
	if !expiry.IsZero() && !expiry.After(now) {
		return "", Password{}, fmt.Errorf("%w: a password that expired at %s already", ErrInvalid, expiry.UTC().Format(time.RFC3339))
	}
	secret := newSecret()
	hash, err := a.passwords.hash(secret)
	return secret, Password{Created: now, Expiry: expiry, hash: hash}, err
}

func (a *Authority) changeToken(ctx context.Context, name string, edit func(*accountRecord) (*accountRecord, error)) (Token, error) {
	r, err := a.tokens.change(ctx, name, edit)
	if err != nil {
		return Token{}, err
	}
	return r.public(), nil
}

func (a *Authority) checkHasMap(ctx context.Context, t Token) error {
	_, err := a.scopeMap(ctx, t.ScopeMap)
	if errors.Is(err, ErrNotFound) {
		return fmt.Errorf("token %s: %w: there is no scope map %q", t.Name, ErrInvalid, clip(t.ScopeMap))
	}
	return err
}

// Admin says whether and how there is an admin user, who may do everything.
type Admin struct {
	Enabled bool

	// Name is by default "admin".
	Name string

	// Password, if not empty, is password 1 whatever it was before. It has
	// at most 72 bytes, which is what bcrypt takes.
	Password string

	// Show is called with a generated password 1, before it is stored: at
	// the first start without a configured one. An error of it means that
	// nobody has the password, so it isn't stored, and Open fails. Nil: a
	// password must be configured at the first start.
	Show func(password string) error
}

// maxAdminName is in bytes; HTTP's Basic authentication takes no colon.
const maxAdminName = 100

// openAdmin sees to it that the admin user has a password.
func (a *Authority) openAdmin(ctx context.Context) error {
	opts := a.opts.Admin
	if !opts.Enabled {
		return nil
	}
	if len(opts.Name) > maxAdminName || strings.Contains(opts.Name, ":") || opts.Name == nullGUID {
		return fmt.Errorf("%q can't be the admin user's name: use up to %d characters without a colon", clip(opts.Name), maxAdminName)
	}
	if len(opts.Password) > maxPassword {
		return fmt.Errorf("the admin user's password has %d bytes: %d are allowed", len(opts.Password), maxPassword)
	}
	_, err := a.admin.change(ctx, adminObject, func(old *accountRecord) (*accountRecord, error) {
		if old == nil {
			old = recordOf(Token{Name: adminObject, Status: Enabled, Created: a.now().UTC()})
		}
		t := old.public()
		switch {
		case opts.Password != "" && !a.passwords.is(opts.Password, t.Passwords[0].hash):
			hash, err := a.passwords.hash(opts.Password)
			if err != nil {
				return nil, err
			}
			t.Passwords[0] = Password{Created: a.now().UTC(), hash: hash}
		case opts.Password == "" && !slices.ContainsFunc(t.Passwords[:], func(p Password) bool { return p.hash != nil }):
			if opts.Show == nil {
				return nil, errors.New("the admin user has no password: configure one")
			}
			secret, p, err := a.newPassword(1, time.Time{})
			if err != nil {
				return nil, err
			}
			if err := opts.Show(secret); err != nil {
				return nil, fmt.Errorf("its generated password: %w", err)
			}
			t.Passwords[0] = p
		}
		return recordOf(t), nil
	})
	if err != nil {
		return fmt.Errorf("admin user: %w", err)
	}
	return nil
}

// GenerateAdminPassword is GeneratePassword for the admin user. Password 1
// can't be generated while it is configured. Errors: ErrInvalid, ErrNotFound.
func (a *Authority) GenerateAdminPassword(ctx context.Context, number int, expiry time.Time) (string, error) {
	if !a.opts.Admin.Enabled {
		return "", fmt.Errorf("admin user: %w: it isn't enabled in the configuration", ErrNotFound)
	}
	if number == 1 && a.opts.Admin.Password != "" {
		return "", fmt.Errorf("admin user: %w: password 1 is set by the configuration; change it there, or generate password 2", ErrInvalid)
	}
	secret, p, err := a.newPassword(number, expiry)
	if err != nil {
		return "", err
	}
	_, err = a.admin.change(ctx, adminObject, func(old *accountRecord) (*accountRecord, error) {
		if old == nil {
			return nil, fmt.Errorf("admin user: %w", ErrNotFound)
		}
		t := old.public()
		t.Passwords[number-1] = p
		return recordOf(t), nil
	})
	if err != nil {
		return "", err
	}
	return secret, nil
}
