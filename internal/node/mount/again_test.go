package mount

import (
	"context"
	"errors"
	"testing"

	"sluice/internal/blob"
	"sluice/oci"
)

func TestAgain(t *testing.T) {
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, 1},
		{errors.New("the answer broke off"), 2},
		{oci.ErrDigestInvalid, 2},
		{notStreaming(IntegrityFailure, "an artifact of something else"), 2},
		{notStreaming(NoStreamingArtifact, "there is none"), 1},
		{oci.ErrManifestUnknown, 1},
		{oci.ErrUnauthorized, 1},
		{oci.ErrTooManyRequests, 1},
	} {
		calls := 0
		_, err := again(t.Context(), func(context.Context) (int, error) { calls++; return 0, c.err })
		if calls != c.want || !errors.Is(err, c.err) {
			t.Errorf("%v: asked %d times, want %d, error %v", c.err, calls, c.want, err)
		}
	}
	calls := 0
	v, err := again(t.Context(), func(context.Context) (int, error) {
		if calls++; calls == 1 {
			return 0, errors.New("connection reset")
		}
		return 7, nil
	})
	if v != 7 || err != nil {
		t.Errorf("the second answer is %d, %v, want 7", v, err)
	}
	v, err = again(t.Context(), func(ctx context.Context) (int, error) {
		if !blob.Doubted(ctx) {
			return 0, oci.ErrDigestInvalid
		}
		return 7, nil
	})
	if v != 7 || err != nil {
		t.Errorf("what comes from elsewhere is %d, %v, want 7", v, err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	calls = 0
	if _, err := again(ended, func(context.Context) (int, error) { calls++; return 0, oci.ErrDigestInvalid }); calls != 1 || err == nil {
		t.Errorf("asked %d times without time for it, %v", calls, err)
	}
}
