package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"sluice/internal/acr"
	"sluice/internal/remote"
	"sluice/internal/teleport/mountapi"
	"sluice/oci"
)

func newTeleportCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "teleport",
		Short: "Manage what a registry does for Project Teleport",
		Long: `Manage what a registry does for Project Teleport, whose clients mount the expanded
layers of images from a file server. The verbs are the original's scripts, and print
what those did.`,
		RunE: group,
	}
	cmd.AddCommand(newCheckExpansionCommand(), newEditAttributeCommand(), newFindRepositoriesCommand())
	return cmd
}

// checkInterval is how often check-expansion asks, as in the original.
const checkInterval = 2 * time.Second

// expansionState is what check-expansion prints as JSON.
type expansionState struct {
	Image  string          `json:"image"`
	Status int             `json:"status"` // of HTTP
	State  string          `json:"state"`  // ready, expanding, notEnabled, unknown
	Reason string          `json:"reason,omitempty"`
	Mount  *mountapi.Mount `json:"mount,omitempty"` // without the password
}

func newCheckExpansionCommand() *cobra.Command {
	var f managementFlags
	var platform string
	var noWait bool
	cmd := &cobra.Command{
		Use:   "check-expansion IMAGE",
		Short: "Wait until the layers of an image can be mounted",
		Long: `Wait until the layers of an image can be mounted, and say so every two seconds. An
image that nobody has expanded is expanded for whoever asks. The exit code is 0 if
all layers can be mounted.`,
		Example: `  sluice teleport check-expansion registry.example.com/team/app:v1
  sluice teleport check-expansion -r 127.0.0.1:5000 team/app:v1 --no-wait -o json`,
		Args: arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			reg, ref, err := f.imageOf(cmd, args[0])
			if err != nil {
				return err
			}
			c := &expansionCheck{f: &f, reg: reg, ref: ref, platform: platform, out: cmd.OutOrStdout()}
			return c.run(cmd.Context(), noWait)
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&platform, "platform", "", "of an index, the image for a `PLATFORM` (default linux/amd64)")
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "ask once")
	return noFiles(cmd)
}

// imageOf is image for who needs the registry itself.
func (f *managementFlags) imageOf(cmd *cobra.Command, name string) (*remote.Registry, oci.Reference, error) {
	client, ref, err := f.image(cmd, name)
	if err != nil {
		return nil, ref, err
	}
	return client.Registry(), ref, nil
}

// expansionCheck is one run of check-expansion.
type expansionCheck struct {
	f        *managementFlags
	reg      *remote.Registry
	ref      oci.Reference
	platform string
	out      io.Writer
}

func (c *expansionCheck) reference() string {
	if c.ref.Digest != "" {
		return c.ref.Digest.String()
	}
	return c.ref.Tag
}

func (c *expansionCheck) say(format string, args ...any) {
	if c.f.output != "json" {
		fmt.Fprintf(c.out, format+"\n", args...)
	}
}

