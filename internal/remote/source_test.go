package remote

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"sluice/oci"
)

// The source of a push belongs to its caller again when the push returns, and a
// body that was replaced must not take from the one that replaced it, however
// long the transport goes on reading.
func TestSourceIsLeftAlone(t *testing.T) {
	content := []byte("0123456789")
	src := bytes.NewReader(content)
	s := newSource(src, oci.Descriptor{Digest: oci.DigestOf(content), Size: 10}, t.Context().Err)
	first, err := s.open()
	if err != nil {
		t.Fatal(err)
	}
	if n, err := io.ReadFull(first, make([]byte, 4)); n != 4 || err != nil {
		t.Fatal(n, err)
	}
	second, err := s.open()
	if err != nil {
		t.Fatal(err)
	}
	if n, err := first.Read(make([]byte, 4)); n != 0 || !errors.Is(err, errDetached) || src.Len() != 10 {
		t.Errorf("the replaced body read %d bytes, %v; %d are left", n, err, src.Len())
	}
	if got, err := io.ReadAll(second); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the second body has %q, %v", got, err)
	}
	third, err := s.open()
	if err != nil {
		t.Fatal(err)
	}
	s.detach()
	if n, err := third.Read(make([]byte, 4)); n != 0 || !errors.Is(err, errDetached) || src.Len() != 10 {
		t.Errorf("after the push a body read %d bytes, %v; %d are left", n, err, src.Len())
	}
	if err := s.failed(); err != nil {
		t.Errorf("the source is blamed with %v", err)
	}
}
