package main

import (
	"context"
	"io"
	"log/slog"
	"sync"
	"time"

	"sluice/internal/config"
)

const (
	// logDelay is how late a line of the log may be written.
	logDelay = 200 * time.Millisecond

	// logBuffer is how many bytes may wait.
	logBuffer = 64 << 10
)

// openLog returns the log that the configuration asks for, and what writes the
// rest of it. Lines of requests are written some at a time, since thousands of
// them come in a second; warnings and errors at once, with all before them.
func openLog(c config.Log, w io.Writer) (log *slog.Logger, flush func()) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Level)); err != nil {
		level = slog.LevelInfo // checked by the configuration
	}
	opts := &slog.HandlerOptions{Level: level}
	lines := &lineWriter{w: w}
	var handler slog.Handler = slog.NewTextHandler(lines, opts)
	if c.Format == "json" {
		handler = slog.NewJSONHandler(lines, opts)
	}
	return slog.New(&urgentHandler{handler, lines}), lines.flush
}

// lineWriter writes lines together that come within logDelay. What can't be
// written is lost, as with any log.
type lineWriter struct {
	w io.Writer

	mu    sync.Mutex
	lines []byte
	timer *time.Timer // armed when there are lines
}

func (l *lineWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, p...)
	switch {
	case len(l.lines) >= logBuffer:
		l.write()
	case l.timer == nil:
		l.timer = time.AfterFunc(logDelay, l.flush)
	}
	return len(p), nil
}

func (l *lineWriter) flush() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.write()
}

// write writes what there is. The caller holds mu.
func (l *lineWriter) write() {
	if l.timer != nil {
		l.timer.Stop()
		l.timer = nil
	}
	if len(l.lines) > 0 {
		_, _ = l.w.Write(l.lines)
		l.lines = l.lines[:0]
	}
}

// urgentHandler has what matters written at once.
type urgentHandler struct {
	slog.Handler
	lines *lineWriter
}

func (h *urgentHandler) Handle(ctx context.Context, r slog.Record) error {
	err := h.Handler.Handle(ctx, r)
	if r.Level >= slog.LevelWarn {
		h.lines.flush()
	}
	return err
}

func (h *urgentHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &urgentHandler{h.Handler.WithAttrs(attrs), h.lines}
}

func (h *urgentHandler) WithGroup(name string) slog.Handler {
	return &urgentHandler{h.Handler.WithGroup(name), h.lines}
}
