package planetest

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"
)

// Kills are the kills of a stress test, 50 unless SLUICE_KILLS says otherwise.
func Kills(t *testing.T) int {
	t.Helper()
	if s := os.Getenv("SLUICE_KILLS"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if testing.Short() {
		return 5
	}
	return 50
}

// Stress is a test that kills daemons with SIGKILL while readers check every
// byte that they get: none may be wrong, and none may come late.
type Stress struct {
	Roles      Roles
	Options    json.RawMessage // of the plane, for Roles.Open
	Kills      int
	DeviceSize int64 // large, so that random reads seldom hit a cache
	// MayRefuse: reads may fail.
	MayRefuse bool
}

const killDevices = 6

// Run runs the test.
func (s Stress) Run(t *testing.T) {
	spec, files := KillImage(t, s.DeviceSize)
	spec.Options = s.Options
	d := StartDaemon(t, spec)
	defer func() { d.Kill(); spec.Clean(t, s.Roles) }()
	d.Ready(t)
	readers := StartReaders(t, spec.Image.Dir, files)
	began := time.Now()
	var slowest time.Duration
	for i := range s.Kills {
		if i%5 == 4 { // while it starts
			time.Sleep(rand.N(60 * time.Millisecond))
		} else {
			time.Sleep(20*time.Millisecond + rand.N(300*time.Millisecond))
		}
		d.Kill()
		start := time.Now()
		d = StartDaemon(t, spec)
		if i%5 != 3 {
			if !d.Ready(t).Resumed {
				t.Fatalf("kill %d: the daemon did not resume", i)
			}
			slowest = max(slowest, time.Since(start))
		}
	}
	took := time.Since(began)
	r := readers.Stop(t)
	t.Logf("%d kills in %v: %d reads verified, %d wrong, %d refused, %d faults through mappings; longest read %v, slowest restart %v",
		s.Kills, took.Round(time.Millisecond), r.Good, r.Wrong, r.Refused, r.Faults,
		r.Longest.Round(time.Millisecond), slowest.Round(time.Millisecond))
	if r.Wrong > 0 || r.Refused > 0 && !s.MayRefuse {
		t.Errorf("%d reads gave wrong bytes, %d failed; the first: %v", r.Wrong, r.Refused, r.First)
	}
	if r.Longest > 30*time.Second { // which spans many restarts, on any machine
		t.Errorf("a read took %v", r.Longest)
	}
	if r.Good < int64(s.Kills) { // how many there are is the machine's; ten times as many, and more, on an idle one
		t.Errorf("only %d reads: the test did not test much", r.Good)
	}
}

// KillImage makes an image of some large devices of size bytes, with a file on
// each, and the daemon that serves it.
func KillImage(t *testing.T, size int64) (DaemonSpec, []File) {
	t.Helper()
	var devs []Dev
	var files []File
	img := DaemonImage{Dir: t.TempDir()}
	for i := range killDevices {
		dev := NewDev(uint64(i+1), size)
		devs = append(devs, dev)
		files = append(files, File{
			Name: fmt.Sprintf("file%d", i), Size: size,
			Pieces: []Piece{{Pattern: dev.Content.Pattern, Dev: i, Length: size}},
		})
		img.Seeds, img.Sizes = append(img.Seeds, uint64(i+1)), append(img.Sizes, size)
	}
	img.Metadata = Attachable(t, t.TempDir(), devs, files).Metadata
	return DaemonSpec{Dir: t.TempDir(), Image: img, MaxDelay: 6 * time.Millisecond}, files
}
