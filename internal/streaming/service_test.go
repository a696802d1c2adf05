package streaming

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"sluice/internal/convert"
	"sluice/internal/index"
	"sluice/internal/operation"
	"sluice/internal/stored"
	"sluice/oci"
)

func TestConversion(t *testing.T) {
	b := newBench(t, stored.Options{})
	s := b.service(Options{})
	desc := b.push("v1", image{tars: [][]byte{files("one", noise(1, 1<<20)), files("two")}})
	op := must(t, s, repo, "v1")
	if op.Status != operation.StatusNotStarted || op.Progress != 0 || op.Subject != desc.Digest || op.Details != "Conversion started for resource "+repo+"@"+desc.Digest.String() {
		t.Errorf("it began as %+v", op)
	}
	if n := len(op.ID); n != 36 || strings.Count(op.ID, "-") != 4 {
		t.Errorf("the ID %s is no UUID", op.ID)
	}
	start(t, s)
	op = end(t, s, op)
	if op.Status != operation.StatusSucceeded || op.Progress != 100 {
		t.Errorf("it ended as %+v", op)
	}
	if n := len(b.artifacts(repo, desc.Digest)); n != 1 {
		t.Errorf("%d artifacts", n)
	}
	if latest, err := s.Latest(t.Context(), repo, desc.Digest); err != nil || latest != op {
		t.Errorf("the latest is %+v, %v", latest, err)
	}
	again := succeed(t, s, repo, desc.Digest.String())
	if again.ID == op.ID || !strings.Contains(again.Details, "converted before") {
		t.Errorf("again: %+v", again)
	}
	if succeededIn(2, s) != 2 || s.converted.Load() != 2 {
		t.Errorf("counted %d conversions, %d layers", s.ops.Counts.Succeeded.Load(), s.converted.Load())
	}
	for what, err := range map[string]error{
		"another repository": second(s.Operation(t.Context(), "other", op.ID)),
		"no operation":       second(s.Operation(t.Context(), repo, "nonsense")),
		"no conversion":      second(s.Latest(t.Context(), repo, oci.DigestOf(nil))),
		"cancel elsewhere":   second(s.Cancel(t.Context(), "other", op.ID)),
	} {
		if !errors.Is(err, ErrOperationUnknown) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if canceled, err := s.Cancel(t.Context(), repo, op.ID); err != nil || canceled.Status != operation.StatusSucceeded {
		t.Errorf("canceling what has ended: %+v, %v", canceled, err)
	}
}

func second[T any](_ T, err error) error { return err }

func TestIndexIsConvertedForEveryPlatform(t *testing.T) {
	b := newBench(t, stored.Options{})
	s := b.service(Options{})
	start(t, s)
	shared := files("shared")
	amd := b.push("", image{tars: [][]byte{shared, files("amd")}})
	arm := b.push("", image{arch: "arm64", tars: [][]byte{shared, files("arm")}})
	win := b.push("", image{os: "windows", tars: [][]byte{files("win")}})
	all := b.index("v1", amd, arm, win)
	succeed(t, s, repo, "v1")
	for subject, want := range map[oci.Digest]int{amd.Digest: 1, arm.Digest: 1, win.Digest: 0, all.Digest: 2} {
		if n := len(b.artifacts(repo, subject)); n != want {
			t.Errorf("%d artifacts of %s, want %d", n, subject, want)
		}
	}
	if n := s.converted.Load(); n != 3 {
		t.Errorf("%d layers were converted", n)
	}
}

func TestStartSaysWhyNot(t *testing.T) {
	b := newBench(t, stored.Options{AllowStreamingPush: true})
	s := b.service(Options{Platforms: []oci.Platform{{OS: "linux", Architecture: "amd64"}}})
	layer := [][]byte{files("x")}
	arm := b.push("arm", image{arch: "arm64", tars: layer})
	for reference, want := range map[string]*oci.Error{
		"missing": convert.ErrResourceNotFound,
		b.push("", image{os: "windows", tars: layer}).Digest.String(): convert.ErrUnsupportedPlatform,
		arm.Digest.String():              convert.ErrUnsupportedPlatform,
		b.index("", arm).Digest.String(): convert.ErrNoSupportedPlatform,
		b.push("", image{tars: layer, artifactType: oci.ArtifactTypeStreaming}).Digest.String():         convert.ErrUnsupportedArtifactType,
		b.push("", image{tars: layer, configType: "application/vnd.oci.empty.v1+json"}).Digest.String(): convert.ErrImageNotRunnable,
	} {
		if _, err := s.Start(t.Context(), repo, reference); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %s", reference, err, want.Code)
		}
	}
	if _, err := s.Start(t.Context(), "no/such", "v1"); !errors.Is(err, convert.ErrResourceNotFound) {
		t.Errorf("no repository: %v", err)
	}
	if queued, _, err := b.db.CountJobs(t.Context(), stored.ConvertQueues); err != nil || queued != 0 {
		t.Errorf("%d jobs, %v", queued, err)
	}
}

