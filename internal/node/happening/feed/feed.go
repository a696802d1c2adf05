// Package feed is a happening.Log over HTTP: Handler is a daemon's end, Follow a
// reader's.
//
//	GET /v1/events?after=CURSOR&follow=BOOL  -> Line, one a line
//
// Events come as they are in the Log, after one that was seen; while they are
// followed, an empty line says every 15 seconds that the daemon lives. An answer
// other than 200 has a JSON object with "message" as its body.
package feed

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"sluice/internal/node/happening"
)

const (
	// heartbeat is how often a stream of events has a line at least.
	heartbeat = 15 * time.Second
	// silence is after how long without a line a follower gives up.
	silence = 3 * heartbeat
	// maxLine bounds a line, in bytes: an Event has at most some 8,000.
	maxLine = 64 << 10
)

// Line is one line of the answer.
type Line struct {
	// Lost, if not 0, is how many events the reader has missed, and there's no
	// Event.
	Lost uint64 `json:"lost,omitempty"`
	happening.Event
}

// Handler answers with the events of a Log; nil: with that there are none.
func Handler(events *happening.Log, log *slog.Logger) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if events == nil {
			refuse(w, http.StatusNotImplemented, "this daemon serves no containers of containerd, and tells of no events")
			return
		}
		after, err := happening.ParseCursor(r.URL.Query().Get("after"))
		follow := false
		if v := r.URL.Query().Get("follow"); v != "" && err == nil {
			if follow, err = strconv.ParseBool(v); err != nil {
				err = fmt.Errorf("follow=%.20q: it's true or false", v)
			}
		}
		if err != nil {
			refuse(w, http.StatusBadRequest, err.Error())
			return
		}
		w.Header().Set("Content-Type", "application/x-ndjson")
		if err := write(r.Context(), w, events, after, follow); err != nil {
			log.Debug("a reader of events went away", "error", err)
		}
	})
}

// refuse answers with an error. Who has gone doesn't get it.
func refuse(w http.ResponseWriter, code int, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(map[string]string{"message": message})
}

// write writes the events after a cursor, and with follow those to come,
// until ctx or the log ends.
func write(ctx context.Context, w http.ResponseWriter, log *happening.Log, after happening.Cursor, follow bool) error {
	control, e := http.NewResponseController(w), json.NewEncoder(w)
	for {
		if follow { // at first, so that who follows knows that it does
			if err := control.Flush(); err != nil {
				return err
			}
		}
		var events []happening.Event
		var lost uint64
		var err error
		if follow {
			wait, stop := context.WithTimeout(ctx, heartbeat)
			events, lost, err = log.Follow(wait, after)
			stop()
		} else {
			events, lost = log.After(after)
		}
		switch {
		case errors.Is(err, happening.ErrClosed):
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil: // nothing happened for a while
			if _, err := io.WriteString(w, "\n"); err != nil {
				return err
			}
		}
		if lost > 0 {
			if err := e.Encode(map[string]uint64{"lost": lost}); err != nil {
				return err
			}
		}
		for _, event := range events {
			if err := e.Encode(event); err != nil {
				return err
			}
			after = event.Cursor()
		}
		if !follow {
			return nil
		}
	}
}

// Follow calls fn for each event after a cursor (see happening.Cursor; "" is
// before the oldest), and with follow for those to come, until ctx, the daemon or
// the connection ends, or fn fails. Events of kinds that this program doesn't
// know are passed on. It's nil only without follow: a daemon that ends is
// io.ErrUnexpectedEOF, as a cut connection is, and one that falls silent another
// error. get makes the request to a daemon, and returns its answer if that is a
// good one.
func Follow(ctx context.Context, get func(ctx context.Context, path string) (*http.Response, error), after string, follow bool, fn func(Line) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silent := time.AfterFunc(silence, func() { cancel(fmt.Errorf("node daemon: nothing came for %v", silence)) })
	defer silent.Stop()
	query := url.Values{"after": {after}, "follow": {strconv.FormatBool(follow)}}
	resp, err := get(ctx, "/v1/events?"+query.Encode())
	if err != nil {
		return because(ctx, err)
	}
	defer resp.Body.Close()
	lines := bufio.NewReaderSize(resp.Body, maxLine)
	for {
		silent.Reset(silence)
		line, err := lines.ReadSlice('\n')
		silent.Stop() // fn may take its time
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			return fmt.Errorf("node daemon's events: a line has more than %d bytes", maxLine)
		case err == io.EOF && len(line) == 0 && !follow:
			return nil
		case err == io.EOF:
			return io.ErrUnexpectedEOF
		case err != nil:
			return because(ctx, fmt.Errorf("node daemon's events: %w", err))
		}
		if len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		var h Line
		if err := json.Unmarshal(line, &h); err != nil {
			return fmt.Errorf("node daemon's events: %w: %.200q", err, line)
		}
		if h.Lost == 0 && (h.Seq == 0 || h.Kind == "") {
			return fmt.Errorf("node daemon's events: what isn't one: %.200q", line)
		}
		if h.Lost > 0 {
			h.Event = happening.Event{}
		} else if _, err := happening.ParseCursor(h.Cursor().String()); err != nil {
			return fmt.Errorf("node daemon's events: %w", err)
		}
		if err := fn(h); err != nil {
			return err
		}
	}
}

// because returns why ctx ended if it has, and err otherwise.
func because(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}
