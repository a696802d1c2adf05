package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sluice/internal/acr"
)

func newTokenCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "token",
		Aliases: []string{"tokens"},
		Short:   "Manage tokens: accounts for machines",
		Long: `Manage tokens: accounts for machines.

A token has a name, the rights of one scope map, and two passwords, so that one
can be renewed while the other is in use. Name and password are those of "docker
login". Only the admin user manages tokens.`,
		RunE: group,
	}
	credential := &cobra.Command{Use: "credential", Short: "Manage a token's passwords", RunE: group}
	credential.AddCommand(newTokenCredentialGenerateCommand(), newTokenCredentialDeleteCommand())
	cmd.AddCommand(newTokenCreateCommand(), newTokenListCommand(), newTokenShowCommand(), newTokenUpdateCommand(), newTokenDeleteCommand(), credential)
	return cmd
}

func (f *managementFlags) printToken(w io.Writer, t acr.Token) error {
	return f.print(w, t, func(w io.Writer) {
		fmt.Fprintf(w, "token\t%s\n", t.Name)
		fmt.Fprintf(w, "scope map\t%s\n", t.ScopeMap)
		fmt.Fprintf(w, "status\t%s\n", statusText(t.Enabled))
		fmt.Fprintf(w, "created\t%s\n", when(t.Created))
		for _, p := range t.Passwords {
			fmt.Fprintf(w, "%s\t%s\n", p.Name, passwordText(p))
		}
		if len(t.Passwords) == 0 {
			fmt.Fprintf(w, "passwords\tnone: see sluice token credential generate\n")
		}
	})
}

func statusText(enabled bool) string {
	if enabled {
		return "enabled"
	}
	return "disabled"
}

// passwordText describes a password; with its value, fit for copying, if it is
// new.
func passwordText(p acr.Password) string {
	text := "made " + when(p.Created)
	if p.Value != "" {
		text = p.Value
	}
	switch {
	case p.Expiry.IsZero():
		return text + "  (never expires)"
	case p.Expiry.Before(time.Now()):
		return text + "  (EXPIRED " + when(p.Expiry) + ")"
	}
	return text + "  (expires " + when(p.Expiry) + ")"
}

// expiryFlags say when a password expires.
type expiryFlags struct{ in, at string }

func (f *expiryFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.in, "expires-in", "", "let it expire after `TIME`, such as 90d or 12h\n(default never)")
	cmd.Flags().StringVar(&f.at, "expires", "", "let it expire on `DATE`, 2027-01-31, or at a time,\n2027-01-31T12:00:00Z")
	cmd.MarkFlagsMutuallyExclusive("expires-in", "expires")
}

func (f *expiryFlags) time() (time.Time, error) {
	switch {
	case f.in != "":
		d, err := time.ParseDuration(f.in)
		if days, ok := strings.CutSuffix(f.in, "d"); ok {
			var n uint64
			n, err = strconv.ParseUint(days, 10, 16)
			d = time.Duration(n) * 24 * time.Hour
		}
		if err != nil || d <= 0 {
			return time.Time{}, fmt.Errorf("--expires-in %q: write days as 90d, or hours as 12h", f.in)
		}
		return time.Now().Add(d).UTC().Truncate(time.Second), nil
	case f.at != "":
		for _, layout := range []string{time.RFC3339, time.DateOnly} {
			if t, err := time.ParseInLocation(layout, f.at, time.Local); err == nil {
				return t.UTC(), nil
			}
		}
		return time.Time{}, fmt.Errorf("--expires %q: write a date as 2027-01-31, or a time as 2027-01-31T12:00:00Z", f.at)
	}
	return time.Time{}, nil
}