func TestWrongContentFailsAtOnce(t *testing.T) {
	b := newBench(t, stored.Options{})
	s := b.service(Options{})
	start(t, s)
	b.push("lie", image{tars: [][]byte{files("x")}, diffIDs: []oci.Digest{oci.DigestOf([]byte("another"))}})
	op := end(t, s, must(t, s, repo, "lie"))
	if op.Status != operation.StatusFailed || op.ErrorCode != convert.ErrImageNotRunnable.Code || !strings.Contains(op.Details, "diff ID") || s.ops.Counts.Retried.Load() != 0 {
		t.Errorf("%+v", op)
	}
}

// waiting blocks conversions where they begin to read layers.
func waiting(s *Service) (reached chan string, free chan struct{}) {
	reached, free = make(chan string, 100), make(chan struct{})
	s.generator = &faulty{Registry: s.generator, before: func(call string) error {
		if call == "GetBlobRange" {
			reached <- call
			<-free
		}
		return nil
	}}
	return reached, free
}

func TestOneConversionOfASubjectAtATime(t *testing.T) {
	b := newBench(t, stored.Options{})
	s, other := b.service(Options{}), b.service(Options{})
	reached, free := waiting(s)
	desc := b.push("v1", image{tars: [][]byte{files("one")}})
	op := must(t, s, repo, "v1")
	if again := must(t, other, repo, desc.Digest.String()); again.ID != op.ID {
		t.Errorf("waiting, a second operation: %+v", again)
	}
	start(t, s)
	<-reached
	start(t, other)
	if again := must(t, other, repo, "v1"); again.ID != op.ID || again.Status != operation.StatusRunning {
		t.Errorf("running, a second operation: %+v", again)
	}
	close(free)
	if op = end(t, s, op); op.Status != operation.StatusSucceeded || s.converted.Load() != 1 || other.converted.Load() != 0 {
		t.Errorf("%+v", op)
	}
}

func TestCancel(t *testing.T) {
	for _, where := range []string{"waiting", "here", "in another replica"} {
		t.Run(where, func(t *testing.T) {
			b := newBench(t, stored.Options{})
			s := b.service(Options{})
			asked := s
			if where == "in another replica" {
				asked = b.service(Options{})
			}
			reached, free := waiting(s)
			desc := b.push("v1", image{tars: [][]byte{files("one")}})
			op := must(t, s, repo, "v1")
			if where != "waiting" {
				start(t, s)
				<-reached
			}
			got, err := asked.Cancel(t.Context(), repo, op.ID)
			if err != nil || got.Status != operation.StatusCanceled || got.ID != op.ID {
				t.Fatalf("%+v, %v", got, err)
			}
			if got, err = asked.Latest(t.Context(), repo, desc.Digest); err != nil || got.Status != operation.StatusCanceled {
				t.Errorf("then it is %+v, %v", got, err)
			}
			again := must(t, asked, repo, "v1")
			if again.ID == op.ID || again.Status != operation.StatusNotStarted {
				t.Errorf("started again: %+v", again)
			}
			if where == "in another replica" {
				time.Sleep(4 * hurry().Beat)
			}
			close(free)
			if where == "waiting" {
				start(t, s)
			}
			if again = end(t, s, again); again.Status != operation.StatusSucceeded {
				t.Errorf("again: %+v", again)
			}
			if got, err = s.Operation(t.Context(), repo, op.ID); err != nil || got.Status != operation.StatusCanceled {
				t.Errorf("in the end it is %+v, %v", got, err)
			}
			if n := len(b.artifacts(repo, desc.Digest)); n != 1 {
				t.Errorf("%d artifacts", n)
			}
		})
	}
}

