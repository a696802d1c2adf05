package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"sluice/internal/acr"
)

func newScopeMapCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "scope-map",
		Aliases: []string{"scope-maps"},
		Short:   "Manage scope maps: the rights of tokens",
		Long: `Manage scope maps: the rights of tokens.

A scope map lists what may be done to which repositories. Its rights are written
REPOSITORY=RIGHT[,RIGHT...] with the rights

  content/read     pull
  content/write    push
  content/delete   delete manifests, tags and repositories
  metadata/read    list tags and manifests, show attributes
  metadata/write   change attributes: locks

REPOSITORY is a name, "team/*" for all below team, or "*" for all. Only the admin
user manages scope maps.`,
		RunE: group,
	}
	cmd.AddCommand(newScopeMapCreateCommand(), newScopeMapListCommand(), newScopeMapShowCommand(), newScopeMapUpdateCommand(), newScopeMapDeleteCommand())
	return cmd
}

// rights returns the rights of content and metadata that there are.
func rights() []string {
	return []string{"content/read", "content/write", "content/delete", "metadata/read", "metadata/write"}
}

// parseRights turns REPOSITORY=RIGHT,… into a scope map's actions.
func parseRights(list []string) ([]string, error) {
	var actions []string
	for _, s := range list {
		repo, all, ok := strings.Cut(s, "=")
		if !ok || repo == "" {
			return nil, fmt.Errorf("rights %q: write REPOSITORY=RIGHT[,RIGHT...], such as team/app=content/read,metadata/read", s)
		}
		for right := range strings.SplitSeq(all, ",") {
			if !slices.Contains(rights(), right) {
				return nil, fmt.Errorf("rights %q: %q isn't one of %s", s, right, strings.Join(rights(), ", "))
			}
			if action := "repositories/" + repo + "/" + right; !slices.Contains(actions, action) {
				actions = append(actions, action)
			}
		}
	}
	return actions, nil
}

// completeRights has the shell complete a flag of rights.
func completeRights(cmd *cobra.Command, flag string) {
	err := cmd.RegisterFlagCompletionFunc(flag, func(_ *cobra.Command, _ []string, given string) ([]string, cobra.ShellCompDirective) {
		start := strings.LastIndexAny(given, "=,") + 1
		if start == 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
		}
		var all []string
		for _, r := range rights() {
			all = append(all, given[:start]+r)
		}
		return all, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
	})
	if err != nil {
		panic(err) // there is no such flag: a mistake of the program
	}
}

func (f *managementFlags) printScopeMap(w io.Writer, m acr.ScopeMap) error {
	return f.print(w, m, func(w io.Writer) {
		fmt.Fprintf(w, "scope map\t%s\n", m.Name)
		if m.Description != "" {
			fmt.Fprintf(w, "description\t%s\n", m.Description)
		}
		for i, r := range rightsText(m.Actions) {
			name := ""
			if i == 0 {
				name = "rights"
			}
			fmt.Fprintf(w, "%s\t%s\n", name, r)
		}
	})
}

// rightsText is the opposite of parseRights: a line for each repository.
func rightsText(actions []string) []string {
	var lines []string
	at := map[string]int{}
	for _, a := range actions {
		s := strings.Split(strings.TrimPrefix(a, "repositories/"), "/")
		cut := max(len(s)-2, 0)
		repo, right := strings.Join(s[:cut], "/"), strings.Join(s[cut:], "/")
		if i, ok := at[repo]; ok {
			lines[i] += "," + right
			continue
		}
		at[repo] = len(lines)
		lines = append(lines, repo+"="+right)
	}
	return lines
}

func newScopeMapCreateCommand() *cobra.Command {
	var f managementFlags
	var given []string
	var description string
	cmd := &cobra.Command{
		Use:     "create NAME",
		Short:   "Make a scope map",
		Example: `  sluice scope-map create -r registry.example.com ci --repository 'team/*=content/read,content/write'`,
		Args:    arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			actions, err := parseRights(given)
			if err != nil {
				return err
			}
			if len(actions) == 0 {
				return errors.New("which rights? Add --repository REPOSITORY=RIGHT[,RIGHT...]")
			}
			client, err := f.client(cmd)
			if err != nil {
				return err
			}
			m, err := client.CreateScopeMap(cmd.Context(), acr.ScopeMap{Name: args[0], Description: description, Actions: actions})
			if err != nil {
				return err
			}
			return f.printScopeMap(cmd.OutOrStdout(), m)
		},
	}
	f.add(cmd)
	cmd.Flags().StringArrayVar(&given, "repository", nil, "give the `RIGHTS`, REPOSITORY=RIGHT[,RIGHT...];\nmay be repeated")
	cmd.Flags().StringVar(&description, "description", "", "a `TEXT` for people")
	completeRights(cmd, "repository")
	return noFiles(cmd)
}

