package notify

import (
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Endpoint is where events are delivered to.
type Endpoint struct {
	// Name tells it from others, in logs and in the index: events that wait for
	// it are lost to it when it gets another. Lower-case letters, digits and
	// hyphens, at most 64.
	Name string

	// URL gets the POST requests. Redirects are not followed.
	URL string

	// Secret signs them: see the package's documentation. Empty: no signature.
	Secret string

	// Headers are sent along, such as Authorization.
	Headers map[string]string

	// Actions and Repositories choose the events: those whose action is one of
	// the first and whose repository matches one of the second, where a
	// trailing "*" stands for any rest. Empty: all of them.
	Actions      []string
	Repositories []string

	// Timeout bounds one delivery, the answer included. 0 means 10 seconds.
	Timeout time.Duration

	// Concurrency bounds the deliveries at the same time by one replica.
	// 0 means 4.
	Concurrency int
}

const (
	defaultTimeout     = 10 * time.Second
	defaultConcurrency = 4
)

// LogValue keeps secrets out of logs: the URL may hold some, too.
func (e Endpoint) LogValue() slog.Value { return slog.StringValue(e.Name) }

// String keeps them out of everything else.
func (e Endpoint) String() string { return e.Name }

var endpointName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,63}$`)

// check returns e with its defaults, or what is wrong with it.
func (e Endpoint) check() (Endpoint, error) {
	if !endpointName.MatchString(e.Name) {
		return e, fmt.Errorf("endpoint %q: a name consists of lower-case letters, digits and hyphens, at most 64", e.Name)
	}
	u, err := url.Parse(e.URL)
	if err != nil {
		return e, fmt.Errorf("endpoint %s: its URL can't be parsed", e.Name) // the error would quote it
	}
	if u.Scheme != "https" && u.Scheme != "http" || u.Host == "" {
		return e, fmt.Errorf("endpoint %s: its URL must begin with https:// or http://, and a host", e.Name)
	}
	for _, p := range e.Repositories {
		if i := strings.IndexByte(p, '*'); p == "" || i >= 0 && i < len(p)-1 {
			return e, fmt.Errorf("endpoint %s: %q is no pattern of repositories: a star may only be its end", e.Name, p)
		}
	}
	if e.Timeout < 0 || e.Concurrency < 0 {
		return e, errors.New("endpoint " + e.Name + ": a time-out or concurrency below 0")
	}
	if e.Timeout == 0 {
		e.Timeout = defaultTimeout
	}
	if e.Concurrency == 0 {
		e.Concurrency = defaultConcurrency
	}
	return e, nil
}

// wants reports whether the endpoint chose the event.
func (e Endpoint) wants(v Event) bool {
	if len(e.Actions) > 0 && !slices.Contains(e.Actions, v.Action) {
		return false
	}
	return len(e.Repositories) == 0 || slices.ContainsFunc(e.Repositories, func(p string) bool {
		prefix, any := strings.CutSuffix(p, "*")
		return p == v.Repository || any && strings.HasPrefix(v.Repository, prefix)
	})
}

// queue is the endpoint's own.
func (e Endpoint) queue() string { return Queue + "/" + e.Name }