func TestCanceledLeavesNothing(t *testing.T) {
	b := newBench(t, stored.Options{})
	s := b.service(Options{})
	var op Operation
	s.generator = &faulty{Registry: s.generator, before: func(call string) error {
		if call == "ResolveBlob" { // of the guard: the last moment
			_, err := b.db.CancelJob(t.Context(), op.ID)
			return err
		}
		return nil
	}}
	s.opts.Store = nil
	desc := b.push("v1", image{tars: [][]byte{files("one")}})
	op = must(t, s, repo, "v1")
	start(t, s)
	waitFor(t, func() bool {
		job, err := b.db.Job(t.Context(), op.ID)
		return err == nil && job.State == index.Canceled
	})
	if n := len(b.artifacts(repo, desc.Digest)); n != 0 {
		t.Errorf("%d artifacts", n)
	}
}

func waitFor(t testing.TB, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it doesn't happen")
		}
	}
}

func TestDeletedMeanwhile(t *testing.T) {
	for _, call := range []string{"GetBlobRange", "PushManifest"} {
		t.Run(call, func(t *testing.T) {
			b := newBench(t, stored.Options{})
			s := b.service(Options{})
			desc := b.push("v1", image{tars: [][]byte{files("one")}})
			s.generator = &faulty{Registry: s.generator, before: func(c string) error {
				if c == call {
					if err := b.reg.DeleteManifest(t.Context(), repo, desc.Digest); err != nil && !errors.Is(err, oci.ErrManifestUnknown) && !errors.Is(err, oci.ErrNameUnknown) {
						return err
					}
				}
				return nil
			}}
			op := must(t, s, repo, "v1")
			start(t, s)
			if op = end(t, s, op); op.Status != operation.StatusCanceled || !strings.Contains(op.Details, "deleted") || s.ops.Counts.Retried.Load() != 0 {
				t.Errorf("%+v", op)
			}
			if n := len(b.artifacts(repo, desc.Digest)); n != 0 {
				t.Errorf("%d artifacts of nothing", n)
			}
		})
	}
}

func TestRepositoriesTakeTurns(t *testing.T) {
	b := newBench(t, stored.Options{})
	s := b.service(Options{Workers: 1})
	var order []string
	s.generator = &faulty{Registry: s.generator, repo: func(r string) {
		if len(order) == 0 || order[len(order)-1] != r {
			order = append(order, r)
		}
	}}
	layer := files("one")
	var last Operation
	for i := range 20 {
		desc := b.push(fmt.Sprint(i), image{repo: "many", tars: [][]byte{layer, files(fmt.Sprint(i))}})
		last = must(t, s, "many", desc.Digest.String())
	}
	order = nil
	for _, one := range []string{"a", "z"} {
		b.push("v1", image{repo: one, tars: [][]byte{layer}})
		must(t, s, one, "v1")
	}
	order = nil
	stop := start(t, s)
	end(t, s, last)
	stop()
	if got := strings.Join(order[:min(5, len(order))], " "); got != "a many z many" {
		t.Errorf("converted in the order %s", got)
	}
}

func TestReplicasShareTheWork(t *testing.T) {
	b := newBench(t, stored.Options{})
	base := files("base", noise(1, 100_000))
	one, two := b.service(Options{}), b.service(Options{})
	var ops []Operation
	for i := range 12 {
		name := fmt.Sprintf("repo-%d", i%3)
		desc := b.push(fmt.Sprint(i), image{repo: name, tars: [][]byte{base, files(fmt.Sprint(i))}})
		ops = append(ops, must(t, one, name, desc.Digest.String()))
	}
	start(t, one)
	start(t, two)
	for _, op := range ops {
		if op = end(t, two, op); op.Status != operation.StatusSucceeded {
			t.Errorf("%+v", op)
		}
		if n := len(b.artifacts(op.Repo, op.Subject)); n != 1 {
			t.Errorf("%d artifacts of %s", n, op.Subject)
		}
	}
	if n := one.converted.Load() + two.converted.Load(); n != 13 {
		t.Errorf("%d layers were converted, of 13", n)
	}
	if n := succeededIn(12, one, two); n != 12 {
		t.Errorf("%d conversions of 12", n)
	}
}

