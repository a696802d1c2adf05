package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"

	"sluice/internal/acr"
	"sluice/internal/remote"
	"sluice/oci"
)

// managementFlags are those of every verb that manages a registry.
type managementFlags struct {
	registry, username string
	passwordStdin      bool
	plainHTTP          bool
	output             string
	yes                bool

	patience  time.Duration     // how long an answer may take; 0: as usual
	transport http.RoundTripper // nil: as usual
}

func (f *managementFlags) add(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVarP(&f.registry, "registry", "r", "", "the registry, `HOST[:PORT]`")
	flags.StringVarP(&f.username, "username", "u", "", "`NAME` at the registry (default docker's, \"docker login\")")
	flags.BoolVar(&f.passwordStdin, "password-stdin", false, "read the password from standard input")
	flags.BoolVar(&f.plainHTTP, "plain-http", false, "speak HTTP without TLS with any registry")
	registerOutput(cmd, &f.output)
	cmd.MarkFlagsRequiredTogether("username", "password-stdin")
}

// addYes is for a verb that destroys something.
func (f *managementFlags) addYes(cmd *cobra.Command) {
	cmd.Flags().BoolVarP(&f.yes, "yes", "y", false, "don't ask whether to do it")
}

// complete has the shell complete a flag's values.
func complete(cmd *cobra.Command, flag string, values ...string) {
	err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
	if err != nil {
		panic(err) // there is no such flag: a mistake of the program
	}
}

// noFiles has the shell complete no file names as arguments.
func noFiles(cmd *cobra.Command) *cobra.Command {
	cmd.ValidArgsFunction = cobra.NoFileCompletions
	return cmd
}

// client returns a client of the registry at --registry.
func (f *managementFlags) client(cmd *cobra.Command) (*acr.Client, error) {
	if f.registry == "" {
		return nil, errors.New("which registry? Add --registry HOST[:PORT]")
	}
	return f.clientOf(cmd, strings.TrimSuffix(f.registry, "/"))
}

func (f *managementFlags) clientOf(cmd *cobra.Command, host string) (*acr.Client, error) {
	opts, err := f.connection(cmd)
	if err != nil {
		return nil, err
	}
	return acr.NewClient(host, opts)
}

// connection returns how to speak with the registry. It is to be called once:
// it reads the password.
func (f *managementFlags) connection(cmd *cobra.Command) (remote.Options, error) {
	opts := remote.Options{WriteTimeout: f.patience, Transport: f.transport}
	if f.output != "table" && f.output != "json" {
		return opts, fmt.Errorf("--output %q: table or json", f.output)
	}
	if f.plainHTTP {
		opts.PlainHTTP = remote.PlainHTTPAlways
	}
	if f.passwordStdin {
		line, err := bufio.NewReader(io.LimitReader(cmd.InOrStdin(), maxPassword)).ReadString('\n')
		password := strings.TrimRight(line, "\r\n")
		if err != nil && !errors.Is(err, io.EOF) || password == "" {
			return opts, errors.New("--password-stdin: there is no password on standard input")
		}
		opts.Credentials = func(context.Context, string) (remote.Credential, error) {
			return remote.Credential{Username: f.username, Password: password}, nil
		}
	}
	return opts, nil
}

// at returns a client of the registry that --registry or the name's beginning
// says, and the rest of the name.
func (f *managementFlags) at(cmd *cobra.Command, name string) (*acr.Client, string, error) {
	host := strings.TrimSuffix(f.registry, "/")
	if host == "" {
		first, rest, found := strings.Cut(name, "/")
		if !found || !strings.ContainsAny(first, ".:") && first != "localhost" {
			return nil, "", fmt.Errorf("%s names no registry: write HOST[:PORT]/%s, or add --registry HOST[:PORT]", name, name)
		}
		host, name = first, rest
	}
	client, err := f.clientOf(cmd, host)
	return client, strings.TrimPrefix(name, host+"/"), err
}

// repository is at for the name of a repository.
func (f *managementFlags) repository(cmd *cobra.Command, name string) (*acr.Client, string, error) {
	client, repo, err := f.at(cmd, name)
	if err == nil && strings.ContainsAny(repo, ":@") {
		err = fmt.Errorf("%s: a repository has no tag and no digest; leave them away", name)
	}
	if err == nil {
		err = oci.CheckRepository(repo)
	}
	return client, repo, err
}

// image is at for the name of an image, with a tag or digest.
func (f *managementFlags) image(cmd *cobra.Command, name string) (*acr.Client, oci.Reference, error) {
	client, rest, err := f.at(cmd, name)
	if err != nil {
		return nil, oci.Reference{}, err
	}
	if !strings.ContainsAny(rest, ":@") {
		return nil, oci.Reference{}, fmt.Errorf("%s: which one? Write %s:TAG or %s@DIGEST", name, name, name)
	}
	ref, err := oci.ParseReference("registry.invalid/" + rest)
	return client, ref, err
}

