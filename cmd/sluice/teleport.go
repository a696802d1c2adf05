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
layers of images from a file server. check-expansion, edit-attribute and
find-repositories are the original's scripts, and print what those did.`,
		RunE: group,
	}
	cmd.AddCommand(
		newCheckExpansionCommand(), newEditAttributeCommand(), newFindRepositoriesCommand(), newExpandCommand(),
		operationVerbs{"teleport", "expansion", acr.ExpansionName, (*acr.Client).LatestExpansion}.command(),
	)
	return cmd
}

// watchedTransport remembers the status of the last answer, and tells of each request
// if it is to.
type watchedTransport struct {
	http.RoundTripper
	cmd   *cobra.Command // whose standard error it tells
	debug bool

	last int
}

// watch has a verb's requests watched, and adds the flag --debug.
func (f *managementFlags) watch(cmd *cobra.Command) *watchedTransport {
	w := &watchedTransport{RoundTripper: remote.NewTransport(), cmd: cmd}
	cmd.Flags().BoolVar(&w.debug, "debug", false, "tell of each request on standard error")
	f.transport = w
	return w
}

// RoundTrip implements http.RoundTripper. Nothing that is secret is shown: no body,
// and of the answer's headers those that say what to do next.
func (t *watchedTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	start := time.Now()
	resp, err := t.RoundTripper.RoundTrip(r)
	took := time.Since(start).Round(time.Millisecond)
	if err != nil {
		if t.debug {
			fmt.Fprintf(t.cmd.ErrOrStderr(), "%s %s: %v, after %v\n", r.Method, r.URL, err, took)
		}
		return resp, err
	}
	t.last = resp.StatusCode
	if !t.debug {
		return resp, nil
	}
	fmt.Fprintf(t.cmd.ErrOrStderr(), "%s %s: %s in %v\n", r.Method, r.URL, resp.Status, took)
	for _, name := range []string{"Www-Authenticate", "Retry-After", "Location"} {
		for _, value := range resp.Header.Values(name) {
			fmt.Fprintf(t.cmd.ErrOrStderr(), "  %s: %s\n", name, value)
		}
	}
	return resp, nil
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
	var seen *watchedTransport
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
			c := &expansionCheck{f: &f, reg: reg, seen: seen, ref: ref, platform: platform, out: cmd.OutOrStdout()}
			return c.run(cmd.Context(), noWait)
		},
	}
	f.add(cmd)
	seen = f.watch(cmd)
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
	seen     *watchedTransport
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
		c.seen.last = 0
		state, err := c.ask(ctx)
		if state.Status == 0 {
			return err // nobody answered
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

// ask asks once. The state has no status if there was no answer.
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
	state.Status, state.State, state.Reason = c.seen.last, "unknown", err.Error()
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
	f.watch(cmd)
	return noFiles(cmd)
}

func newExpandCommand() *cobra.Command {
	var f streamingFlags
	cmd := &cobra.Command{
		Use:   "expand IMAGE",
		Short: "Have the layers of an image expanded, also after that has failed or was canceled",
		Long: `Have the layers of an image expanded, also after that has failed or was canceled,
and print the operation that does it. Images are expanded by themselves when they
are pushed, and those that were there before when somebody wants to mount them.`,
		Example: `  sluice teleport expand registry.example.com/team/app:v1`,
		Args:    arguments(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, ref, err := f.image(cmd, args)
			if err != nil {
				return err
			}
			subject, err := p.digest(cmd.Context(), ref)
			if err != nil {
				return withCode(err)
			}
			op, err := p.manage.StartExpansion(cmd.Context(), ref.Repository, subject)
			if err != nil {
				return withCode(err)
			}
			return f.print(cmd.OutOrStdout(), op, func(w io.Writer) { printOperation(w, op) })
		},
	}
	f.addImage(cmd)
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