// A worker that stood still for longer than its lease leaves the job to who has
// it now.
func TestLeaseLost(t *testing.T) {
	b := newBench(t, stored.Options{})
	slow := hurry()
	slow.Lease, slow.Beat = 100*time.Millisecond, time.Hour
	s, other := newService(b.reg, b.db, Options{}, slow), b.service(Options{})
	pushed := 0
	reached, free := make(chan string, 1), make(chan struct{})
	s.generator = &faulty{Registry: s.generator, before: func(call string) error {
		switch call {
		case "ResolveBlob":
			select {
			case reached <- call:
			default:
			}
			<-free
		case "PushManifest":
			pushed++
		}
		return nil
	}}
	desc := b.push("v1", image{tars: [][]byte{files("one")}})
	op := must(t, s, repo, "v1")
	stop := start(t, s)
	<-reached
	start(t, other)
	op = end(t, other, op)
	close(free)
	stop()
	if op.Status != operation.StatusSucceeded || pushed != 0 || succeededIn(1, other) != 1 || s.ops.Counts.Succeeded.Load() != 0 {
		t.Errorf("%+v; the worker without a lease pushed %d", op, pushed)
	}
	if n := len(b.artifacts(repo, desc.Digest)); n != 1 {
		t.Errorf("%d artifacts", n)
	}
}

// What is leased and never ends, since its process dies, is given up.
func TestBegunTooOften(t *testing.T) {
	b := newBench(t, stored.Options{})
	s := b.service(Options{})
	b.push("v1", image{tars: [][]byte{files("one")}})
	op := must(t, s, repo, "v1")
	for range operation.MaxAttempts {
		if jobs, err := b.db.Lease(t.Context(), stored.ConvertQueue(repo), 1, time.Microsecond); err != nil || len(jobs) != 1 {
			t.Fatal(jobs, err)
		}
		time.Sleep(time.Millisecond)
	}
	start(t, s)
	waitFor(t, func() bool {
		now, err := s.Operation(t.Context(), repo, op.ID)
		return err == nil && now.Status == operation.StatusFailed
	})
	if op = end(t, s, op); op.ErrorCode != operation.CodeUnknown {
		t.Errorf("%+v", op)
	}
}

