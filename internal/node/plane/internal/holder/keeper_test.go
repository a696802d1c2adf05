package holder

import (
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"testing"
)

// role makes this test's program a holder.
const role = "SLUICE_HOLDER_TEST"

// patient keeps what it is given for ever.
type patient struct{}

func (patient) Over(Held) bool                 { return false }
func (patient) AnswerBystanders(Held) error    { return nil }
func (patient) AnswerOrphans(Held, bool) error { return nil }

func TestMain(m *testing.M) {
	if os.Getenv(role) != "" {
		if err := Run(context.Background(), os.Args[len(os.Args)-1], patient{}); err != nil {
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// A holder may end between answering what it has and being given something
// else, as the one of a connection that was aborted does.
func TestHolderEndsBeforePut(t *testing.T) {
	dir := t.TempDir()
	keeper := func() *Keeper {
		return NewKeeper(dir, []string{"/usr/bin/env", role + "=1", os.Args[0]}, slog.New(slog.DiscardHandler))
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	h := Held{FD: int(null.Fd()), Session: json.RawMessage(`{"a":1}`)}
	first := keeper()
	if err := first.Put(t.Context(), h); err != nil {
		t.Fatal(err)
	}
	second := keeper()
	held, err := second.Get()
	if err != nil || held == nil {
		t.Fatalf("the holder has %v, %v", held, err)
	}
	if err := first.child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = first.child.Wait() // it was killed
	if err := second.Put(t.Context(), h); err != nil {
		t.Errorf("giving something to a holder that has ended: %v", err)
	}
	third := keeper()
	if held, err := third.Get(); err != nil || held == nil || string(held.Session) != string(h.Session) {
		t.Errorf("the new holder has %v, %v", held, err)
	}
	if err := third.Quit(); err != nil {
		t.Error(err)
	}
}
