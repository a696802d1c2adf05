package main

import (
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sluice/internal/config"
)

// countingWriter counts the calls that bring lines.
type countingWriter struct {
	mu    sync.Mutex
	text  strings.Builder
	calls int
}

func (w *countingWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.calls++
	return w.text.Write(p)
}

func (w *countingWriter) state() (text string, calls int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.text.String(), w.calls
}

func TestLogIsWrittenSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var w countingWriter
		log, flush := openLog(config.Log{Level: "info", Format: "json"}, &w)
		wantLines := func(lines, calls int) {
			t.Helper()
			synctest.Wait()
			if text, c := w.state(); strings.Count(text, "\n") != lines || c != calls {
				t.Errorf("%d lines in %d calls, want %d in %d:\n%s", strings.Count(text, "\n"), c, lines, calls, text)
			}
		}
		log.Debug("not asked for")
		for range 100 {
			log.Info("request")
		}
		wantLines(0, 0)
		time.Sleep(logDelay)
		wantLines(100, 1)
		log.Info("request")
		log.With("who", "me").WithGroup("g").Error("urgent")
		wantLines(102, 2)
		if text, _ := w.state(); !strings.Contains(text, `"msg":"urgent","who":"me"`) {
			t.Errorf("the last line is not the urgent one:\n%s", text)
		}
		log.Info("last")
		flush()
		wantLines(103, 3)
		time.Sleep(time.Hour)
		wantLines(103, 3)
		log.Info(strings.Repeat("x", logBuffer))
		wantLines(104, 4)
	})
}