func TestAutomatic(t *testing.T) {
	b := newBench(t, stored.Options{Convert: true, Events: true, SoftDelete: 24 * time.Hour, AllowStreamingPush: true})
	s := b.service(Options{Workers: 1})
	layer := [][]byte{files("one")}
	before := b.push("before", image{tars: layer})
	op, err := s.SetEnabled(t.Context(), repo, true, false)
	if err != nil || op.Status != operation.StatusSucceeded || op.ID == "" {
		t.Fatalf("%+v, %v", op, err)
	}
	queued := func(want int) {
		t.Helper()
		n, _, err := b.db.CountJobs(t.Context(), stored.ConvertQueue(repo))
		if err != nil || n != want {
			t.Errorf("%d jobs wait, %v, want %d", n, err, want)
		}
	}
	queued(1) // the setting's own
	img := b.push("v1", image{tars: [][]byte{files("two")}})
	queued(2)
	b.push("again", image{tars: [][]byte{files("two")}}) // the same
	queued(2)
	b.push("win", image{os: "windows", tars: layer})
	b.push("ref", image{tars: layer, subject: &img})
	b.push("art", image{tars: layer, artifactType: "application/x"})
	b.push("chart", image{tars: layer, configType: "application/vnd.cncf.helm.config.v1+json"})
	b.push("str", image{tars: layer, artifactType: oci.ArtifactTypeStreaming})
	queued(2)
	all := b.index("idx", img)
	queued(3)
	b.push("other", image{repo: "other", tars: layer})
	if n, _, err := b.db.CountJobs(t.Context(), stored.ConvertQueue("other")); err != nil || n != 0 {
		t.Errorf("%d jobs of another repository, %v", n, err)
	}
	start(t, s)
	for _, subject := range []oci.Digest{img.Digest, all.Digest} {
		latest, err := s.Latest(t.Context(), repo, subject)
		if err != nil {
			t.Fatal(err)
		}
		if latest = end(t, s, latest); latest.Status != operation.StatusSucceeded || len(b.artifacts(repo, subject)) != 1 {
			t.Errorf("%+v", latest)
		}
	}
	if got := end(t, s, op); got.Status != operation.StatusSucceeded {
		t.Errorf("the setting: %+v", got)
	}
	if n := len(b.artifacts(repo, before.Digest)); n != 0 {
		t.Error("what was there before is converted, though nobody asked for it")
	}
	converted := 0
	jobs, err := b.db.Lease(t.Context(), stored.EventQueue, 100, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	for len(jobs) > 0 {
		for _, j := range jobs {
			var e stored.Event
			if err := json.Unmarshal(j.Payload, &e); err != nil {
				t.Fatal(err)
			}
			if e.Action == stored.ActionConvert {
				converted++
			}
			if err := b.db.Finish(t.Context(), j, index.Succeeded, nil); err != nil {
				t.Fatal(err)
			}
		}
		if jobs, err = b.db.Lease(t.Context(), stored.EventQueue, 100, time.Minute); err != nil {
			t.Fatal(err)
		}
	}
	if converted != 3 { // one for the image, one for the index, and the one that was pushed
		t.Errorf("%d events say that an artifact was made", converted)
	}

	// Restored without its artifact, it gets it anew.
	if err := b.reg.DeleteManifest(t.Context(), repo, b.artifacts(repo, img.Digest)[0]); err != nil {
		t.Fatal(err)
	}
	if err := b.reg.DeleteManifest(t.Context(), repo, all.Digest); err != nil {
		t.Fatal(err)
	}
	if err := b.reg.DeleteManifest(t.Context(), repo, img.Digest); err != nil {
		t.Fatal(err)
	}
	if _, err := b.reg.Restore(t.Context(), repo, img.Digest, ""); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool { return len(b.artifacts(repo, img.Digest)) == 1 })

	if _, err := s.SetEnabled(t.Context(), repo, false, false); err != nil {
		t.Fatal(err)
	}
	late := b.push("late", image{tars: [][]byte{files("late")}})
	if _, err := s.Latest(t.Context(), repo, late.Digest); !errors.Is(err, ErrOperationUnknown) {
		t.Errorf("switched off: %v", err)
	}
}

func TestBackfill(t *testing.T) {
	b := newBench(t, stored.Options{Convert: true})
	s := b.service(Options{})
	start(t, s)
	var tagged []oci.Descriptor
	for i := range 3 {
		tagged = append(tagged, b.push(fmt.Sprint("v", i), image{tars: [][]byte{files(fmt.Sprint(i))}}))
	}
	left := b.push("", image{tars: [][]byte{files("left behind")}})
	b.push("win", image{os: "windows", tars: [][]byte{files("x")}})
	op, err := s.SetEnabled(t.Context(), repo, true, true)
	if err != nil {
		t.Fatal(err)
	}
	if op = end(t, s, op); op.Status != operation.StatusSucceeded || !strings.Contains(op.Details, "3 images") {
		t.Errorf("%+v", op)
	}
	for _, desc := range tagged {
		latest, err := s.Latest(t.Context(), repo, desc.Digest)
		if err != nil {
			t.Fatal(err)
		}
		if latest = end(t, s, latest); latest.Status != operation.StatusSucceeded {
			t.Errorf("%+v", latest)
		}
	}
	if n := len(b.artifacts(repo, left.Digest)); n != 0 {
		t.Error("what no tag names is converted")
	}
	if _, err := s.SetEnabled(t.Context(), "no/such", true, true); err == nil {
		t.Error("of no repository")
	}
}

// succeededIn returns how many conversions of services succeeded, when it is want or
// has had time to become that: they are counted after they are seen to have
// ended.
func succeededIn(want int64, services ...*Service) (n int64) {
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		n = 0
		for _, s := range services {
			n += s.ops.Counts.Succeeded.Load()
		}
		if n >= want || time.Now().After(deadline) {
			return n
		}
	}
}