// digest returns the digest of an image, which its tag may name.
func digest(ctx context.Context, client *acr.Client, ref oci.Reference) (oci.Digest, error) {
	if ref.Digest != "" {
		return ref.Digest, nil
	}
	t, err := client.Tag(ctx, ref.Repository, ref.Tag)
	return t.Digest, err
}

// confirm asks whether to do what the question says. Where nobody can be
// asked, --yes is needed.
func (f *managementFlags) confirm(cmd *cobra.Command, format string, args ...any) error {
	if f.yes {
		return nil
	}
	in, ok := cmd.InOrStdin().(*os.File)
	if !ok || f.passwordStdin || !isatty.IsTerminal(in.Fd()) {
		return errors.New("nothing was done: there is no terminal to ask at whether it is meant; if it is, add --yes")
	}
	fmt.Fprintf(cmd.ErrOrStderr(), format+" [y/N] ", args...)
	answer, err := bufio.NewReader(in).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	switch strings.ToLower(strings.TrimSpace(answer)) {
	case "y", "yes":
		return nil
	}
	return errors.New("nothing was done")
}

// print prints doc as JSON, or what table writes.
func (f *managementFlags) print(w io.Writer, doc any, table func(w io.Writer)) error {
	if f.output == "json" {
		return printJSON(w, doc)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	table(t)
	return t.Flush()
}

// when returns a time as people read it.
func when(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.Local().Format("2006-01-02 15:04")
}

// dash returns s, or a dash in a table's empty field.
func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// listFlags are those of verbs that list something that can be ordered.
type listFlags struct {
	orderBy string
	top     int
}

func (f *listFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.orderBy, "orderby", "name", "`ORDER`: name, or by the last update time-asc or\ntime-desc")
	cmd.Flags().IntVar(&f.top, "top", 0, "list at most `N` (default all)")
	complete(cmd, "orderby", "name", "time-asc", "time-desc")
}

func (f *listFlags) options() (acr.ListOptions, error) {
	opts := acr.ListOptions{Top: f.top}
	if f.top < 0 {
		return opts, fmt.Errorf("--top %d: how many?", f.top)
	}
	switch f.orderBy {
	case "name":
	case "time-asc", "time-desc", "time_asc", "time_desc": // the last two are Azure's
		opts.OrderBy = "time" + f.orderBy[len("time-"):]
	default:
		return opts, fmt.Errorf("--orderby %q: name, time-asc or time-desc", f.orderBy)
	}
	return opts, nil
}

// attributeFlags are the attributes that a verb sets; those that aren't given
// stay as they are.
type attributeFlags struct{ changes acr.AttributeChanges }

func (f *attributeFlags) add(cmd *cobra.Command, repository bool) {
	flag := func(to **bool, name, usage string) {
		cmd.Flags().Var(&optionalBool{to}, name, usage+", `true|false`")
		complete(cmd, name, "true", "false")
	}
	c := &f.changes
	flag(&c.WriteEnabled, "write-enabled", "whether it can be pushed to or overwritten")
	flag(&c.DeleteEnabled, "delete-enabled", "whether it can be deleted")
	flag(&c.ReadEnabled, "read-enabled", "whether it can be pulled")
	flag(&c.ListEnabled, "list-enabled", "whether lists show it")
	if repository {
		flag(&c.StreamingEnabled, "streaming-enabled", "whether pushed images are converted")
		flag(&c.TeleportEnabled, "teleport-enabled", "whether layers of pushed images are expanded for Teleport")
		flag(&c.AnonymousPullEnabled, "anonymous-pull-enabled", "whether everybody can pull")
	}
}

// given returns the changes, or an error if there are none.
func (f *attributeFlags) given() (acr.AttributeChanges, error) {
	if f.changes == (acr.AttributeChanges{}) {
		return f.changes, errors.New("nothing to change: give an attribute, such as --write-enabled false")
	}
	return f.changes, nil
}

// optionalBool is a flag that is true, false or not given. It takes its value
// as the next argument, so that "--write-enabled false" means what it says.
type optionalBool struct{ to **bool }

func (b *optionalBool) String() string {
	if b.to == nil || *b.to == nil {
		return ""
	}
	return strconv.FormatBool(**b.to)
}

func (b *optionalBool) Set(s string) error {
	switch s {
	case "true", "false":
		on := s == "true"
		*b.to = &on
		return nil
	}
	return errors.New("write true or false")
}

func (b *optionalBool) Type() string { return "bool" }

// lockText tells in a table what is locked.
func lockText(a acr.Attributes) string {
	var off []string
	for _, l := range []struct {
		on   bool
		what string
	}{{a.WriteEnabled, "write"}, {a.DeleteEnabled, "delete"}, {a.ReadEnabled, "read"}, {a.ListEnabled, "list"}} {
		if !l.on {
			off = append(off, l.what)
		}
	}
	return dash(strings.Join(off, ","))
}

// yesNo tells a switch.
func yesNo(on bool) string {
	if on {
		return "yes"
	}
	return "no"
}