func newTokenCreateCommand() *cobra.Command {
	var f managementFlags
	var expiry expiryFlags
	var scopeMap string
	var given []string
	var disabled, noPasswords bool
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Make a token, and show its passwords this once",
		Long: `Make a token, and show its passwords this once.

Its rights are those of --scope-map, which "sluice scope-map list" shows, or those
of --repository, for which a scope map NAME-scope-map is made.`,
		Example: `  sluice token create -r registry.example.com ci --repository 'team/*=content/read,content/write'
  sluice token create -r registry.example.com monitor --scope-map _repositories_pull --expires-in 90d`,
		Args: arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			actions, err := parseRights(given)
			if err != nil {
				return err
			}
			if (scopeMap == "") == (len(actions) == 0) {
				return errors.New("which rights? Add either --scope-map NAME, or --repository REPOSITORY=RIGHT[,RIGHT...]")
			}
			until, err := expiry.time()
			if err != nil {
				return err
			}
			client, err := f.client(cmd)
			if err != nil {
				return err
			}
			ctx := cmd.Context()
			if len(actions) > 0 {
				scopeMap = args[0] + "-scope-map"
				if err := ensureScopeMap(ctx, client, acr.ScopeMap{Name: scopeMap, Description: "rights of token " + args[0], Actions: actions}); err != nil {
					return err
				}
			}
			t, err := client.CreateToken(ctx, args[0], scopeMap, !disabled)
			if err != nil {
				return err
			}
			if !noPasswords {
				if t.Passwords, err = generate(ctx, client, t.Name, []string{"password1", "password2"}, until); err != nil {
					return fmt.Errorf("token %s was made, but not its passwords: %w", t.Name, err)
				}
			}
			return f.printToken(cmd.OutOrStdout(), t)
		},
	}
	f.add(cmd)
	expiry.add(cmd)
	flags := cmd.Flags()
	flags.StringVar(&scopeMap, "scope-map", "", "give it the rights of scope map `NAME`")
	flags.StringArrayVar(&given, "repository", nil, "give it these `RIGHTS`, REPOSITORY=RIGHT[,RIGHT...];\nmay be repeated")
	flags.BoolVar(&disabled, "disabled", false, "make it disabled")
	flags.BoolVar(&noPasswords, "no-passwords", false, "make it without passwords")
	completeRights(cmd, "repository")
	return noFiles(cmd)
}

// generate makes new passwords of a token.
func generate(ctx context.Context, client *acr.Client, token string, names []string, expiry time.Time) ([]acr.Password, error) {
	all := []acr.Password{}
	for _, name := range names {
		p, err := client.GeneratePassword(ctx, token, name, expiry)
		if err != nil {
			return all, err
		}
		all = append(all, p)
	}
	return all, nil
}

func newTokenListCommand() *cobra.Command {
	var f managementFlags
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the tokens",
		Args:  arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := f.client(cmd)
			if err != nil {
				return err
			}
			list, err := client.Tokens(cmd.Context())
			if err != nil {
				return err
			}
			return f.print(cmd.OutOrStdout(), list, func(w io.Writer) {
				fmt.Fprintln(w, "NAME\tSTATUS\tSCOPE MAP\tCREATED\tPASSWORD1\tPASSWORD2")
				for _, t := range list {
					passwords := map[string]string{}
					for _, p := range t.Passwords {
						passwords[p.Name] = expiryText(p)
					}
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", t.Name, statusText(t.Enabled), t.ScopeMap, when(t.Created), dash(passwords["password1"]), dash(passwords["password2"]))
				}
			})
		},
	}
	f.add(cmd)
	return noFiles(cmd)
}

// expiryText tells until when a password works.
func expiryText(p acr.Password) string {
	switch {
	case p.Expiry.IsZero():
		return "no expiry"
	case p.Expiry.Before(time.Now()):
		return "EXPIRED"
	}
	return "until " + when(p.Expiry)
}

func newTokenShowCommand() *cobra.Command {
	var f managementFlags
	cmd := &cobra.Command{
		Use:   "show NAME",
		Short: "Show a token",
		Args:  arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := f.client(cmd)
			if err != nil {
				return err
			}
			t, err := client.Token(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return f.printToken(cmd.OutOrStdout(), t)
		},
	}
	f.add(cmd)
	return noFiles(cmd)
}