func newScopeMapListCommand() *cobra.Command {
	var f managementFlags
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the scope maps",
		Args:  arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := f.client(cmd)
			if err != nil {
				return err
			}
			list, err := client.ScopeMaps(cmd.Context())
			if err != nil {
				return err
			}
			return f.print(cmd.OutOrStdout(), list, func(w io.Writer) {
				fmt.Fprintln(w, "NAME\tRIGHTS\tDESCRIPTION")
				for _, m := range list {
					shown := rightsText(m.Actions)
					text := strings.Join(shown[:min(len(shown), 1)], "")
					if len(shown) > 1 {
						text += fmt.Sprintf(" and %d more", len(shown)-1)
					}
					description := m.Description
					if m.Builtin {
						description = "built in"
					}
					fmt.Fprintf(w, "%s\t%s\t%s\n", m.Name, dash(text), dash(description))
				}
			})
		},
	}
	f.add(cmd)
	return noFiles(cmd)
}

func newScopeMapShowCommand() *cobra.Command {
	var f managementFlags
	cmd := &cobra.Command{
		Use:   "show NAME",
		Short: "Show a scope map's rights",
		Args:  arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := f.client(cmd)
			if err != nil {
				return err
			}
			m, err := client.ScopeMap(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return f.printScopeMap(cmd.OutOrStdout(), m)
		},
	}
	f.add(cmd)
	return noFiles(cmd)
}

func newScopeMapUpdateCommand() *cobra.Command {
	var f managementFlags
	var add, remove []string
	var description string
	cmd := &cobra.Command{
		Use:   "update NAME",
		Short: "Add rights to a scope map, or take some away",
		Args:  arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			added, err := parseRights(add)
			if err != nil {
				return err
			}
			removed, err := parseRights(remove)
			if err != nil {
				return err
			}
			var text *string
			if cmd.Flags().Changed("description") {
				text = &description
			}
			if len(added)+len(removed) == 0 && text == nil {
				return errors.New("nothing to change: give --add-repository, --remove-repository or --description")
			}
			client, err := f.client(cmd)
			if err != nil {
				return err
			}
			m, err := client.ScopeMap(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			actions := slices.DeleteFunc(m.Actions, func(a string) bool { return slices.Contains(removed, a) })
			for _, a := range added {
				if !slices.Contains(actions, a) {
					actions = append(actions, a)
				}
			}
			if len(actions) == 0 {
				return fmt.Errorf("scope map %s would have no rights left: delete it, or disable the tokens that have it", args[0])
			}
			m, err = client.UpdateScopeMap(cmd.Context(), args[0], text, actions)
			if err != nil {
				return err
			}
			return f.printScopeMap(cmd.OutOrStdout(), m)
		},
	}
	f.add(cmd)
	cmd.Flags().StringArrayVar(&add, "add-repository", nil, "add `RIGHTS`, REPOSITORY=RIGHT[,RIGHT...]; may be\nrepeated")
	cmd.Flags().StringArrayVar(&remove, "remove-repository", nil, "take `RIGHTS` away, likewise")
	cmd.Flags().StringVar(&description, "description", "", "a `TEXT` for people")
	completeRights(cmd, "add-repository")
	completeRights(cmd, "remove-repository")
	return noFiles(cmd)
}

func newScopeMapDeleteCommand() *cobra.Command {
	var f managementFlags
	cmd := &cobra.Command{
		Use:   "delete NAME",
		Short: "Delete a scope map that no token has",
		Args:  arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := f.client(cmd)
			if err != nil {
				return err
			}
			if err := f.confirm(cmd, "Delete scope map %s?", args[0]); err != nil {
				return err
			}
			if err := client.DeleteScopeMap(cmd.Context(), args[0]); err != nil {
				return err
			}
			return f.printDeleted(cmd.OutOrStdout(), "scope map", args[0])
		},
	}
	f.add(cmd)
	f.addYes(cmd)
	return noFiles(cmd)
}

// printDeleted says that something was deleted.
func (f *managementFlags) printDeleted(w io.Writer, what, name string) error {
	return f.print(w, map[string]string{"deleted": name}, func(w io.Writer) { fmt.Fprintf(w, "deleted %s %s\n", what, name) })
}

// ensureScopeMap makes a scope map, or gives it these rights if it exists.
func ensureScopeMap(ctx context.Context, client *acr.Client, m acr.ScopeMap) error {
	_, err := client.CreateScopeMap(ctx, m)
	if errors.Is(err, acr.ErrConflict) {
		_, err = client.UpdateScopeMap(ctx, m.Name, nil, m.Actions)
	}
	return err
}
