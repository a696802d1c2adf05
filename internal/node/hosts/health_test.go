package hosts

import (
	"errors"
	"testing"
	"time"
)

func TestHealth(t *testing.T) {
	var h health
	now := time.Now()
	check := func(what string, out, probe bool) {
		t.Helper()
		if o, p := h.state(now); o != out || p != probe {
			t.Errorf("%s: left out %v, to be probed %v", what, o, p)
		}
	}
	check("at first", false, false)
	bad := errors.New("refused")
	began := now
	now = now.Add(time.Second)
	if d := h.failed(began, now, bad); d != minOut {
		t.Errorf("left out for %v", d)
	}
	if d := h.failed(began, now.Add(time.Second), bad); d != 0 {
		t.Errorf("a request of before makes it %v", d)
	}
	check("after a failure", true, false)
	if h.problem() == nil {
		t.Error("no problem")
	}
	now = now.Add(minOut)
	check("when the time is over", true, true)
	check("while it is probed", true, false)
	h.probed(now, nil)
	check("after a probe", false, false)

	// It fails at once again, and again: that makes it be left out for longer,
	// also if it answers in between.
	for _, want := range []time.Duration{2 * minOut, 4 * minOut, 8 * minOut} {
		h.worked(now)
		now = now.Add(time.Millisecond)
		if d := h.failed(now, now, bad); d != want {
			t.Errorf("left out for %v, want %v", d, want)
		}
		now = now.Add(want)
		check("when the time is over", true, true)
		h.probed(now, nil)
	}
	for range 100 {
		now = now.Add(time.Millisecond)
		if d := h.failed(now, now, bad); d < minOut || d > maxOut {
			t.Errorf("left out for %v", d)
		}
	}

	// When it has worked for long, that's forgotten.
	now = now.Add(3 * maxOut)
	if !h.worked(now) || h.worked(now) {
		t.Error("it wasn't left out, or still is")
	}
	now = now.Add(time.Millisecond)
	if d := h.failed(now, now, bad); d != minOut {
		t.Errorf("left out for %v", d)
	}
	// A probe that fails is followed by another.
	now = now.Add(minOut)
	check("when the time is over", true, true)
	h.probed(now, bad)
	check("after a probe that failed", true, false)
	now = now.Add(probeEvery)
	check("later", true, true)
	h.probed(now, bad)
	now = now.Add(probeEvery)
	// An answer is faster than the probe.
	check("when the time is over", true, true)
	h.worked(now)
	h.probed(now, bad)
	check("after an answer", false, false)
}