func (c *expansionCheck) run(ctx context.Context, once bool) error {
	c.say("Checking %s%s%s/_manifests/%s", c.reg.URL(), mountapi.Prefix, c.ref.Repository, c.reference())
	for {
		state, err := c.ask(ctx)
		if state.Status == 0 {
			return err // it isn't known
		}
		c.say("Status: %d", state.Status)
		switch state.State {
		case "ready":
			c.say("Teleport: layers ready")
		case "expanding":
			c.say("Teleport: expanding layers")
		case "notEnabled":
			c.say("Teleport: %s-%s:%s not enabled", c.reg.Host(), c.ref.Repository, c.reference())
		default:
			c.say("Unknown status %d", state.Status)
		}
		if state.State != "expanding" || once {
			if c.f.output == "json" {
				err = errors.Join(printJSON(c.out, state), err)
			}
			return err
		}
		select {
		case <-time.After(checkInterval):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// ask asks once. The state has no status if the registry gave none of its own.
func (c *expansionCheck) ask(ctx context.Context) (expansionState, error) {
	state := expansionState{Image: c.reg.Host() + "/" + c.ref.Repository + ":" + c.reference()}
	if c.ref.Digest != "" {
		state.Image = c.reg.Host() + "/" + c.ref.Repository + "@" + c.reference()
	}
	m, err := mountapi.Get(ctx, c.reg, mountapi.Query{Repository: c.ref.Repository, Reference: c.reference(), Platform: c.platform})
	if err == nil {
		state.Status, state.State, state.Mount = http.StatusOK, "ready", &m
		if m.SMB != nil {
			m.SMB.Password = ""
		}
		return state, nil
	}
	var coded *oci.Error
	if !errors.As(err, &coded) {
		return state, err
	}
	state.Reason = coded.Message
	switch coded.Code {
	case mountapi.CodeExpanding:
		state.Status, state.State = http.StatusConflict, "expanding"
	case mountapi.CodeNotEnabled, mountapi.CodeNotExpanded, "NOT_FOUND":
		state.Status, state.State = http.StatusNotFound, "notEnabled"
	case mountapi.CodeFailed:
		state.Status, state.State = http.StatusUnprocessableEntity, "unknown"
	}
	return state, err
}

func newEditAttributeCommand() *cobra.Command {
	var f managementFlags
	cmd := &cobra.Command{
		Use:   "edit-attribute REPOSITORY enable|disable",
		Short: "Have the layers of what is pushed to a repository expanded, or no longer",
		Example: `  sluice teleport edit-attribute registry.example.com/team/app enable
  sluice teleport edit-attribute -r 127.0.0.1:5000 team/app disable`,
		Args: arguments(2, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			enable := args[1] == "enable"
			if !enable && args[1] != "disable" {
				return fmt.Errorf("%q: write enable or disable", args[1])
			}
			client, repo, err := f.repository(cmd, args[0])
			if err != nil {
				return err
			}
			if f.output != "json" {
				fmt.Fprintf(cmd.OutOrStdout(), "Sending Patch Request for %s\n", repo)
			}
			r, err := client.UpdateRepository(cmd.Context(), repo, acr.AttributeChanges{TeleportEnabled: &enable})
			if err != nil {
				return err
			}
			if f.output == "json" {
				return printJSON(cmd.OutOrStdout(), r)
			}
			result, err := json.Marshal(r)
			if err == nil {
				fmt.Fprintf(cmd.OutOrStdout(), "  RESULT: %s\n", result)
			}
			return err
		},
	}
	f.add(cmd)
	return noFiles(cmd)
}

// teleportRepository is an element of what find-repositories prints as JSON.
type teleportRepository struct {
	Name    string `json:"name"`
	Enabled bool   `json:"teleportEnabled"`
}

func newFindRepositoriesCommand() *cobra.Command {
	var f managementFlags
	cmd := &cobra.Command{
		Use:     "find-repositories",
		Short:   "List the repositories, and whether their layers are expanded",
		Example: `  sluice teleport find-repositories -r registry.example.com`,
		Args:    arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := f.client(cmd)
			if err != nil {
				return err
			}
			names, err := client.Repositories(cmd.Context(), acr.ListOptions{})
			if err != nil {
				return err
			}
			all := make([]teleportRepository, 0, len(names))
			for _, name := range names {
				r, err := client.Repository(cmd.Context(), name)
				if errors.Is(err, oci.ErrNameUnknown) {
					continue // deleted meanwhile
				}
				if err != nil {
					return err
				}
				all = append(all, teleportRepository{name, r.Attributes.TeleportEnabled})
			}
			if f.output == "json" {
				return printJSON(cmd.OutOrStdout(), all)
			}
			printTeleportRepositories(cmd.OutOrStdout(), all)
			return nil
		},
	}
	f.add(cmd)
	return noFiles(cmd)
}

func printTeleportRepositories(w io.Writer, all []teleportRepository) {
	for _, r := range all {
		state := "Disabled"
		if r.Enabled {
			state = "Enabled"
		}
		fmt.Fprintf(w, "%s -> %s\n", r.Name, state)
	}
	fmt.Fprint(w, "\nSummary:\nEnabled Repositories:\n\n")
	for _, r := range slices.DeleteFunc(all, func(r teleportRepository) bool { return !r.Enabled }) {
		fmt.Fprintln(w, r.Name)
	}
}