func newTokenUpdateCommand() *cobra.Command {
	var f managementFlags
	var scopeMap, status string
	cmd := &cobra.Command{
		Use:   "update NAME",
		Short: "Enable or disable a token, or give it another scope map",
		Args:  arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var enabled *bool
			switch status {
			case "enabled", "disabled":
				on := status == "enabled"
				enabled = &on
			case "":
			default:
				return fmt.Errorf("--status %q: enabled or disabled", status)
			}
			var m *string
			if scopeMap != "" {
				m = &scopeMap
			}
			if m == nil && enabled == nil {
				return errors.New("nothing to change: give --status or --scope-map")
			}
			client, err := f.client(cmd)
			if err != nil {
				return err
			}
			t, err := client.UpdateToken(cmd.Context(), args[0], m, enabled)
			if err != nil {
				return err
			}
			return f.printToken(cmd.OutOrStdout(), t)
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&status, "status", "", "make it `STATUS`: enabled or disabled")
	cmd.Flags().StringVar(&scopeMap, "scope-map", "", "give it the rights of scope map `NAME`")
	complete(cmd, "status", "enabled", "disabled")
	return noFiles(cmd)
}

func newTokenDeleteCommand() *cobra.Command {
	var f managementFlags
	cmd := &cobra.Command{
		Use:   "delete NAME",
		Short: "Delete a token; its scope map stays",
		Args:  arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := f.client(cmd)
			if err != nil {
				return err
			}
			if err := f.confirm(cmd, "Delete token %s? Whoever uses it is locked out.", args[0]); err != nil {
				return err
			}
			if err := client.DeleteToken(cmd.Context(), args[0]); err != nil {
				return err
			}
			return f.printDeleted(cmd.OutOrStdout(), "token", args[0])
		},
	}
	f.add(cmd)
	f.addYes(cmd)
	return noFiles(cmd)
}

// passwordFlags say which passwords are meant.
type passwordFlags struct{ first, second bool }

func (f *passwordFlags) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.first, "password1", false, "the first password only")
	cmd.Flags().BoolVar(&f.second, "password2", false, "the second password only")
}

// names returns the passwords that are meant: both if neither is given.
func (f *passwordFlags) names() []string {
	switch {
	case f.first && !f.second:
		return []string{"password1"}
	case f.second && !f.first:
		return []string{"password2"}
	}
	return []string{"password1", "password2"}
}

func newTokenCredentialGenerateCommand() *cobra.Command {
	var f managementFlags
	var which passwordFlags
	var expiry expiryFlags
	cmd := &cobra.Command{
		Use:   "generate NAME",
		Short: "Replace a token's passwords, and show the new ones this once",
		Long: `Replace a token's passwords, and show the new ones this once.

The old ones stop working at once. To renew them without an interruption, replace
--password2, give it to all who use the token, and then replace --password1.`,
		Args: arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			until, err := expiry.time()
			if err != nil {
				return err
			}
			client, err := f.client(cmd)
			if err != nil {
				return err
			}
			t, err := client.Token(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			replaced := false
			for _, p := range t.Passwords {
				for _, name := range which.names() {
					replaced = replaced || p.Name == name
				}
			}
			if replaced {
				if err := f.confirm(cmd, "Replace %s of token %s? The old ones stop working at once.", strings.Join(which.names(), " and "), t.Name); err != nil {
					return err
				}
			}
			all, err := generate(cmd.Context(), client, t.Name, which.names(), until)
			if printed := f.print(cmd.OutOrStdout(), map[string]any{"username": t.Name, "passwords": all}, func(w io.Writer) {
				fmt.Fprintf(w, "username\t%s\n", t.Name)
				for _, p := range all {
					fmt.Fprintf(w, "%s\t%s\n", p.Name, passwordText(p))
				}
			}); err == nil {
				err = printed
			}
			return err
		},
	}
	f.add(cmd)
	f.addYes(cmd)
	which.add(cmd)
	expiry.add(cmd)
	return noFiles(cmd)
}

func newTokenCredentialDeleteCommand() *cobra.Command {
	var f managementFlags
	var which passwordFlags
	cmd := &cobra.Command{
		Use:   "delete NAME",
		Short: "Delete a token's passwords",
		Args:  arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := f.client(cmd)
			if err != nil {
				return err
			}
			names := strings.Join(which.names(), " and ")
			if err := f.confirm(cmd, "Delete %s of token %s? Whoever uses it is locked out.", names, args[0]); err != nil {
				return err
			}
			for _, name := range which.names() {
				if err := client.DeletePassword(cmd.Context(), args[0], name); err != nil {
					return err
				}
			}
			return f.printDeleted(cmd.OutOrStdout(), names+" of token", args[0])
		},
	}
	f.add(cmd)
	f.addYes(cmd)
	which.add(cmd)
	return noFiles(cmd)
}
