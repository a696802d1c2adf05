package endpoint

import (
	"testing"
	"testing/synctest"
	"time"
)

// A daemon that was used until it was stuck for a while has to be unused for
// IdleTime before it ends.
func TestIdleIsSeen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		var unused time.Time
		err := waitIdle(t.Context(), func() (bool, error) {
			if asked++; asked == 1 {
				return true, nil
			}
			if asked == 2 {
				time.Sleep(2 * IdleTime) // as a disk may take
				unused = time.Now()
			}
			return false, nil
		})
		if d := time.Since(unused); err != nil || d < IdleTime {
			t.Errorf("it ended %v after nobody used it, %v", d, err)
		}
	})
}
