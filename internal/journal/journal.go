// Package journal writes a program's log into systemd's journal, with the
// attributes of each line as fields of their own, so that `journalctl
// LAYER=sha256:…` finds what was said about a layer.
//
// A program that systemd starts has its standard error connected with the
// journal, and JOURNAL_STREAM in its environment says so; Connected is whether
// it's so. Such a program may speak the native protocol instead, as
// https://systemd.io/JOURNAL_NATIVE_PROTOCOL/ has it ("Automatic Protocol
// Upgrading").
//
// An attribute image=X of package log/slog becomes the field IMAGE, groups are
// part of the name (share.server is SHARE_SERVER). The message has all of them
// once more as text, since that is what journalctl shows.
package journal

import (
	"context"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/journal"
)

// The bounds of a line's parts, in bytes. Those of a name are journald's.
const (
	maxMessage = 32 << 10
	maxValue   = 8 << 10
	maxName    = 64
)

// Connected reports whether this process's standard error goes to the journal,
// and the journal can be reached by its own protocol.
func Connected() bool {
	stream, err := journal.StderrIsJournalStream()
	return err == nil && stream && Reachable()
}

// Reachable reports whether a journal on this machine takes lines.
func Reachable() bool { return journal.Enabled() }

// Handler is a slog.Handler that writes into the journal. Use New. What the
// journal doesn't take is an error of Handle; a journal that is slow is waited
// for, as with standard error.
type Handler struct {
	identifier string
	level      slog.Leveler
	attrs      []attribute // of WithAttrs
	group      string      // of WithGroup: "", or names that end with dots
}

// attribute is one by its whole name.
type attribute struct{ name, value string }

// New returns a handler of lines from a level on. `journalctl -t IDENTIFIER`
// shows them.
func New(identifier string, level slog.Leveler) *Handler {
	return &Handler{identifier: identifier, level: level}
}

// Enabled implements slog.Handler.
func (h *Handler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level.Level() }

// WithAttrs implements slog.Handler.
func (h *Handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	with := *h
	with.attrs = slices.Clip(h.attrs)
	for _, a := range attrs {
		with.attrs = flatten(with.attrs, h.group, a)
	}
	return &with
}

// WithGroup implements slog.Handler.
func (h *Handler) WithGroup(name string) slog.Handler {
	with := *h
	if name != "" {
		with.group += name + "."
	}
	return &with
}

// Handle implements slog.Handler. The journal has the time from itself.
func (h *Handler) Handle(_ context.Context, r slog.Record) error {
	attrs := slices.Clip(h.attrs)
	r.Attrs(func(a slog.Attr) bool {
		attrs = flatten(attrs, h.group, a)
		return true
	})
	message := []byte(r.Message)
	fields := make(map[string]string, len(attrs)+1)
	for _, a := range attrs {
		message = append(append(append(message, ' '), a.name...), '=')
		if plain(a.value) {
			message = append(message, a.value...)
		} else {
			message = strconv.AppendQuote(message, a.value)
		}
		if name := fieldName(a.name); name != "" {
			fields[name] = a.value
		}
	}
	fields["SYSLOG_IDENTIFIER"] = h.identifier
	return journal.Send(strings.ToValidUTF8(string(message[:min(len(message), maxMessage)]), "�"), priority(r.Level), fields)
}

// flatten appends an attribute, or those of a group, by whole names.
func flatten(to []attribute, group string, a slog.Attr) []attribute {
	v := a.Value.Resolve()
	switch {
	case a.Equal(slog.Attr{}):
		return to
	case v.Kind() == slog.KindGroup:
		if a.Key != "" {
			group += a.Key + "."
		}
		for _, member := range v.Group() {
			to = flatten(to, group, member)
		}
		return to
	case v.Kind() == slog.KindTime:
		return append(to, attribute{group + a.Key, v.Time().Format(time.RFC3339Nano)})
	}
	text := v.String()
	return append(to, attribute{group + a.Key, strings.ToValidUTF8(text[:min(len(text), maxValue)], "�")})
}

// plain reports whether a value needs no quotes in a message.
func plain(value string) bool {
	return value != "" && !strings.ContainsFunc(value, func(r rune) bool { return r <= ' ' || r == '"' || r == '=' || !strconv.IsPrint(r) })
}

// fieldName is an attribute's name as the journal has it: capitals, digits and
// underscores, none of them at the beginning but a capital. It's "" for one of
// which nothing is left, and for those that the journal gives a meaning.
func fieldName(attribute string) string {
	name := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		case r >= 'A' && r <= 'Z' || r >= '0' && r <= '9':
			return r
		}
		return '_'
	}, attribute)
	name = strings.TrimLeft(name, "_0123456789")
	name = name[:min(len(name), maxName)]
	switch name {
	case "MESSAGE", "MESSAGE_ID", "PRIORITY", "ERRNO", "SYSLOG_IDENTIFIER", "SYSLOG_PID":
		return ""
	}
	return name
}

// priority is what syslog calls a level.
func priority(l slog.Level) journal.Priority {
	switch {
	case l >= slog.LevelError:
		return journal.PriErr
	case l >= slog.LevelWarn:
		return journal.PriWarning
	case l >= slog.LevelInfo:
		return journal.PriInfo
	}
	return journal.PriDebug
}
