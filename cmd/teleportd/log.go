package main

import (
	"errors"
	"io"
	"log/slog"

	"sluice/internal/journal"
)

// newLog returns the daemon's log: in the journal where --log says so, or on w.
func (c *config) newLog(w io.Writer) (*slog.Logger, error) {
	level := slog.LevelInfo
	if c.debug {
		level = slog.LevelDebug
	}
	switch {
	case c.log == logJournal && !journal.Reachable():
		return nil, errors.New("--log journal: no journald answers on this machine; --log stderr does without")
	case c.log == logJournal, c.log == logAuto && journal.Connected():
		return slog.New(journal.New("teleportd", level)), nil
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level})), nil
}
